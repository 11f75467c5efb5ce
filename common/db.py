"""
The tables, and the two ways to talk to them: ``Database.read()`` and ``Database.write()``.

Commit and rollback are written here and nowhere else. All times are the database's own clock, in UTC:
two machines never have to agree on theirs.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    create_engine,
    event,
    literal,
    literal_column,
    make_url,
    text,
)
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment: ``timestamptz`` on Postgres, sortable text on SQLite, always aware in Python."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - the base's signature
        """Store the moment in UTC; refuse a naive one, which could mean anything."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime has no moment")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - the base's signature
        """Return the moment in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Now(FunctionElement[datetime]):
    """The database's clock, some seconds from now; not frozen for the length of a transaction."""

    type = UtcDateTime()
    inherit_cache = True
    name = "weightwash_now"


@compiles(_Now, "sqlite")
def _now_on_sqlite(element: _Now, compiler: SQLCompiler, **options: Any) -> str:
    # The appended zeros give the six digits that SQLAlchemy writes, so that texts compare as times.
    seconds = compiler.process(element.clauses, **options)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


@compiles(_Now, "postgresql")
def _now_on_postgres(element: _Now, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {seconds}))"


def now(seconds: float = 0.0) -> ColumnElement[datetime]:
    """Return the database's time, *seconds* from now, as an SQL expression."""
    return _Now(literal(seconds, Float))


class State(StrEnum):
    """Where a job is in its life; the last three are final."""

    QUEUED = "queued"  # accepted, waiting for a worker
    RUNNING = "running"  # held by a worker through a lease
    SUCCEEDED = "succeeded"  # a verified model can be downloaded
    FAILED = "failed"  # ended with an error
    CANCELLED = "cancelled"  # ended because somebody asked, or its deadline passed

    @property
    def is_terminal(self) -> bool:
        """Whether the state is final."""
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Base(DeclarativeBase):
    """The base of every table."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a class attribute
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        list[float]: JSON(),
    }


class Job(Base):
    """One request to purify one model."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    request_id: Mapped[str] = mapped_column(String(64))

    # What was asked for.
    spec: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(Integer)
    model_sha256: Mapped[str] = mapped_column(String(64))
    client_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", JSON())

    # How it goes.
    attempt: Mapped[int] = mapped_column(Integer)
    memory_failures: Mapped[int] = mapped_column(Integer)
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_token: Mapped[str | None] = mapped_column(String(32))
    lease_until: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    progress: Mapped[dict[str, Any]]

    # What came out.
    verdict: Mapped[str | None] = mapped_column(String(16))
    remediation: Mapped[str | None] = mapped_column(String(16))
    report: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    output_key: Mapped[str | None] = mapped_column(String(200))
    output_sha256: Mapped[str | None] = mapped_column(String(64))
    output_bytes: Mapped[int | None] = mapped_column(BigInteger)
    artefacts: Mapped[dict[str, Any] | None]  # what lies beside the output: common/artefacts.py
    # What it takes of its tenant's storage beside its uploads: an output as large as the model until
    # it ends, then what it left, until that is deleted.
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)

    __table_args__ = (
        Index("ix_jobs_queue", "state", "priority", "created_at"),
        Index("ix_jobs_tenant", "tenant", "created_at", "id"),
        Index("ix_jobs_model", "tenant", "model_sha256"),
        Index("ix_jobs_expiry", "expires_at"),
        Index(
            "ix_jobs_stored",
            "tenant",
            "stored_bytes",
            postgresql_where=text("stored_bytes > 0"),
            sqlite_where=text("stored_bytes > 0"),
        ),
    )

    @classmethod
    def holds_something(cls) -> ColumnElement[bool]:
        """Return the condition of ``ix_jobs_stored``, word for word: else it would not be used."""
        return cls.stored_bytes > literal_column("0", Integer)


class JobBlob(Base):
    """A stored file that an unfinished job needs."""

    __tablename__ = "job_blobs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    role: Mapped[str] = mapped_column(String(16), primary_key=True)
    blob_key: Mapped[str] = mapped_column(String(200), index=True)


