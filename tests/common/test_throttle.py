"""A tenant's requests are limited by one bucket, whichever process they go to."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import event, select, update

from common.db import Database, RequestBudget, now
from common.errors import TooManyRequests
from common.throttle import Throttle, draw


def let_through(throttle: Throttle, count: int, tenant: str = "acme") -> int:
    """Return how many of *count* requests were let through."""
    return sum(_is_let_through(throttle, tenant) for _ in range(count))


def _is_let_through(throttle: Throttle, tenant: str) -> bool:
    try:
        throttle.spend(tenant)
    except TooManyRequests:
        return False
    return True


def spend_until(database: Database, seconds: float) -> None:
    """Say when the tenant's bucket will be full: what time alone would bring about."""
    with database.write() as session:
        session.execute(update(RequestBudget).values(spent_until=now(seconds)))


@contextmanager
def statements(database: Database) -> Iterator[Callable[[], int]]:
    """Count the statements that reach the database."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield lambda: len(seen)
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


@pytest.mark.parametrize("limit", [1, 7, 60])
def test_full_bucket_holds_a_minutes_worth(database: Database, limit: int) -> None:
    """At once as many as a minute allows, then none but those that are earned meanwhile."""
    throttle = Throttle(database, max_requests_per_minute=limit)
    started = time.monotonic()
    passed = let_through(throttle, 2 * limit + 2)
    earned = math.ceil((time.monotonic() - started) * limit / 60) + 1
    assert limit <= passed <= limit + earned


def test_processes_share_one_bucket(database: Database) -> None:
    """All processes together let through what one would, however the requests are spread."""
    processes = [Throttle(database, max_requests_per_minute=120) for _ in range(3)]
    started = time.monotonic()
    with ThreadPoolExecutor(9) as pool:
        passed = sum(pool.map(lambda n: let_through(processes[n % 3], 30), range(9)))
    earned = math.ceil((time.monotonic() - started) * 2) + 1
    assert 120 <= passed <= 120 + earned


def test_tenants_have_buckets_of_their_own(database: Database) -> None:
    """One tenant's zeal costs another nothing."""
    throttle = Throttle(database, max_requests_per_minute=1)
    assert let_through(throttle, 1) == 1
    spend_until(database, 3600)
    assert let_through(throttle, 5) == 0
    assert let_through(throttle, 1, tenant="other") == 1


def test_refusal_says_when_to_come_back(database: Database) -> None:
    """The seconds are those until the next request is earned, by the database's clock."""
    Throttle(database, max_requests_per_minute=60).spend("acme")
    spend_until(database, 660)  # a minute's worth is saved up, so that 600 s and one request lack
    with pytest.raises(TooManyRequests, match="60 requests a minute are allowed") as refused:
        Throttle(database, max_requests_per_minute=60).spend("acme")
    # How late the clock was read can only make it less.
    assert 1 <= refused.value.retry_after_seconds <= 601
    with database.write() as session:
        drawn, wait_seconds = draw(session, "acme", 5, per_minute=60)
    assert drawn == 0
    assert 0 < wait_seconds <= 601


def test_time_gives_it_back(database: Database) -> None:
    """A bucket that was used up is full again when its minute is over, and never more than full."""
    throttle = Throttle(database, max_requests_per_minute=1)
    assert let_through(throttle, 1) == 1
    spend_until(database, -86400)
    with database.write() as session:
        assert draw(session, "acme", 1000, per_minute=100)[0] == 100


def test_most_requests_cost_the_database_nothing(database: Database) -> None:
    """One handful is drawn for many requests, and a refusal is remembered until there is more."""
    throttle = Throttle(database, max_requests_per_minute=6000)
    throttle.spend("acme")
    with statements(database) as count:
        assert let_through(throttle, 24) == 24
        assert count() == 0
        throttle.spend("acme")
        assert count() > 0
    spend_until(database, 7200)
    while _is_let_through(throttle, "acme"):
        pass
    with statements(database) as count:
        assert let_through(throttle, 100) == 0
        assert count() == 0


def test_no_limit_asks_nobody(database: Database) -> None:
    """0 stands for no limit, and then there is not even a row."""
    with statements(database) as count:
        assert let_through(Throttle(database, max_requests_per_minute=0), 100) == 100
        assert count() == 0
    with database.read() as session:
        assert session.scalars(select(RequestBudget)).all() == []
