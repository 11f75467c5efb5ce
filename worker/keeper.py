"""
Keep a lease alive from claim to end, whatever the worker is doing: copying, waiting, storing.

A thread renews the lease, publishes the progress and looks for reasons to stop. It never acts on one: it
says so in ``ended``, and whoever does the work looks there.
"""

import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import jobs
from common.db import Database
from common.jobs import Lease, Standing
from common.settings import Settings

_TICK_SECONDS = 0.1
_ETA_FRACTION = 0.05  # before that, the pace is that of loading

log = structlog.get_logger(__name__)


class Ended(Enum):
    """Why work on a job is over."""

    BY_ITSELF = auto()
    CANCELLED = auto()
    LOST = auto()  # the lease is somebody else's
    TOO_LATE = auto()
    GOING_AWAY = auto()  # this worker has to stop


class LeaseKeeper:
    """
    A context in which a lease is renewed.

    Args:
        progress: Asked for the present progress.
        leave_at: Asked for the monotonic time at which this worker must have let go, if any.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        lease: Lease,
        *,
        progress: Callable[[], dict[str, Any]],
        leave_at: Callable[[], float | None],
    ) -> None:
        self.ended: Ended | None = None
        self._settings = settings
        self._database = database
        self._lease = lease
        self._progress = progress
        self._leave_at = leave_at
        self._started = self._renewed = self._looked = time.monotonic()
        self._published: dict[str, Any] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def __enter__(self) -> Self:
        """Start to renew."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop to renew."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while self.ended is None and not self._stopped.wait(_TICK_SECONDS):
            at = time.monotonic()
            self.ended = self._must_end(at)
            pause = min(self._settings.cancel_poll_seconds, self._settings.heartbeat_seconds)
            if self.ended is None and at - self._looked >= pause:
                self._looked = at
                self.ended = self._look(at)

    def _must_end(self, at: float) -> Ended | None:
        """Return why the work must end now, as far as this worker knows by itself."""
        leave_at = self._leave_at()
        if at - self._started > self._settings.time_limit_seconds:
            return Ended.TOO_LATE
        if leave_at is not None and at > leave_at:
            return Ended.GOING_AWAY
        if at - self._renewed > self._settings.lease_seconds:
            return Ended.LOST  # the database has not answered for a whole lease
        return None

    def _look(self, at: float) -> Ended | None:
        """Renew the lease if that is due or there is progress, else only look at the row."""
        progress = self._progress()
        renews = (
            at - self._renewed >= self._settings.heartbeat_seconds or progress != self._published
        )
        try:
            if renews:
                with self._database.write() as session:
                    standing = jobs.heartbeat(
                        session,
                        self._lease,
                        lease_seconds=self._settings.lease_seconds,
                        progress=with_eta(progress, elapsed_seconds=at - self._started),
                    )
            else:
                with self._database.read() as session:
                    standing = jobs.standing(session, self._lease)
        except SQLAlchemyError as exc:
            log.warning("heartbeat-failed", error=str(exc).splitlines()[0])
            return None
        match standing:
            case Standing.HELD:
                if renews:
                    self._renewed, self._published = at, progress
                return None
            case Standing.CANCELLED:
                return Ended.CANCELLED
            case Standing.LOST:
                return Ended.LOST


def with_eta(progress: dict[str, Any], *, elapsed_seconds: float) -> dict[str, Any]:
    """Return *progress* with the seconds that are left if the job goes on at its present pace."""
    fraction = progress["fraction"]
    eta = None
    if fraction >= _ETA_FRACTION:
        eta = round(elapsed_seconds * (1 - fraction) / fraction)
    return {**progress, "eta_seconds": eta}
