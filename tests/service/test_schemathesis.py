"""
The OpenAPI document against the running service, by cases that schemathesis makes of it.

Every operation is asked, ``POST /jobs`` with its form among them: no bug answers (the only 5xx is the 503
of what is not there yet), no status, media type or header that is not documented, and no body that is not
of its schema. Two checks are left out. "Valid data is accepted" does not hold, because a well-formed form
with random bytes for a model *is* refused; neither does "invalid data is refused", because a query that
nobody reads is no error. The check that a token is asked for needs one; ``test_edge.py`` does that.
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from common import jobs
from common.blobs import blob_store, output_key
from common.errors import OutOfMemory
from common.jobs import Outcome
from tests.service.forms import model_pt, samples_npz
from tests.service.test_openapi import document
from tests.support.stack import Stack, embedded_stack

EXAMPLES = 8
NOT_YET = {"still-running", "unavailable"}


@dataclass(frozen=True)
class Served:
    """A running service with jobs in every state that has an answer of its own."""

    stack: Stack
    job_ids: tuple[str, ...]

    def submit(self) -> str:
        """Return the id of a new job."""
        return str(self.stack.submit({"model": model_pt(), "samples": samples_npz()})["id"])


def finish(stack: Stack, job_id: str, *, succeeds: bool) -> None:
    """Bring a queued job to its end, as a worker does."""
    database = stack.database
    with database.write() as session:
        lease = jobs.claim(session, worker="test", lease_seconds=600, job_id=job_id)
    assert lease is not None
    file = stack.folder / "result.pt"
    file.write_bytes(model_pt())
    key = output_key(job_id, lease.attempt, lease.token)
    blob_store((stack.folder / "var" / "blobs").resolve().as_uri()).put(key, file)
    with database.write() as session:
        if succeeds:
            outcome = Outcome(
                verdict=None,
                remediation="purified",
                report={"metrics": {"before": {}, "after": {}}},
                output_key=key,
                output_sha256=hashlib.sha256(model_pt()).hexdigest(),
                output_bytes=len(model_pt()),
            )
            jobs.finish(session, lease, outcome, retention_seconds=600)
        else:
            jobs.fail(session, lease, OutOfMemory(), retention_seconds=600, report=None)
    database.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run one service for all cases; nobody waits in it, and nobody works."""
    with embedded_stack(
        tmp_path_factory.mktemp("stack"),
        embedded_workers="0",
        max_wait_seconds="0",
        max_active_jobs="100000",
    ) as stack:
        found = Served(stack, ())
        queued, done, failed = (found.submit() for _ in range(3))
        finish(stack, done, succeeds=True)
        finish(stack, failed, succeeds=False)
        yield Served(stack, (queued, done, failed))
        log = (stack.folder / "service.log").read_text()
        assert "Traceback" not in log, log[-5000:]


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Keep one connection for all cases."""
    with requests.Session() as found:
        yield found


def more_honest(form: dict[str, Any], choice: int) -> dict[str, Any]:
    """Return *form* as it is, with honest files, or with nothing but harmless fields beside them."""
    honest = {"model": model_pt(), "samples": samples_npz()}
    match choice % 4:
        case 0:
            return form
        case 1:
            return form | honest
        case 2:
            return form | {"model": model_pt()}
        case _:
            plain = {name: form[name] for name in ("seed", "priority", "path") if name in form}
            return plain | honest


schema = schemathesis.openapi.from_dict(document())


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_documented(
    case: schemathesis.Case[Any], served: Served, session: requests.Session
) -> None:
    """Whatever is asked, the answer is one that the document promises."""
    choice = zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode())
    if "job_id" in case.path_parameters and choice % 4:
        case.path_parameters["job_id"] = (
            served.submit()
            if case.method in {"DELETE", "POST"}
            else served.job_ids[choice % len(served.job_ids)]
        )
    if case.method == "POST" and isinstance(case.body, dict):
        case.body = more_honest(case.body, choice)
    response = case.call(served.stack.url, session)
    if response.status_code >= 500:
        assert response.status_code == 503
        assert "/readyz" in case.path or response.json()["code"] in NOT_YET
    load_all_checks()
    case.validate_response(
        response,
        checks=[
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_headers_conformance,
            checks.response_schema_conformance,
            checks.unsupported_method,
            checks.allow_header_conformance,
            checks.use_after_free,
        ],
    )
