"""GET /readyz says whether jobs are worked on, and behind which walls."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common import workers
from common.db import Database
from common.settings import Settings
from tests.service.conftest import Service, running

HOLDS = {"landlock": "holds", "seccomp": "holds"}
LEAKS = {"landlock": "holds", "seccomp": "leaks: fork"}


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Iterator[Service]:
    """Run the service on SQLite and on Postgres."""
    settings = Settings(data_dir=tmp_path / "var", database_url=database.url, embedded_workers=0)
    with running(settings) as found:
        yield found


def show(
    service: Service,
    name: str,
    *,
    problem: str | None = None,
    sandbox: dict[str, str] | None = None,
) -> None:
    """Show a sign of life as a worker does."""
    with service.database.write() as session:
        workers.announce(session, name, device="cpu", versions={})
        workers.touch(session, name, problem=problem, sandbox=sandbox)


def test_no_worker_is_not_ready(service: Service) -> None:
    """Without a worker jobs are accepted and not worked on."""
    answer = service.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["workers"] == []


def test_every_wall_of_every_worker_is_shown(service: Service) -> None:
    """Each worker is listed with its walls; one that has not tried them yet says nothing of them."""
    show(service, "one", sandbox=HOLDS)
    show(service, "two")
    answer = service.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["workers"] == [
        {"name": "one", "device": "cpu", "problem": None, "sandbox": HOLDS},
        {"name": "two", "device": "cpu", "problem": None, "sandbox": None},
    ]


def test_worker_whose_sandbox_leaks_is_not_ready(service: Service) -> None:
    """A worker that refuses jobs makes nothing ready; another one that takes them does."""
    show(service, "leaky", problem="the sandbox leaks: fork", sandbox=LEAKS)
    answer = service.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"]["worker"] == {"ok": False, "detail": "the sandbox leaks: fork"}
    show(service, "tight", sandbox=HOLDS)
    answer = service.client.get("/readyz")
    assert answer.status_code == 200
    assert [worker["sandbox"] for worker in answer.json()["workers"]] == [LEAKS, HOLDS]
