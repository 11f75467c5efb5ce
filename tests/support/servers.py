"""
Start a real Postgres and a real Redis from the wheels of the ``dev`` extra.

Each runs under a guardian (``guardian.py``) that takes it down with the test run, however that
ends. Both listen on 127.0.0.1 alone and ask for no password: whoever has a shell on the machine can
reach them while they run. They hold nothing but what tests write.
"""

import json
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from tests.support import guardian
from tests.support.guardian import START_TIMEOUT_SECONDS, STOP_TIMEOUT_SECONDS, StartError


class Server:
    """A server on a port of 127.0.0.1 that stays reserved, running or not."""

    kind: str

    def __init__(self) -> None:
        # A socket that is bound but does not listen refuses connections, keeps the system from
        # handing the port to anybody else, and with SO_REUSEADDR lets the server listen on it.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind(("127.0.0.1", 0))
        self.port: int = self._reservation.getsockname()[1]
        self.folder: Path | None = None  # holds everything the running server writes
        self._guardian: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """
        Start the server on its port with nothing in it, and wait until it answers.

        Raises StartError when it does not.
        """
        if self._guardian is not None:
            return
        # Isolated (-I): the guardian takes no path and no option from the caller's environment.
        # A session of its own keeps Ctrl-C for the test run, which then closes the pipe in order.
        self._guardian = subprocess.Popen(
            [
                sys.executable,
                "-I",
                str(Path(guardian.__file__).resolve()),
                self.kind,
                str(self.port),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            answer = self._first_line()
        except BaseException:
            self.stop()
            raise
        if "error" in answer:
            self.stop()
            raise StartError(f"{self.kind} did not start: {answer['error']}")
        self.folder = Path(answer["folder"])

    def stop(self) -> None:
        """Stop the server and wait until its processes and its folder are gone."""
        if self._guardian is None:
            return
        process, self._guardian, self.folder = self._guardian, None, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=START_TIMEOUT_SECONDS + 2 * STOP_TIMEOUT_SECONDS)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def close(self) -> None:
        """Stop the server and give its port back."""
        try:
            self.stop()
        finally:
            self._reservation.close()

    def _first_line(self) -> dict[str, str]:
        assert self._guardian is not None
        assert self._guardian.stdout is not None
        # The guardian limits its own waiting; this limit is for a guardian that hangs.
        ready, _, _ = select.select([self._guardian.stdout], [], [], 3 * START_TIMEOUT_SECONDS)
        line = self._guardian.stdout.readline() if ready else b""
        if not line:
            return {"error": "its guardian said nothing; stderr may tell why"}
        answer: dict[str, str] = json.loads(line)
        return answer


class PostgresServer(Server):
    """A Postgres whose superuser ``postgres`` needs no password."""

    kind = "postgres"

    @property
    def url(self) -> str:
        """The URL of the maintenance database, for SQLAlchemy."""
        return self._url_of("postgres")

    def create_database(self, name: str) -> str:
        """Create an empty database, which must not exist yet, and return its URL."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._url_of(name)

    def _url_of(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"


class RedisServer(Server):
    """A Redis that keeps nothing: after `stop` and `start` it is empty, on the same port."""

    kind = "redis"

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run a Postgres for as long as the context is open."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Run a Redis for as long as the context is open."""
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()
