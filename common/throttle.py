"""
How many requests a tenant may make: a bucket in the database, from which a process draws handfuls.

A process that drew one request at a time would write to the database for each; it draws what a tenant
earns in a quarter of a second instead, and spends that from memory. Every request that is let through
was drawn once, by one process, so that all of them together never let more through than the bucket held.
``docs/decisions/0009-quotas.md`` says what else was considered.
"""

import math
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from common.db import Database, RequestBudget, is_postgres, now
from common.errors import TooManyRequests

_FULL = timedelta(minutes=1)  # a full bucket holds what is earned in this time
_HANDFULS_PER_MINUTE = 240


@dataclass
class _Purse:
    """What this process has drawn for a tenant and not yet spent."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    left: int = 0
    empty_until: float = 0.0  # on the monotonic clock; until then the bucket need not be asked


class Throttle:
    """
    The tenants' requests, as one process of the service counts them.

    Args:
        max_requests_per_minute: What each tenant earns, and the most that it can save up; 0 for no
            limit.
    """

    def __init__(self, database: Database, *, max_requests_per_minute: int) -> None:
        self._database = database
        self._limit = max_requests_per_minute
        self._handful = max(1, max_requests_per_minute // _HANDFULS_PER_MINUTE)
        self._purses: dict[str, _Purse] = {}
        self._lock = threading.Lock()

    def spend(self, tenant: str) -> None:
        """
        Take one request from the tenant's bucket.

        Raises:
            TooManyRequests: It is empty.
        """
        if self._limit == 0:
            return
        with self._lock:
            purse = self._purses.setdefault(tenant, _Purse())
        with purse.lock:  # one thread draws, the others find its handful
            if purse.left == 0:
                purse.left = self._draw(purse, tenant)
            purse.left -= 1

    def _draw(self, purse: _Purse, tenant: str) -> int:
        wait_seconds = purse.empty_until - time.monotonic()
        if wait_seconds <= 0:
            with self._database.write() as session:
                drawn, wait_seconds = draw(session, tenant, self._handful, per_minute=self._limit)
            if drawn:
                return drawn
            # Whoever goes on asking costs the database nothing until there is something to have.
            purse.empty_until = time.monotonic() + wait_seconds
        raise TooManyRequests(
            f"{self._limit} requests a minute are allowed.",
            retry_after_seconds=max(1, math.ceil(wait_seconds)),
        )


def draw(session: Session, tenant: str, wanted: int, *, per_minute: int) -> tuple[int, float]:
    """Draw up to *wanted* requests; return how many there were, and the seconds until there is one."""
    insert = postgresql.insert if is_postgres(session) else sqlite.insert
    session.execute(
        insert(RequestBudget)
        .values(tenant=tenant, spent_until=now())
        .on_conflict_do_nothing(index_elements=[RequestBudget.tenant])
    )
    spent_until, moment = session.execute(
        select(RequestBudget.spent_until, now())
        .where(RequestBudget.tenant == tenant)
        .with_for_update()
    ).one()
    each = timedelta(microseconds=_FULL // timedelta(microseconds=1) // per_minute)
    spent_until = max(spent_until, moment)
    left = moment + _FULL - spent_until  # the time that is not spent yet, 0 or more but for jitter
    drawn = min(wanted, max(0, left // each))
    if drawn == 0:
        return 0, (each - left).total_seconds()
    session.execute(
        update(RequestBudget)
        .where(RequestBudget.tenant == tenant)
        .values(spent_until=spent_until + drawn * each)
        .execution_options(synchronize_session=False)
    )
    return drawn, 0.0
