"""Jobs over HTTP: create, wait, list, cancel, delete; once and once only."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, update

from common import jobs
from common.db import Blob, Database, Job, now
from tests.service.conftest import Service, Start, problem_of
from tests.service.forms import (
    BOUNDARY,
    content_type,
    encoded,
    images,
    model_pt,
    parts,
    resnet_pt,
    samples_npz,
)

BASE = "http://127.0.0.1"
STRANGE_IDS = ["job_0", "job_" + "0" * 24, "%00", "%ff", "job_%F0%9F%98%80", "x" * 3000, "' OR 1=1"]


@pytest.fixture
def service(empty_database: Database, start: Start) -> Iterator[Service]:
    """Run the service, once on SQLite and once on Postgres."""
    with start(database_url=empty_database.url) as found:
        yield found


def count(service: Service, table: Any = Job) -> int:
    """Return how many rows there are."""
    with service.database.read() as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


def test_accepted_job_is_queued_under_an_absolute_address(service: Service) -> None:
    """POST answers 202 with the job, its address and when to look again."""
    answer = service.post(metadata='{"build": 7}', seed="3", priority="5", path="models/a.pt")
    assert answer.status_code == 202
    job = answer.json()
    address = f"{BASE}/jobs/{job['id']}"
    assert answer.headers["location"] == address
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.text.endswith("}\n")
    assert job["links"] == {
        "self": address,
        "model": None,
        "model_sha256": None,
        "candidates": None,
        "triggers": None,
        "trigger_images": None,
        "report": None,
        "cancel": f"{address}/cancel",
    }
    assert job["object"] == "job"
    assert job["state"] == "queued"
    assert job["attempt"] == 0
    assert job["seed"] == 3
    assert job["priority"] == 5
    assert job["metadata"] == {"build": 7}
    assert job["request_id"] == answer.headers["x-request-id"]
    assert job["input"]["model"]["architecture_args"] == {"classes": 4, "channels": 1, "width": 4}
    assert job["input"]["samples"]["classes"] == 4
    assert job["input"]["path"] == "models/a.pt"
    assert [job[name] for name in ("verdict", "remediation", "error", "output")] == [None] * 4
    assert job["metrics"]["before"] == {
        "accuracy": None, "attack_success_rate": None, "robust_accuracy": None,
    }  # fmt: skip
    assert service.client.get(address).json() == job


def test_public_url_begins_every_link(start: Start) -> None:
    """Behind a proxy the links are those that the proxy serves."""
    with start(public_url="https://wash.example.org/api/") as service:
        answer = service.post()
        assert answer.headers["location"].startswith("https://wash.example.org/api/jobs/job_")
        assert answer.json()["links"]["self"] == answer.headers["location"]


def test_plain_text_is_the_address_alone(service: Service) -> None:
    """A shell gets what it needs in one line."""
    answer = service.post(headers={"Accept": "text/plain"})
    assert answer.status_code == 202
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == answer.headers["location"] + "\n"
    assert answer.headers["retry-after"]
    assert service.client.get(answer.text.strip()).status_code == 200


def test_dry_run_resolves_everything_and_stores_nothing(service: Service) -> None:
    """A dry run says what a job would be."""
    asked: dict[str, Any] = {"method": "awm", "params": '{"epochs": 2}', "architecture": None}
    answer = service.post("/jobs?dry_run=true", **asked)
    assert answer.status_code == 200
    found = answer.json()
    assert found["object"] == "dry_run"
    assert found["method"] == "awm"
    assert found["params"]["epochs"] == 2
    assert None not in found["params"].values()
    assert found["params"]["alpha"] == 0.99  # one sample per class, up to ten classes
    assert found["input"]["model"]["architecture"] == "small_cnn"
    assert service.left_behind() == []
    job = service.post(**asked).json()
    assert {name: job[name] for name in ("input", "method", "params", "seed")} == {
        name: found[name] for name in ("input", "method", "params", "seed")
    }


def test_architecture_is_told_by_the_state_dict(service: Service) -> None:
    """Where one built-in architecture fits it need not be named."""
    colour = samples_npz(images=images(channels=3))
    job = service.post(model=resnet_pt(), samples=colour, architecture=None).json()
    assert job["input"]["model"]["architecture"] == "resnet18_cifar"
    assert job["input"]["model"]["architecture_args"]["width"] == 4


def test_equal_files_are_stored_once(service: Service) -> None:
    """The same bytes in two jobs and two fields are one blob."""
    for _ in range(2):
        service.job(evaluation=samples_npz())
    assert count(service) == 2
    assert count(service, Blob) == 2


# Waiting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["query", "header"])
def test_wait_ends_with_the_time_or_with_the_job(service: Service, way: str) -> None:
    """A long poll answers when the time is up, or at once when the job ends."""

    def ask(job_id: str, seconds: int) -> Any:
        if way == "query":
            return service.client.get(f"/jobs/{job_id}?wait={seconds}")
        headers = {"Prefer": f"respond-async, wait={seconds}"}
        return service.client.get(f"/jobs/{job_id}", headers=headers)

    job_id = service.job()
    assert ask(job_id, 1).json()["state"] == "queued"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, job_id, 50)
        service.client.post(f"/jobs/{job_id}/cancel")
        assert waiting.result(timeout=20).json()["state"] == "cancelled"
    assert ask(job_id, 50).json()["state"] == "cancelled"


def test_bell_rings_before_the_wait(service: Service) -> None:
    """A POST that waits for the end has called a worker first."""

    class WorkersBell:
        """A bell beside a worker that is there at once."""

        def ring(self, job_id: str) -> None:
            """Do the job."""
            service.finish(job_id, model_pt())

        def is_silent(self) -> bool:
            """Never wait to be heard."""
            return True

    own = service.context
    service.app.state.context = replace(own, bell=WorkersBell())
    try:
        answer = service.post("/jobs?wait=20")
    finally:
        service.app.state.context = own
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


def test_wait_is_capped(start: Start) -> None:
    """Nobody holds a connection for longer than the operator allows."""
    with start(max_wait_seconds=0) as service:
        assert service.client.get(f"/jobs/{service.job()}?wait=999999").json()["state"] == "queued"


def test_post_that_waits_answers_200_when_the_job_has_ended(service: Service) -> None:
    """A job that ends within the wait is answered like a finished one."""
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(service.post, "/jobs?wait=50")
        while not (listed := service.client.get("/jobs").json()["data"]):
            pass
        service.client.post(f"/jobs/{listed[0]['id']}/cancel")
        answer = posting.result(timeout=20)
    assert answer.status_code == 200
    assert answer.json()["state"] == "cancelled"
    assert "retry-after" not in answer.headers
    assert answer.headers["location"].endswith(listed[0]["id"])


# Reading -------------------------------------------------------------------------------------------


def test_etag_saves_a_poll_its_body(service: Service) -> None:
    """An unchanged job is 304; a change makes another tag."""
    job_id = service.job()
    first = service.client.get(f"/jobs/{job_id}")
    tag = first.headers["etag"]
    for named in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = service.client.get(f"/jobs/{job_id}", headers={"If-None-Match": named})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == tag
        assert again.headers["x-request-id"]
    service.claim(job_id)
    after = service.client.get(f"/jobs/{job_id}", headers={"If-None-Match": tag})
    assert after.status_code == 200
    assert after.json()["state"] == "running"
    assert after.headers["etag"] != tag


def test_plain_text_is_one_line_of_progress(service: Service) -> None:
    """A terminal gets the job in one line."""
    job_id = service.job()

    def line() -> str:
        answer = service.client.get(f"/jobs/{job_id}", headers={"Accept": "text/plain"})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        return str(answer.text)

    assert line() == "queued\n"
    lease = service.claim(job_id)
    assert line() == "running 0% starting\n"
    progress = {"phase": "purify", "fraction": 0.43, "step": 9, "total": 21, "eta_seconds": 35.2}
    with service.database.write() as session:
        jobs.heartbeat(session, lease, lease_seconds=600, progress=progress)
    assert line() == "running 43% purify step 9/21 eta 35s\n"
    assert service.client.get(f"/jobs/{job_id}").json()["progress"] == progress
    with service.database.write() as session:
        jobs.stop(session, lease, retention_seconds=600)
    assert line() == "cancelled cancelled\n"


def test_unknown_job_is_404(service: Service) -> None:
    """Whatever stands for the id, a job that does not exist is a 404."""
    for job_id in STRANGE_IDS:
        for rest in ("", "/model", "/model.sha256", "/report.json"):
            answer = service.client.get(f"/jobs/{job_id}{rest}")
            problem_of(answer, 404, "not-found", instance=answer.json()["instance"])


def test_unknown_job_cannot_be_cancelled_or_deleted(service: Service) -> None:
    """The other verbs know no more jobs."""
    for method, path in (("POST", "/jobs/job_0/cancel"), ("DELETE", "/jobs/job_0")):
        problem_of(service.client.request(method, path), 404, "not-found", instance=path)


# Lists ---------------------------------------------------------------------------------------------


def test_pages_hold_every_job_once_newest_first(service: Service) -> None:
    """Following ``next`` meets every job once, in order, whatever comes in between."""
    made = [service.job(seed=str(n)) for n in range(5)]
    found: list[str] = []
    url = "/jobs?limit=2"
    while True:
        answer = service.client.get(url)
        listed = answer.json()
        assert listed["object"] == "list"
        found += [job["id"] for job in listed["data"]]
        assert listed["has_more"] == ("link" in answer.headers)
        if not listed["has_more"]:
            break
        url, _, relation = answer.headers["link"].partition(">; ")
        assert relation == 'rel="next"'
        url = url.removeprefix("<")
        assert url.startswith(f"{BASE}/jobs?")
        service.job(seed="99")  # newer than the cursor: it must not shift the pages
    assert found == made[::-1]


def test_filters_choose(service: Service) -> None:
    """State, verdict and digest choose, alone and together, on every page."""
    queued, running, done = service.job(), service.job(), service.job()
    service.claim(running)
    service.finish(done, model_pt(), verdict="clean", remediation="unchanged")
    sha256 = service.client.get(f"/jobs/{done}").json()["input"]["model"]["sha256"]

    def ids(query: str) -> list[str]:
        return [job["id"] for job in service.client.get(f"/jobs?{query}").json()["data"]]

    assert ids("state=queued") == [queued]
    assert ids("state=running") == [running]
    assert ids("state=succeeded&verdict=clean") == [done]
    assert ids("verdict=backdoored") == []
    assert ids(f"sha256={sha256}") == [done, running, queued]
    assert ids(f"sha256={'0' * 64}") == []
    following = service.client.get(f"/jobs?sha256={sha256}&limit=1").headers["link"]
    assert f"sha256={sha256}" in following


def test_unknown_cursor_is_404(service: Service) -> None:
    """A cursor that names no job has no page behind it."""
    for after in ("job_" + "0" * 24, "job_0", "", "%00"):
        problem_of(service.client.get(f"/jobs?after={after}"), 404, "not-found")


# Cancel and delete ---------------------------------------------------------------------------------


def test_queued_job_is_cancelled_at_once(service: Service) -> None:
    """Cancelling is final and can be repeated."""
    job_id = service.job()
    for _ in range(2):
        answer = service.client.post(f"/jobs/{job_id}/cancel")
        assert answer.status_code == 200
        job = answer.json()
        assert job["state"] == "cancelled"
        assert job["error"]["code"] == "cancelled"
        assert job["links"]["cancel"] is None
        assert job["finished_at"] is not None


def test_running_job_is_asked_to_stop(service: Service) -> None:
    """A running job goes on until its worker has seen the wish."""
    job_id = service.job()
    lease = service.claim(job_id)
    assert service.client.post(f"/jobs/{job_id}/cancel").json()["state"] == "running"
    with service.database.read() as session:
        assert jobs.standing(session, lease) is jobs.Standing.CANCELLED


def test_ended_job_cannot_be_cancelled(service: Service) -> None:
    """Terminal states are final."""
    job_id = service.job()
    service.finish(job_id, model_pt())
    path = f"/jobs/{job_id}/cancel"
    problem_of(service.client.post(path), 409, "already-ended", instance=path)
    assert service.client.get(f"/jobs/{job_id}").json()["state"] == "succeeded"


def test_deleted_job_keeps_its_row(service: Service) -> None:
    """DELETE takes the files and leaves the record; it can be repeated."""
    job_id = service.job()
    service.finish(job_id, model_pt())
    for _ in range(2):
        answer = service.client.delete(f"/jobs/{job_id}")
        assert answer.status_code == 204
        assert answer.content == b""
    job = service.client.get(f"/jobs/{job_id}").json()
    assert job["state"] == "succeeded"
    assert job["links"]["model"] is None
    assert job["links"]["report"] is None
    for path in ("model", "model.sha256", "report.json"):
        answer = service.client.get(f"/jobs/{job_id}/{path}")
        problem_of(answer, 410, "expired", instance=f"/jobs/{job_id}/{path}")


def test_deleted_queued_job_is_cancelled(service: Service) -> None:
    """A job that nobody wants is not worked on."""
    job_id = service.job()
    assert service.client.delete(f"/jobs/{job_id}").status_code == 204
    assert service.client.get(f"/jobs/{job_id}").json()["state"] == "cancelled"


def test_deleted_jobs_uploads_go_with_the_next_sweep(service: Service) -> None:
    """Nothing of what was uploaded waits for the grace time when its owner wants it gone."""
    job_id = service.job()
    assert service.client.delete(f"/jobs/{job_id}").status_code == 204
    with service.context.database.write() as session:
        jobs.sweep(session, service.context.store, retention_seconds=60, orphan_grace_seconds=3600)
    assert not list(service.context.store.keys("uploads"))


# Idempotency ---------------------------------------------------------------------------------------

KEY = {"Idempotency-Key": "build-7"}


def test_repeated_request_is_the_same_job(service: Service) -> None:
    """The same key and payload give the job as it is now, and say that it is a replay."""
    first = service.post(headers=KEY)
    assert "idempotent-replayed" not in first.headers
    service.claim(first.json()["id"])
    again = service.post(headers=KEY)
    assert again.status_code == 202
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.json()["state"] == "running"
    text = service.post(headers=KEY | {"Accept": "text/plain"})
    assert text.headers["idempotent-replayed"] == "true"
    assert text.text == first.headers["location"] + "\n"
    assert count(service) == 1


def test_replay_of_an_ended_job_is_200(service: Service) -> None:
    """A replay is answered with the status of the job as it is now."""
    job_id = service.post(headers=KEY).json()["id"]
    service.finish(job_id, model_pt())
    again = service.post(headers=KEY)
    assert again.status_code == 200
    assert again.json()["links"]["model"] == f"{BASE}/jobs/{job_id}/model"


def test_boundary_order_and_names_are_no_part_of_the_payload(service: Service) -> None:
    """What a client library chooses anew for each request does not make another payload."""
    first = service.post(headers=KEY, seed="1")
    body = encoded(parts(seed="1")[::-1], boundary="another-one")
    again = service.client.post("/jobs", content=body, headers=content_type("another-one") | KEY)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert BOUNDARY != "another-one"


@pytest.mark.parametrize(
    "change",
    [{"seed": "2"}, {"seed": None}, {"samples": samples_npz(labels=None)}, {"metadata": "{}"}],
    ids=["another value", "one field less", "another file", "one field more"],
)
def test_other_payload_is_refused(service: Service, change: dict[str, Any]) -> None:
    """A key stands for one payload."""
    service.post(headers=KEY, seed="1")
    answer = service.post(headers=KEY, **{"seed": "1", **change})
    problem_of(answer, 422, "idempotency-mismatch")
    assert count(service) == 1
    assert count(service, Blob) == 2


def test_concurrent_duplicates_make_one_job(service: Service) -> None:
    """However many requests come at once, one makes the job and the others find it."""
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: service.post(headers=KEY), range(6)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 5
    assert count(service) == 1


def test_invalid_key_is_refused(service: Service) -> None:
    """A key that could be read in two ways is none."""
    for key in ("", " ", "a b", "x" * 256, "\x7f"):
        problem_of(service.post(headers={"Idempotency-Key": key}), 422, "invalid-field")
    assert service.left_behind() == []


def test_refused_request_does_not_use_up_its_key(service: Service) -> None:
    """After a mistake the same key works for the mended request."""
    problem_of(service.post(headers=KEY, seed="x"), 422, "invalid-field")
    assert service.post(headers=KEY, seed="1").status_code == 202


# Quota ---------------------------------------------------------------------------------------------


def test_quota_is_429_until_a_job_ends(start: Start) -> None:
    """A tenant with too many unfinished jobs is asked to come back."""
    with start(max_active_jobs=2) as service:
        first, _ = service.job(), service.job()
        before = service.left_behind()
        answer = service.post(seed="5", samples=samples_npz(labels=None))
        problem_of(answer, 429, "quota-exceeded")
        assert int(answer.headers["retry-after"]) >= 1
        assert service.left_behind() == before
        service.client.post(f"/jobs/{first}/cancel")
        service.job()


def test_full_quota_refuses_nothing_that_makes_no_job(start: Start) -> None:
    """A repeated request and a dry run are answered, however many jobs are unfinished."""
    with start(max_active_jobs=1) as service:
        first = service.post(headers=KEY)
        again = service.post(headers=KEY)
        assert again.status_code == 202
        assert again.json()["id"] == first.json()["id"]
        assert service.client.get("/jobs").json()["has_more"] is False
        assert service.post("/jobs?dry_run=true").status_code == 200


def test_long_poll_ends_when_the_service_stops(service: Service) -> None:
    """Who waits for a job is answered with its present state when the process has to go."""
    job_id = service.job()
    service.context.stopping.set()
    started = time.monotonic()
    answer = service.client.get(f"/jobs/{job_id}?wait=50")
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    assert time.monotonic() - started < 30


def test_quota_holds_against_many_at_once(start: Start) -> None:
    """Requests that look at the same moment do not all find room."""
    with start(max_active_jobs=3) as service:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: service.post(seed=str(n)), range(8)))
        assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 5
        assert count(service) == 3


def test_retention_hides_the_files_when_it_ends(service: Service) -> None:
    """A job whose time is over has nothing to download, even before the sweep came by."""
    job_id = service.job()
    service.finish(job_id, model_pt())
    with service.database.write() as session:
        session.execute(update(Job).values(expires_at=now(-1)))
    assert service.client.get(f"/jobs/{job_id}").json()["links"]["model"] is None
    answer = service.client.get(f"/jobs/{job_id}/model")
    problem_of(answer, 410, "expired", instance=f"/jobs/{job_id}/model")
