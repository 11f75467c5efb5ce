"""The edge of the service: who is let in, and what every answer carries."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import update

from common.blobs import FileBlobStore
from common.db import Token, now
from service import auth
from service.endpoints import about, jobs, results
from tests.service.conftest import Service, problem_of
from tests.service.forms import content_type, model_pt

BASE = "http://127.0.0.1"
OPEN = {"/architectures", "/methods", "/healthz", "/readyz", "/openapi.json"}


def routes() -> Iterator[tuple[str, str]]:
    """Return every verb and path that the service answers, from its own tables."""
    for module in (jobs, results, about):
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            for method in sorted(route.methods or ()):
                yield method, route.path


ROUTES = sorted(routes())
GUARDED = [route for route in ROUTES if route[1] not in OPEN]


def request(
    service: Service, method: str, path: str, headers: dict[str, str] | None = None
) -> httpx.Response:
    """Send a request that would be in order but for what the test changes."""
    if method == "POST" and path == "/jobs":
        return service.post(headers=headers)
    answer: httpx.Response = service.client.request(method, path, headers=headers)
    return answer


def test_every_route_is_in_the_tables(service: Service) -> None:
    """The tables that these tests go through name every route of the application."""
    documented = {
        (method.upper(), path)
        for path, methods in service.app.openapi()["paths"].items()
        for method in methods
    }
    assert documented <= set(ROUTES)
    assert {path for _, path in ROUTES} == {path for _, path in documented} | {"/openapi.json"}


# Every answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nothing"), ("PUT", "/jobs")])
def test_every_answer_carries_its_headers(service: Service, method: str, path: str) -> None:
    """Whatever is answered has a request id of its own and the security headers."""
    ids = set()
    for _ in range(2):
        answer = request(service, method, path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in answer.headers
        ids.add(answer.headers["x-request-id"])
        assert method == "HEAD" or not answer.content or answer.content.endswith(b"\n")
    assert len(ids) == 2


def test_request_id_of_the_client_is_not_taken_over(service: Service) -> None:
    """A client cannot choose an id that it could later be confused by."""
    answer = service.client.get("/healthz", headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"].startswith("req_")


class BrokenStore(FileBlobStore):
    """A store with a bug."""

    def put(self, key: str, path: Any) -> None:
        """Fail as no store should."""
        raise ZeroDivisionError("secret detail")


def test_bug_is_answered_like_any_problem(service: Service) -> None:
    """A bug is a 500 with a request id and without a word of what went wrong inside."""
    with service.with_store(BrokenStore(service.settings.data_dir / "blobs")):
        answer = service.post()
    problem = problem_of(answer, 500, "internal-error")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "request id" in problem["hint"]
    service.job()


def test_database_that_is_away_is_503(service: Service) -> None:
    """Without its database the service says so, and says when to come back."""
    with service.database.connect_to_write() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO jobs_away")
    try:
        answer = service.client.get("/jobs")
        problem_of(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
        ready = service.client.get("/readyz")
        assert ready.status_code == 503
    finally:
        with service.database.connect_to_write() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs_away RENAME TO jobs")


@pytest.mark.parametrize("path", ["/nothing", "/jobs/", "/jobs/a/b/c", "/jobs/a/model/", "//"])
def test_unknown_path_is_404(service: Service, path: str) -> None:
    """What is not served is a problem like any other."""
    answer = service.client.get(f"{BASE}{path}")
    problem_of(answer, 404, "not-found", instance=path)


@pytest.mark.parametrize(
    ("method", "path", "verbs"),
    [
        ("PUT", "/jobs", {"GET", "POST"}),
        ("PATCH", "/jobs/job_0", {"GET", "DELETE"}),
        ("GET", "/jobs/job_0/cancel", {"POST"}),
        ("POST", "/jobs/job_0/model", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET"}),
        ("OPTIONS", "/jobs", {"GET", "POST"}),
    ],
)
def test_wrong_verb_is_405_and_names_the_right_ones(
    service: Service, method: str, path: str, verbs: set[str]
) -> None:
    """``Allow`` lists every verb of the address."""
    answer = service.client.request(method, path)
    problem_of(answer, 405, "method-not-allowed", instance=path)
    assert set(answer.headers["allow"].split(", ")) == verbs


@pytest.mark.parametrize(
    "query",
    [
        "state=done", "state=", "verdict=bad", "sha256=abc", "sha256=" + "A" * 64, "limit=0",
        "limit=101", "limit=x", "limit=1.5", "limit=" + "9" * 5000,
    ],
)  # fmt: skip
def test_invalid_query_is_422(service: Service, query: str) -> None:
    """A filter that cannot match is refused, not ignored."""
    problem = problem_of(service.client.get(f"/jobs?{query}"), 422, "invalid-field")
    assert query.partition("=")[0] in problem["detail"]


@pytest.mark.parametrize("query", ["wait=-1", "wait=x", "wait=1.5", "dry_run=maybe"])
def test_invalid_query_of_a_post_is_422(service: Service, query: str) -> None:
    """A query that cannot be read is refused before a job comes of it."""
    problem_of(service.post(f"/jobs?{query}"), 422, "invalid-field")
    assert service.left_behind() == []


# Without tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8000"]
)
def test_loopback_host_is_served(service: Service, host: str) -> None:
    """The names of the loopback interface are served, with any port."""
    assert service.client.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "", "example.org", "127.0.0.1.example.org", "127.0.0.2", "0.0.0.0", "localhost.", "[::2]",
        "localhost:80@example.org", "example.org:80", "127.0.0.1,example.org", "[::1", "169.254.1.1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/jobs", "/healthz", "/nothing"])
def test_foreign_host_is_421(service: Service, host: str, path: str) -> None:
    """A name that somebody pointed at 127.0.0.1 is not served."""
    answer = service.client.get(path, headers={"Host": host})
    problem_of(answer, 421, "host-not-allowed", instance=path)
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://example.org"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1.example.org"},
        {"Origin": "http://[::1"},
        {"Origin": "127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": BASE, "Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_foreign_page_is_403(service: Service, headers: dict[str, str]) -> None:
    """A web page of another origin can neither read nor make jobs."""
    problem_of(service.client.get("/jobs", headers=headers), 403, "origin-not-allowed")
    problem_of(service.post(headers=headers), 403, "origin-not-allowed")
    assert service.left_behind() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": BASE},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:8000", "Host": "localhost:8000"},
    ],
    ids=str,
)
def test_own_page_is_served(service: Service, headers: dict[str, str]) -> None:
    """A page that the service serves itself may use it."""
    assert service.client.get("/jobs", headers=headers).status_code == 200


# With tokens ---------------------------------------------------------------------------------------


def bad_tokens(service: Service) -> dict[str, dict[str, str]]:
    """Return headers that prove nobody, by what is wrong with them."""
    live, revoked = service.token("acme"), service.token("acme")
    expired = service.token("acme", name="expired", expires_in_seconds=600)
    with service.database.write() as session:
        auth.revoke_token(session, revoked["Authorization"].split("_")[1])
        session.execute(update(Token).where(Token.name == "expired").values(expires_at=now(-1)))
    value = live["Authorization"]
    last = "0" if value[-1] != "0" else "1"
    return {
        "missing": {},
        "garbage": {"Authorization": "Bearer xyz"},
        "another scheme": {"Authorization": value.replace("Bearer", "Basic")},
        "unknown": {"Authorization": f"Bearer ww_{'0' * 16}_{'0' * 64}"},
        "wrong secret": {"Authorization": value[:-1] + last},
        "revoked": revoked,
        "expired": expired,
    }


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_request_without_a_live_token_is_401(guarded: Service, method: str, path: str) -> None:
    """Every way to be nobody gets one answer, which says nothing of the reason."""
    bodies = set()
    for headers in bad_tokens(guarded).values():
        answer = request(guarded, method, path, headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        if method != "HEAD":
            problem = problem_of(answer, 401, "unauthorised", instance=path)
            bodies.add(json.dumps({**problem, "request_id": ""}))
    assert len(bodies) == (method != "HEAD")
    assert guarded.left_behind() == []


@pytest.mark.parametrize("path", sorted(OPEN))
def test_what_holds_no_secret_needs_no_token(guarded: Service, path: str) -> None:
    """What anybody may know can be asked by anybody."""
    assert guarded.client.get(path).status_code in {200, 503}


def test_host_is_free_with_tokens(guarded: Service) -> None:
    """With tokens the service may be reached under any name."""
    token = guarded.token("acme")
    headers = {**token, "Host": "wash.example.org", "Origin": "https://example.org"}
    assert guarded.client.get("/jobs", headers=headers).status_code == 200


def test_body_is_not_read_before_the_token(guarded: Service) -> None:
    """Whoever has no token cannot make the service read a byte."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/jobs", "raw_path": b"/jobs", "root_path": "",
        "query_string": b"dry_run=perhaps", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [
            (name.lower().encode(), value.encode())
            for name, value in {"Content-Length": "1000", **content_type()}.items()
        ],
    }  # fmt: skip
    asyncio.run(guarded.app(scope, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(("method", "path"), [r for r in GUARDED if "{job_id}" in r[1]])
def test_job_of_another_tenant_does_not_exist(guarded: Service, method: str, path: str) -> None:
    """Another tenant's job is a 404, as one that never was, and nothing happens to it."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    queued, done = guarded.job(headers=acme), guarded.job(headers=acme)
    guarded.finish(done, model_pt())
    for job_id in (queued, done):
        before = guarded.client.get(f"/jobs/{job_id}", headers=acme).json()
        theirs = request(guarded, method, path.format(job_id=job_id, number=0), rival)
        nobody = path.format(job_id="job_" + "0" * 24, number=0)
        nobodys = request(guarded, method, nobody, rival)
        assert theirs.status_code == nobodys.status_code == 404
        if method != "HEAD":
            stripped = [
                {**answer.json(), "request_id": "", "detail": "", "instance": ""}
                for answer in (theirs, nobodys)
            ]
            assert stripped[0] == stripped[1]
        assert guarded.client.get(f"/jobs/{job_id}", headers=acme).json() == before


def test_lists_and_keys_are_a_tenants_own(guarded: Service) -> None:
    """Neither list, nor cursor, nor idempotency key reaches across tenants."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    key = {"Idempotency-Key": "k"}
    job_id = guarded.job(headers=acme | key)
    assert guarded.client.get("/jobs", headers=rival).json()["data"] == []
    cursor = guarded.client.get(f"/jobs?after={job_id}", headers=rival)
    problem_of(cursor, 404, "not-found")
    assert guarded.job(headers=rival | key) != job_id
    other = guarded.token("acme", name="other")  # keys belong to a token, jobs to a tenant
    assert guarded.client.get(f"/jobs/{job_id}", headers=other).status_code == 200
    assert guarded.job(headers=other | key) != job_id


def test_files_of_two_tenants_are_kept_apart(guarded: Service) -> None:
    """Equal bytes of two tenants are two blobs: nobody learns what another one has."""
    guarded.job(headers=guarded.token("acme"))
    guarded.job(headers=guarded.token("rival"))
    keys = list(guarded.context.store.keys("uploads"))
    assert sorted({key.split("/")[1] for key in keys}) == ["acme", "rival"]
    assert len(keys) == 4


def test_one_tenant_does_not_use_up_anothers_quota(start: Any) -> None:
    """The quota is a tenant's own."""
    with start(auth="tokens", max_active_jobs=1) as service:
        acme = service.token("acme")
        service.job(headers=acme)
        problem_of(service.post(headers=acme), 429, "quota-exceeded")
        service.job(headers=service.token("rival"))
