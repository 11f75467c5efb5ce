"""A running service without a worker, and what the tests ask of it again and again."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2 as httpx
import pytest
import structlog
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient

from common import differences, jobs
from common.artefacts import Artefact, candidate_name
from common.blobs import BlobStore, artefact_key, output_key
from common.db import Blob, Database, IdempotencyKey, Job, JobBlob
from common.errors import Problem
from common.jobs import Lease, Outcome
from common.settings import Auth, Settings
from migrations.migrate import upgrade
from service import auth
from service.app import create_app
from service.auth import EVERY_SCOPE, Scope
from service.context import Context
from tests.service.forms import Change, content_type, encoded, parts

PROBLEM_MEMBERS = {
    "type", "title", "status", "detail", "instance", "code", "hint", "request_id",
}  # fmt: skip
REPORT = {"metrics": {"before": {"accuracy": 0.9}, "after": {"accuracy": 0.89}}}


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service, from outside (``client``) and from inside."""

    app: FastAPI
    client: TestClient
    settings: Settings
    database: Database

    # From outside

    def post(
        self,
        to: str = "/jobs",
        /,
        *,
        headers: dict[str, str] | None = None,
        **changes: Change,
    ) -> httpx.Response:
        """Post an honest form with *changes*."""
        answer: httpx.Response = self.client.post(
            to,
            content=encoded(parts(**changes)),
            headers={**content_type(), **(headers or {})},
        )
        return answer

    def job(self, *, headers: dict[str, str] | None = None, **changes: Change) -> str:
        """Post an honest form with *changes* and return the job's id."""
        answer = self.post(headers=headers, **changes)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    # From inside

    @property
    def context(self) -> Context:
        """What the endpoints work with."""
        found = self.app.state.context
        assert isinstance(found, Context)
        return found

    @contextmanager
    def with_store(self, store: BlobStore) -> Iterator[None]:
        """Put another store in the place of the service's own."""
        own = self.context
        self.app.state.context = replace(own, store=store)
        try:
            yield
        finally:
            self.app.state.context = own

    def token(
        self,
        tenant: str,
        *,
        name: str | None = None,
        scopes: Iterable[Scope] = EVERY_SCOPE,
        expires_in_seconds: float | None = None,
    ) -> dict[str, str]:
        """Make a token of *tenant* and return the header that shows it."""
        with self.database.write() as session:
            token = auth.create_token(
                session,
                name or tenant,
                tenant=tenant,
                scopes=scopes,
                expires_in_seconds=expires_in_seconds,
            )
        return {"Authorization": f"Bearer {token}"}

    def claim(self, job_id: str) -> Lease:
        """Take a queued job, as a worker does."""
        with self.database.write() as session:
            lease = jobs.claim(session, worker="test", lease_seconds=600, job_id=job_id)
        assert lease is not None
        return lease

    def finish(
        self,
        job_id: str,
        model: bytes,
        *,
        candidates: Sequence[bytes] = (),
        beside: Mapping[str, bytes] = MappingProxyType({}),
        **outcome: Any,
    ) -> Lease:
        """Bring a queued job to its end with *model*, chosen of *candidates*, and files *beside* it."""
        lease = self.claim(job_id)
        key = output_key(job_id, lease.attempt, lease.token)
        file = self.settings.data_dir / "result.pt"
        file.write_bytes(model)
        for number, content in enumerate(candidates):
            other, changed = file.with_name("other.pt"), file.with_name("differences")
            other.write_bytes(content)
            differences.write(file, other, changed)
            other.unlink()
            self.context.store.put(artefact_key(key, candidate_name(number)), changed)
        for name, content in beside.items():
            (file.parent / name).write_bytes(content)
            self.context.store.put(artefact_key(key, name), file.parent / name)
        self.context.store.put(key, file)
        given: dict[str, Any] = {
            "verdict": "backdoored",
            "remediation": "purified",
            "report": REPORT,
            "output_key": key,
            "output_sha256": hashlib.sha256(model).hexdigest(),
            "output_bytes": len(model),
            "artefacts": {
                name: Artefact(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
                for name, content in {
                    **{candidate_name(number): each for number, each in enumerate(candidates)},
                    **beside,
                }.items()
            },
        }
        with self.database.write() as session:
            jobs.finish(session, lease, Outcome(**given | outcome), retention_seconds=600)
        return lease

    def fail(self, job_id: str, problem: Problem, *, report: dict[str, Any] | None = None) -> None:
        """Bring a queued job to its end with *problem*."""
        lease = self.claim(job_id)
        with self.database.write() as session:
            jobs.fail(session, lease, problem, retention_seconds=600, report=report)

    def left_behind(self) -> list[str]:
        """Return every row and file that a request left: what a refused one must not do."""
        with self.database.read() as session:
            rows = [
                f"{keys[0].class_.__tablename__} row {row}"
                for keys in (
                    (Job.id,),
                    (JobBlob.job_id, JobBlob.role),
                    (Blob.key,),
                    (IdempotencyKey.job_id, IdempotencyKey.key),
                )
                for row in session.execute(select(*keys))
            ]
        blobs = [p for p in (self.settings.data_dir / "blobs").rglob("*") if p.is_file()]
        own = self.context.uploads
        uploads = [p for p in self.settings.upload_dir.rglob("*") if p not in {own, own / ".lock"}]
        return rows + [str(path.relative_to(self.settings.data_dir)) for path in (*blobs, *uploads)]


def problem_of(
    answer: httpx.Response, status: int, code: str, *, instance: str = "/jobs"
) -> dict[str, Any]:
    """Check that *answer* is a whole problem document, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.text.endswith("}\n")
    problem: dict[str, Any] = answer.json()
    assert set(problem) == PROBLEM_MEMBERS
    assert problem["code"] == code, problem
    assert problem["type"] == f"urn:weightwash:problem:{code}"
    assert problem["status"] == status
    assert problem["instance"] == instance
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    assert len(problem["detail"]) < 1000
    return problem


@contextmanager
def running(settings: Settings) -> Iterator[Service]:
    """Run the service on a migrated database."""
    database = Database(settings.resolved_database_url)
    upgrade(database)
    app = create_app(settings)
    try:
        with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
            yield Service(app=app, client=client, settings=settings, database=database)
    finally:
        database.close()


Start = Callable[..., AbstractContextManager[Service]]


@pytest.fixture
def start(tmp_path: Path, migrated: Path) -> Start:
    """Return a function that runs a service in a temporary folder with the given settings."""

    def start_service(**settings: Any) -> AbstractContextManager[Service]:
        folder = tmp_path / "var"
        folder.mkdir(exist_ok=True)
        shutil.copy(migrated, folder / "weightwash.db")
        return running(Settings(data_dir=folder, embedded_workers=0, **settings))

    return start_service


@pytest.fixture(autouse=True, scope="package")
def quiet_logs() -> Iterator[None]:
    """Log warnings only, as JSON: a coloured traceback of a bug takes seconds to lay out."""
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty, migrated SQLite file, to be copied: a copy is faster than a migration."""
    path = tmp_path_factory.mktemp("migrated") / "weightwash.db"
    database = Database(f"sqlite:///{path}")
    upgrade(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture
def service(start: Start) -> Iterator[Service]:
    """Run the service as it is without any settings."""
    with start() as found:
        yield found


@pytest.fixture
def guarded(start: Start) -> Iterator[Service]:
    """Run the service with tokens."""
    with start(auth=Auth.TOKENS) as found:
        yield found
