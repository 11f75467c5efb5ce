"""Jobs of others and jobs that never were are answered alike, to the byte."""

from tests.service.conftest import Service
from tests.service.forms import model_pt
from tests.service.test_edge import GUARDED

NEVER = "job_" + "0" * 24
ROUTES = [route for route in GUARDED if "{job_id}" in route[1]]


def asked(service: Service, method: str, path: str, job_id: str, token: dict[str, str]) -> bytes:
    """Return the whole answer as bytes, without what is its own: the id asked for and the request's."""
    answer = service.client.request(method, path.format(job_id=job_id, number=0), headers=token)
    assert answer.status_code == 404
    head = sorted((name.lower(), value) for name, value in answer.headers.items())
    whole = repr((answer.status_code, head)).encode() + answer.content
    own = answer.headers["x-request-id"]
    return whole.replace(own.encode(), b"REQUEST").replace(job_id.encode(), b"JOB")


def test_foreign_job_is_answered_as_none(guarded: Service) -> None:
    """Status, headers and text are equal for another's queued, done and deleted job, and for none."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    queued, done, deleted = (guarded.job(headers=acme) for _ in range(3))
    guarded.finish(done, model_pt())
    guarded.finish(deleted, model_pt())
    guarded.client.delete(f"/jobs/{deleted}", headers=acme)
    for method, path in ROUTES:
        expected = asked(guarded, method, path, NEVER, rival)
        for job_id in (queued, done, deleted):
            assert asked(guarded, method, path, job_id, rival) == expected, (method, path)


def test_cursor_of_another_is_answered_as_none(guarded: Service) -> None:
    """A list that starts behind another's job starts nowhere, as behind one that never was."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    job_id = guarded.job(headers=acme)
    path = "/jobs?after={job_id}"
    assert asked(guarded, "GET", path, job_id, rival) == asked(guarded, "GET", path, NEVER, rival)
