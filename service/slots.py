"""How many uploads are received at once: each holds a thread now and then, and room on the disk."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Busy


class UploadSlots:
    """
    The places for uploads of one service, and of each tenant among them.

    It is used from the event loop alone, so that it needs no lock.
    """

    def __init__(self, *, most: int, most_per_tenant: int) -> None:
        self._most = most
        self._most_per_tenant = most_per_tenant
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """
        Hold a place until the block ends.

        Raises:
            Busy: All of them are taken, or all that one tenant may have.
        """
        if self._taken[tenant] >= self._most_per_tenant:
            raise Busy(f"You have {self._most_per_tenant} uploads under way already.")
        if self._taken.total() >= self._most:
            raise Busy(f"{self._most} uploads are under way already.")
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]