class Blob(Base):
    """A stored upload; ``touched_at`` keeps the sweep away while a request is about to use it."""

    __tablename__ = "blobs"

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    touched_at: Mapped[datetime] = mapped_column(index=True)

    __table_args__ = (Index("ix_blobs_tenant", "tenant", "bytes"),)


class IdempotencyKey(Base):
    """Which job a tenant's ``Idempotency-Key`` made, and from what."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    token: Mapped[str] = mapped_column(String(32), primary_key=True)  # its family
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(index=True)


class Token(Base):
    """A bearer token; only the hash of its secret is kept."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str] = mapped_column(String(64))
    secret_sha256: Mapped[bytes] = mapped_column(LargeBinary(32))
    scopes: Mapped[str] = mapped_column(String(64))  # words with a space between them (RFC 6750)
    family: Mapped[str] = mapped_column(String(32))  # the first token that this one goes back to
    replaced_by: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]  # to the minute


class RequestBudget(Base):
    """
    How many requests a tenant has made of late, in one moment (the generic cell rate algorithm).

    Each request moves ``spent_until`` on by the time that it takes to earn one; a moment that has
    passed says that nothing is spent.
    """

    __tablename__ = "request_budgets"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    spent_until: Mapped[datetime]


class Worker(Base):
    """A worker process and when it was last heard of."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    device: Mapped[str] = mapped_column(String(64))
    versions: Mapped[dict[str, Any]]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    problem: Mapped[str | None] = mapped_column(Text)
    sandbox: Mapped[dict[str, Any] | None]  # each wall of its jobs' jail; None before it was tried


class AnnouncedArchitecture(Base):
    """An architecture that a worker can build beside the built-in ones, and when it last said so."""

    __tablename__ = "architectures"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    description: Mapped[str] = mapped_column(String(300))
    announced_at: Mapped[datetime]


def is_postgres(session: Session) -> bool:
    """Return whether *session* talks to Postgres."""
    return session.get_bind().dialect.name == "postgresql"


class Database:
    """
    One database, SQLite or Postgres.

    Law: a ``write()`` block sees no change by anybody else to what it has written, and everything it
    wrote becomes visible at once when it ends, or not at all when it raises.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        self._read = sessionmaker(self.engine, expire_on_commit=False)
        self._write = sessionmaker(
            self.engine.execution_options(weightwash_write=True), expire_on_commit=False
        )

    @property
    def is_sqlite(self) -> bool:
        """Whether this is a SQLite file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that only reads."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that commits when the block ends and rolls back when it raises."""
        with self._write.begin() as session:
            yield session

    @contextmanager
    def connect_to_write(self) -> Iterator[Connection]:
        """Open a bare connection in a transaction of its own, for the migrations."""
        with self.engine.execution_options(weightwash_write=True).begin() as connection:
            yield connection

    def check(self) -> None:
        """Ask the database for a sign of life; whatever it raises says what is wrong."""
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def _engine(url: str) -> Engine:
    if make_url(url).get_backend_name() == "sqlite":
        return _sqlite_engine(url)
    return create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        hide_parameters=True,  # an error that is logged would quote them: names, metadata, hashes
    )


_WAIT_SECONDS = 30
"""How long a connection to SQLite waits for another's write."""


def _sqlite_engine(url: str) -> Engine:
    if file := make_url(url).database:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    # As many connections as the service has threads; each is only a file handle.
    engine = create_engine(
        url, connect_args={"timeout": _WAIT_SECONDS}, pool_size=40, hide_parameters=True
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        # The driver's own transactions start late, at the first write, where two writers can only
        # collide; SQLAlchemy's "begin" below starts them instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        _use_write_ahead_log(cursor)
        cursor.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("weightwash_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_write_ahead_log(cursor: DBAPICursor) -> None:
    """
    Put a new file into write-ahead mode; one that is in it stays so.

    Of two processes that meet here SQLite refuses one at once, without the wait that it grants
    elsewhere: both hold the lock for reading and want the one for writing.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            kind = error.sqlite_errorcode & 0xFF  # the rest of the code says why
            if kind != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
