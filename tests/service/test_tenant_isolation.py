"""Another tenant's ids open nothing: every route is tried, whichever there are."""

import hashlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx2 as httpx
import pytest
from sqlalchemy import select

from common import retention
from common.db import Base, Database, Token
from common.errors import DamagedFile
from service.auth import EVERY_SCOPE
from tests.service.conftest import Service, Start
from tests.service.forms import model_pt
from tests.service.routes import PUBLIC, Route, guarded_routes

KEY = {"Idempotency-Key": "acmes-own"}
UNKNOWN = "job_" + "0" * 24
BESIDE = {"triggers.npz": b"arrays", "trigger-0.png": b"picture"}

# What a request can name. Whoever adds a route with something else says here what another tenant
# would put in its place; until then these tests fail.
PATH_PARAMETERS = {"job_id": None, "number": "0"}
QUERIES: dict[str, list[str]] = {
    "candidate": ["0"],
    "wait": ["0"],
    "format": ["pt"],
    "dry_run": ["true"],
    "state": ["succeeded"],
    "verdict": ["backdoored"],
    "limit": ["100"],
    "sha256": [hashlib.sha256(model_pt()).hexdigest()],
    "after": [],  # a job's id: filled in below
}


@pytest.fixture
def isolated(start: Start, database: Database) -> Iterator[Service]:
    """Run the service with tokens, once on SQLite and once on Postgres, without a sweep of its own."""
    with start(auth="tokens", database_url=database.url, sweep_seconds=3600.0) as found:
        yield found


def jobs_of(service: Service, headers: dict[str, str]) -> dict[str, str]:
    """Make a job in every state that a job can be in, and return their ids."""
    made = {
        state: service.job(headers=headers, seed=str(seed))
        for seed, state in enumerate(["running", "done", "failed", "cancelled", "purged"])
    }
    made["queued"] = service.job(headers=headers | KEY)
    service.claim(made["running"])
    for state in ("done", "purged"):
        service.finish(made[state], b"weights", candidates=[b"another", b"weights"], beside=BESIDE)
    service.fail(made["failed"], DamagedFile())
    for verb, state, end in (("POST", "cancelled", "/cancel"), ("DELETE", "purged", "")):
        answer = service.client.request(verb, f"/jobs/{made[state]}{end}", headers=headers)
        assert answer.is_success
    with service.database.write() as session:
        assert retention.sweep_expired(session, service.context.store) == 1
    return made


def everything(service: Service, *, tenant: str | None = None) -> dict[str, Any]:
    """Return every row and every stored file, of one tenant where rows have one."""
    found: dict[str, Any] = {}
    with service.database.read() as session:
        for table in Base.metadata.sorted_tables:
            # A request is counted, and its token's last use noted; nothing else may happen.
            if table.name == "request_budgets":
                continue
            columns = [column for column in table.c if column is not Token.__table__.c.last_used_at]
            query = select(*columns)
            if tenant is not None and "tenant" in table.c:
                query = query.where(table.c.tenant == tenant)
            found[table.name] = sorted(repr(row) for row in session.execute(query))
    if tenant is not None:
        found.pop("job_blobs")  # names its tenant by its job alone
    folder = service.settings.data_dir / "blobs"
    found["files"] = {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (tenant is None or path.parent.name == tenant)
    }
    return found


def requests(route: Route, job_id: str) -> list[str]:
    """Return every address of *route* that names *job_id*, with each of its queries and without."""
    unknown = (route.path_parameters - set(PATH_PARAMETERS)) | (route.queries - set(QUERIES))
    assert not unknown, f"{route}: what would another tenant put into {sorted(unknown)}?"
    path = route.path.format(**{**PATH_PARAMETERS, "job_id": job_id})
    queries = [
        f"?{name}={value}"
        for name in sorted(route.queries)
        for value in ([job_id] if name == "after" else QUERIES[name])
    ]
    if "job_id" in route.path_parameters:
        return [path, *(path + query for query in queries)]
    return [path + query for query in queries if job_id in query]


def alike(answer: httpx.Response, job_id: str) -> tuple[int, list[tuple[str, str]], str]:
    """Return all of an answer but what must differ: the id that was asked for, and the request's."""
    own = answer.headers["x-request-id"]
    headers = [(name, value.replace(own, "R")) for name, value in sorted(answer.headers.items())]
    return answer.status_code, headers, answer.text.replace(own, "R").replace(job_id, "J")


def test_another_tenants_ids_are_404_everywhere_and_change_nothing(isolated: Service) -> None:
    """
    Whatever route, state and query: another tenant's id answers as one that never was, byte for byte.

    Not a row and not a file is changed by it. For its own tenant each of these addresses exists. The
    token that tries has every scope: scopes are within a tenant.
    """
    acme, rival = isolated.token("acme"), isolated.token("rival", scopes=EVERY_SCOPE)
    theirs = jobs_of(isolated, acme)
    tried: set[str] = set()
    before = everything(isolated)
    routes = guarded_routes(isolated.app)
    for route, (state, job_id) in product(routes, theirs.items()):
        for foreign, unknown in zip(requests(route, job_id), requests(route, UNKNOWN), strict=True):
            answers = [
                isolated.client.request(route.method, address, headers=rival)
                for address in (foreign, unknown)
            ]
            where = f"{route.method} {foreign} ({state})"
            assert answers[0].status_code == 404, where
            assert alike(answers[0], job_id) == alike(answers[1], UNKNOWN), where
            tried.add(str(route))
        assert everything(isolated) == before, f"{route} ({state})"
    # What names no id has a test of its own below.
    assert {str(route) for route in routes} - tried == {"POST /jobs"}

    for route in routes:  # the verbs that change something come last
        if str(route) in tried:
            own = [
                isolated.client.request(route.method, address, headers=acme).status_code
                for job_id in theirs.values()
                for address in requests(route, job_id)
            ]
            assert set(own) != {404}, route
    assert everything(isolated) != before


def test_lists_and_idempotency_keys_of_another_tenant_are_empty(isolated: Service) -> None:
    """A list holds nothing of another tenant's, and its key is a fresh one, which replays nothing."""
    acme, rival = isolated.token("acme"), isolated.token("rival")
    theirs = jobs_of(isolated, acme)
    before = everything(isolated, tenant="acme")
    filters = [f"?{name}={value}" for name, values in QUERIES.items() for value in values]
    for query in ["", *filters]:
        assert isolated.client.get(f"/jobs{query}", headers=rival).json().get("data") == []
    answer = isolated.post(headers=rival | KEY)
    assert answer.status_code == 202
    assert "idempotent-replayed" not in answer.headers
    assert answer.json()["id"] not in theirs.values()
    mismatched = isolated.post(headers=isolated.token("third") | KEY, seed="7")
    assert mismatched.status_code == 202
    assert everything(isolated, tenant="acme") == before
    again = isolated.post(headers=acme | KEY)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == theirs["queued"]


def test_what_is_public_is_the_same_for_everybody(guarded: Service) -> None:
    """What needs no token answers alike with a tenant's token, with another's and with none."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    guarded.job(headers=acme)
    for path in sorted(PUBLIC):
        bodies = {
            guarded.client.get(path, headers=headers).content for headers in (acme, rival, {})
        }
        assert len(bodies) == 1, path
