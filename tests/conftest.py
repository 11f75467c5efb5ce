"""What many tests stand on: real servers, an empty or a migrated database, a blob store."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from common.blobs import FileBlobStore
from common.db import Database
from migrations.migrate import upgrade
from tests.support.servers import PostgresServer, RedisServer, postgres_server, redis_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run one Postgres for all tests; a test makes itself a database in it."""
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """Run one Redis for all tests; a test that stops it starts it again."""
    with redis_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Return a database without a table, once on SQLite and once on Postgres."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'weightwash.db'}")
        yield database
        database.close()
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    name = f"test_{uuid.uuid4().hex}"
    database = Database(server.create_database(name))
    yield database
    database.close()
    # A database takes eight megabytes, and there are hundreds of tests.
    with psycopg.connect(
        host="127.0.0.1", port=server.port, user="postgres", autocommit=True
    ) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def database(empty_database: Database) -> Database:
    """Return a freshly migrated database, once on SQLite and once on Postgres."""
    upgrade(empty_database)
    return empty_database


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut those searches of the method `auto` short whose length is no parameter of it."""
    for name in ("margins.STEPS", "search.WARP_STEPS", "search.STEPS_AGAIN"):
        monkeypatch.setattr(f"worker.purify.detection.{name}", 2)
    for name in ("margins.GLANCE_STEPS", "search.FIRST_WARP_STEPS", "search.FIRST_STEPS_AGAIN"):
        monkeypatch.setattr(f"worker.purify.detection.{name}", 1)
    monkeypatch.setattr("worker.purify.arsenal.STEPS", 2)
    monkeypatch.setattr("worker.purify.arsenal.TICKS", 4 * 2)


@pytest.fixture
def store(tmp_path: Path) -> FileBlobStore:
    """Return an empty blob store."""
    return FileBlobStore(tmp_path / "blobs")
