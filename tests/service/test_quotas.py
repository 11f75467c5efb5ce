"""A tenant that has had its share is told so before its upload is read, and told when to come back."""

from collections.abc import Iterator

import pytest
from sqlalchemy import update

from common.db import RequestBudget, now
from tests.service.conftest import Service, Start, problem_of
from tests.service.forms import content_type, encoded, model_pt, parts, samples_npz

KEY = {"Idempotency-Key": "k"}
NO_FORM = b"x" * 64

UPLOADS = len(model_pt()) + len(samples_npz())
BODY = len(encoded(parts(seed="0")))


def streamed(body: bytes) -> Iterator[bytes]:
    """Send *body* without announcing its length."""
    yield body


# Stored bytes --------------------------------------------------------------------------------------


def test_upload_that_cannot_fit_is_507_before_it_is_read(start: Start) -> None:
    """The announced length alone decides: the body, which is no form, is not looked at."""
    with start(max_stored_bytes=63) as service:
        answer = service.client.post("/jobs", content=NO_FORM, headers=content_type())
        problem = problem_of(answer, 507, "insufficient-storage")
        assert "DELETE /jobs/{id}" in problem["hint"]
        assert "retry-after" not in answer.headers
        assert "63" in problem["detail"]
    with start(max_stored_bytes=64) as service:
        problem_of(
            service.client.post("/jobs", content=NO_FORM, headers=content_type()),
            400,
            "not-multipart",
        )


def test_job_counts_with_its_result_before_it_is_accepted(start: Start) -> None:
    """A form that fits through the door is refused when its files and its result together do not."""
    room = UPLOADS + len(model_pt())
    assert room > BODY  # the door lets it through
    with start(max_stored_bytes=room - 1) as service:
        problem_of(service.post(), 507, "insufficient-storage")
        assert service.left_behind() == []
    with start(max_stored_bytes=room) as service:
        service.job()


def test_chunked_upload_is_counted_when_it_is_there(start: Start) -> None:
    """Who announces no length gets no further."""
    with start(max_stored_bytes=UPLOADS) as service:
        answer = service.client.post(
            "/jobs", content=streamed(encoded(parts())), headers=content_type()
        )
        problem_of(answer, 507, "insufficient-storage")
        assert service.left_behind() == []


def test_full_storage_refuses_nothing_that_stores_nothing(start: Start) -> None:
    """A repeated request, a dry run and every look at a job are answered as ever."""
    with start(max_stored_bytes=UPLOADS + len(model_pt())) as service:
        job_id = service.post(headers=KEY).json()["id"]
        problem_of(service.post(), 507, "insufficient-storage")
        assert service.post(headers=KEY).json()["id"] == job_id
        assert service.post("/jobs?dry_run=true").status_code == 200
        assert service.client.get(f"/jobs/{job_id}").status_code == 200


def test_one_tenants_files_take_no_room_from_another(start: Start) -> None:
    """Each tenant has room of its own, for the same bytes too."""
    with start(auth="tokens", max_stored_bytes=UPLOADS + len(model_pt())) as service:
        acme = service.token("acme")
        service.job(headers=acme)
        problem_of(service.post(headers=acme), 507, "insufficient-storage")
        service.job(headers=service.token("rival"))


# Requests ------------------------------------------------------------------------------------------


def use_up(service: Service, headers: dict[str, str], *, seconds: float = 3600) -> None:
    """Spend all that a tenant may spend for *seconds*; its process has nothing left either."""
    with service.database.write() as session:
        session.execute(update(RequestBudget).values(spent_until=now(60 + seconds)))
    while service.client.get("/jobs", headers=headers).status_code != 429:
        pass


def test_too_many_requests_are_429_with_the_time_to_come_back(start: Start) -> None:
    """Every guarded address says so, with the seconds to wait; what is public goes on answering."""
    with start(max_requests_per_minute=60) as service:
        job_id = service.job()
        use_up(service, {})
        for path in ("/jobs", f"/jobs/{job_id}", f"/jobs/{job_id}/model"):
            answer = service.client.get(path)
            problem = problem_of(answer, 429, "too-many-requests", instance=path)
            assert 1 <= int(answer.headers["retry-after"]) <= 3601
            assert "wait=50" in problem["hint"]
        before = service.left_behind()
        problem_of(
            service.client.post("/jobs", content=NO_FORM, headers=content_type()),
            429,
            "too-many-requests",
        )
        assert service.left_behind() == before
        assert service.client.get("/healthz").status_code == 200


def test_limit_is_a_tenants_and_not_a_tokens(start: Start) -> None:
    """Two tokens of one tenant share what it has; another tenant has its own."""
    with start(auth="tokens", max_requests_per_minute=60) as service:
        first, second = service.token("acme"), service.token("acme", name="other")
        assert service.client.get("/jobs", headers=first).status_code == 200
        use_up(service, first)
        problem_of(service.client.get("/jobs", headers=second), 429, "too-many-requests")
        assert service.client.get("/jobs", headers=service.token("rival")).status_code == 200


def test_nobody_spends_without_a_live_token(start: Start) -> None:
    """Requests that prove nobody are nobody's: they use up no tenant's share."""
    with start(auth="tokens", max_requests_per_minute=1) as service:
        acme = service.token("acme")
        wrong = {"Authorization": acme["Authorization"][:-4] + "0000"}
        for _ in range(5):
            problem_of(service.client.get("/jobs", headers=wrong), 401, "unauthorised")
        assert service.client.get("/jobs", headers=acme).status_code == 200


def test_long_poll_is_one_request_however_long_it_waits(start: Start) -> None:
    """A wait looks at the job many times and is counted once."""
    with start(max_requests_per_minute=2) as service:
        job_id = service.job()
        answer = service.client.get(f"/jobs/{job_id}?wait=1")  # about ten looks
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")


@pytest.mark.parametrize("setting", ["max_stored_bytes", "max_requests_per_minute"])
def test_no_limit_refuses_nothing(start: Start, setting: str) -> None:
    """0 stands for no limit."""
    with start(**{setting: 0}) as service:
        service.job()
