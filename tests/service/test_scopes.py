"""A token does what its scopes say, and its use is noted."""

from datetime import timedelta

import pytest
from sqlalchemy import select, update

from common.db import Token, now
from service.auth import DEFAULT_SCOPES, Scope, rotate_token
from tests.service.conftest import Service, problem_of
from tests.service.forms import model_pt
from tests.service.routes import Route, guarded_routes

# By its verb alone: looking, making or stopping, destroying.
NEEDED = {
    "GET": Scope.READ,
    "HEAD": Scope.READ,
    "PUT": Scope.SUBMIT,
    "POST": Scope.SUBMIT,
    "DELETE": Scope.ADMIN,
}


def ask(service: Service, route: Route, job_id: str, headers: dict[str, str]) -> tuple[int, str]:
    """Send a request that would be in order; return its status and what it demands."""
    if str(route) == "POST /jobs":
        answer = service.post(headers=headers)
    else:
        path = route.path.format(job_id=job_id, number=0)
        answer = service.client.request(route.method, path, headers=headers)
    if answer.status_code == 403 and route.method != "HEAD":
        problem = problem_of(answer, 403, "insufficient-scope", instance=answer.request.url.path)
        assert f"'{NEEDED[route.method]}'" in problem["detail"]
        assert problem["hint"]
    return answer.status_code, answer.headers.get("www-authenticate", "")


def test_every_route_takes_one_scope_and_no_other_will_do(guarded: Service) -> None:
    """With the scope of its verb a route answers, with the others it is 403 and nothing happens."""
    tokens = {scope: guarded.token("acme", scopes=[scope]) for scope in Scope}
    job_id = guarded.job(headers=tokens[Scope.SUBMIT])
    guarded.finish(job_id, model_pt(), beside={"triggers.npz": b"a", "trigger-0.png": b"b"})
    before = guarded.left_behind()
    routes = guarded_routes(guarded.app)
    for route in routes:
        needed = NEEDED[route.method]
        for scope in set(Scope) - {needed}:
            status, challenge = ask(guarded, route, job_id, tokens[scope])
            assert (status, challenge) == (
                403,
                f'Bearer realm="weightwash", error="insufficient_scope", scope="{needed}"',
            ), route
    assert guarded.left_behind() == before
    for route in routes:
        status, challenge = ask(guarded, route, job_id, tokens[NEEDED[route.method]])
        assert status not in {401, 403, 404}, route
        assert challenge == ""


def test_scope_is_asked_for_before_anything_is_looked_up(guarded: Service) -> None:
    """Without the scope a job that is there and one that is not answer alike."""
    job_id = guarded.job(headers=guarded.token("acme"))
    submit = guarded.token("acme", scopes=[Scope.SUBMIT])
    for asked in (job_id, "job_" + "0" * 24, "nonsense"):
        answer = guarded.client.get(f"/jobs/{asked}", headers=submit)
        problem_of(answer, 403, "insufficient-scope", instance=f"/jobs/{asked}")


def test_body_is_not_read_without_the_scope(guarded: Service) -> None:
    """A form that is none is not even looked at."""
    read = guarded.token("acme", scopes=[Scope.READ])
    answer = guarded.client.post("/jobs", content=b"no form", headers=read)
    problem_of(answer, 403, "insufficient-scope")


def test_pipeline_runs_with_the_scopes_of_a_new_token(guarded: Service) -> None:
    """What a token may do unless it is made otherwise: send, wait, fetch and cancel; not delete."""
    token = guarded.token("ci", scopes=DEFAULT_SCOPES)
    done, other = guarded.job(headers=token), guarded.job(headers=token)
    guarded.finish(done, model_pt())
    assert guarded.client.get(f"/jobs/{done}/model", headers=token).content == model_pt()
    assert guarded.client.post(f"/jobs/{other}/cancel", headers=token).status_code == 200
    assert guarded.client.delete(f"/jobs/{done}", headers=token).status_code == 403


def test_without_tokens_everything_may_be_done(service: Service) -> None:
    """On loopback, where nobody shows a token, nobody lacks a scope."""
    assert service.client.delete(f"/jobs/{service.job()}").status_code == 204


def test_last_use_is_noted_once_a_minute(guarded: Service) -> None:
    """The first request notes it, the next ones leave it alone until a minute has passed."""
    headers = guarded.token("acme")

    def noted() -> Token:
        with guarded.database.read() as session:
            return session.scalars(select(Token)).one()

    assert noted().last_used_at is None
    assert guarded.client.get("/jobs", headers=headers).status_code == 200
    first = noted().last_used_at
    assert first is not None
    # A moment ahead of the clock is younger than a minute, however slow this test is.
    with guarded.database.write() as session:
        session.execute(update(Token).values(last_used_at=now(3600)))
    ahead = noted().last_used_at
    guarded.client.get("/jobs", headers=headers)
    assert noted().last_used_at == ahead
    with guarded.database.write() as session:
        session.execute(update(Token).values(last_used_at=now(-61)))
    guarded.client.get("/jobs", headers=headers)
    again = noted().last_used_at
    assert again is not None
    assert first <= again < first + timedelta(hours=1)


def test_use_of_a_token_that_is_not_live_is_not_noted(guarded: Service) -> None:
    """A wrong secret leaves no trace at the token whose id it names."""
    headers = guarded.token("acme")
    wrong = {"Authorization": headers["Authorization"][:-4] + "0000"}
    assert guarded.client.get("/jobs", headers=wrong).status_code == 401
    with guarded.database.read() as session:
        assert session.scalars(select(Token)).one().last_used_at is None


@pytest.mark.parametrize("which", ["old", "new"])
def test_both_tokens_of_a_rotation_are_one_caller(guarded: Service, which: str) -> None:
    """A request that was sent with one token and repeated with the other makes one job."""
    old = guarded.token("acme")
    with guarded.database.write() as session:
        token = rotate_token(session, old["Authorization"].split("_")[1], overlap_seconds=3600)
    new = {"Authorization": f"Bearer {token}"}
    first, second = (old, new) if which == "old" else (new, old)
    key = {"Idempotency-Key": "k"}
    job_id = guarded.job(headers=first | key)
    again = guarded.post(headers=second | key)
    assert again.json()["id"] == job_id
    assert again.headers["idempotent-replayed"] == "true"
