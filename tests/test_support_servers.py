"""The servers that other tests stand on are real, restartable, and leave nothing behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.support.guardian import StartError
from tests.support.servers import PostgresServer, RedisServer, postgres_server, redis_server

ROOT = Path(__file__).parents[1]

TEST_RUN = """
import signal, time
# A shell ignores SIGINT for what it runs in the background, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.support.servers import postgres_server, redis_server
with postgres_server() as postgres, redis_server() as redis:
    print(postgres.folder, redis.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """Run one Postgres for the tests of this file."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def redis_() -> Iterator[RedisServer]:
    """Run a Redis that the test may take down."""
    with redis_server() as server:
        yield server


def processes_in(folder: Path) -> list[int]:
    """Return the processes that run a program of *folder*, work in it, or name it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "exe"]):
        words = [*(process.info["cmdline"] or ()), process.info["cwd"], process.info["exe"]]
        if any(str(folder) in word for word in words if word):
            found.append(process.pid)
    return found


def ping(url: str) -> bool:
    """Return whether the Redis at *url* answers, without retries."""
    with closing(redis.Redis.from_url(url, retry=None)) as client:
        return bool(client.ping())


def test_postgres_answers(postgres: PostgresServer) -> None:
    """SELECT 1 gives 1 at the server's own URL."""
    with psycopg.connect(postgres.url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_every_database_is_fresh(postgres: PostgresServer) -> None:
    """Two databases of one server do not see each other's tables, and a name is taken once."""
    one, two = (postgres.create_database(f"fresh-{i}").replace("+psycopg", "") for i in (1, 2))
    with psycopg.connect(one) as connection:
        connection.execute("CREATE TABLE t (x int)")
    with psycopg.connect(two) as connection, pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT * FROM t")
    with pytest.raises(psycopg.errors.DuplicateDatabase):
        postgres.create_database("fresh-1")


def test_neither_server_runs_as_root(postgres: PostgresServer, redis_: RedisServer) -> None:
    """No process of a server has the rights of root, whoever runs the tests."""
    for folder in (postgres.folder, redis_.folder):
        assert folder is not None
        processes = processes_in(folder)
        assert processes
        assert all(psutil.Process(pid).uids().effective != 0 for pid in processes)


def test_redis_goes_down_and_comes_back_empty_on_its_port(redis_: RedisServer) -> None:
    """A stopped Redis refuses connections; a started one answers at the same URL, with no keys."""
    url = redis_.url
    with closing(redis.Redis.from_url(url)) as client:
        client.set("key", "value")
    redis_.stop()
    with pytest.raises(redis.ConnectionError):
        ping(url)
    redis_.stop()  # stopping twice is no error
    redis_.start()
    assert redis_.url == url
    assert ping(url)
    with closing(redis.Redis.from_url(url)) as client:
        assert client.dbsize() == 0


def test_a_closed_context_leaves_nothing() -> None:
    """After the context no process and no folder of the server is left."""
    for start in (postgres_server, redis_server):
        with start() as server:
            folder = server.folder
            assert folder is not None
            assert folder.is_dir()
            assert processes_in(folder)
        assert not folder.exists()
        assert not processes_in(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_test_run_leaves_nothing(number: signal.Signals) -> None:
    """However the test run dies, its servers and their folders go within seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", TEST_RUN],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as run:
        assert run.stdout is not None
        folders = [Path(word) for word in run.stdout.readline().split()]
        assert len(folders) == 2
        assert all(processes_in(folder) for folder in folders)
        run.send_signal(number)
    deadline = time.monotonic() + 30
    while any(folder.exists() or processes_in(folder) for folder in folders):
        assert time.monotonic() < deadline, f"{folders} are still there"
        time.sleep(0.05)


def test_a_server_that_cannot_start_says_why(redis_: RedisServer) -> None:
    """The error of a server on a taken port names the cause from the server's own log."""
    other = RedisServer()
    other.port, port = redis_.port, other.port
    try:
        with pytest.raises(StartError, match="Address already in use"):
            other.start()
        other.port = port
        other.start()
        assert ping(other.url)
    finally:
        other.close()
