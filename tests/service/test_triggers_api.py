"""What a run recovered of triggers is downloaded like its model: whole, in parts, or not at all."""

import base64
import hashlib

import pytest

from common import jobs
from common.errors import DamagedFile
from tests.service.conftest import REPORT, Service, problem_of
from tests.service.forms import Part, model_pt

MODEL = b"weights"
FILES = {"triggers.npz": b"arrays" * 50, "trigger-0.png": b"first", "trigger-1.png": b"second"}
PATHS = {
    "triggers.npz": "triggers.npz",
    "trigger-0.png": "triggers/0.png",
    "trigger-1.png": "triggers/1.png",
}
EVIDENCE = {"triggers": [{"class": 3}, {"class": 5}, {"class": 5}]}


@pytest.fixture
def done(service: Service) -> str:
    """Return the path of a job that left files of two triggers."""
    job_id = service.job(model=Part("model", model_pt(), "net.v2.pth"))
    service.finish(job_id, MODEL, beside=FILES, report={**REPORT, "evidence": EVIDENCE})
    return f"/jobs/{job_id}"


@pytest.mark.parametrize(
    ("name", "media_type", "disposition"),
    [
        ("triggers.npz", "application/octet-stream", 'attachment; filename="net.v2-triggers.npz"'),
        ("trigger-0.png", "image/png", 'inline; filename="net.v2-trigger0.png"'),
        ("trigger-1.png", "image/png", 'inline; filename="net.v2-trigger1.png"'),
    ],
)
def test_file_is_sent_whole(
    service: Service, done: str, name: str, media_type: str, disposition: str
) -> None:
    """Type, name, length, digest and validator are the file's own; a browser may show a picture."""
    path, content = f"{done}/{PATHS[name]}", FILES[name]
    answer = service.client.get(path)
    assert answer.status_code == 200
    assert answer.content == content
    assert answer.headers["content-type"] == media_type
    assert answer.headers["content-disposition"].startswith(disposition)
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    head = service.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for header in ("content-length", "content-type", "etag"):
        assert head.headers[header] == answer.headers[header]


@pytest.mark.parametrize("name", FILES)
def test_validators_and_ranges_are_obeyed(service: Service, done: str, name: str) -> None:
    """A known file is 304, a range is 206, one behind the end is 416."""
    path, content = f"{done}/{PATHS[name]}", FILES[name]
    tag = service.client.get(path).headers["etag"]
    assert service.client.get(path, headers={"If-None-Match": tag}).status_code == 304
    part = service.client.get(path, headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, content[1:4])
    behind = service.client.get(path, headers={"Range": "bytes=9999-"})
    problem_of(behind, 416, "range-not-satisfiable", instance=path)


def test_job_and_report_link_every_file(service: Service, done: str) -> None:
    """The pictures are in the report's order; a trigger beyond those that were tried has none."""
    links = service.client.get(done).json()["links"]
    assert service.client.get(links["triggers"]).content == FILES["triggers.npz"]
    pictures = [service.client.get(url).content for url in links["trigger_images"]]
    assert pictures == [FILES["trigger-0.png"], FILES["trigger-1.png"]]
    found = service.client.get(f"{done}/report.json").json()["evidence"]["triggers"]
    assert [trigger["image"] for trigger in found] == [*links["trigger_images"], None]
    assert [trigger["class"] for trigger in found] == [3, 5, 5]


# Not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["2", "16", "9" * 30])
def test_number_behind_the_last_is_404(service: Service, done: str, number: str) -> None:
    """Whoever asks for too high a number is told how many there are."""
    path = f"{done}/triggers/{number}.png"
    problem = problem_of(service.client.get(path), 404, "no-such-trigger", instance=path)
    assert "2 triggers, 0 to 1" in problem["detail"]
    assert "evidence.triggers" in problem["hint"]


@pytest.mark.parametrize("number", ["-1", "one", "1.5", "0x1"])
def test_what_is_no_number_is_refused(service: Service, done: str, number: str) -> None:
    """Anything but a whole number from 0 is a problem of the request."""
    path = f"{done}/triggers/{number}.png"
    problem_of(service.client.get(path), 422, "invalid-field", instance=path)


@pytest.mark.parametrize("rest", PATHS.values())
def test_run_without_triggers_says_so(service: Service, rest: str) -> None:
    """Where none was recovered there is nothing to download, and no link that says otherwise."""
    job_id = service.job(method="awm")
    service.finish(job_id, MODEL)
    path = f"/jobs/{job_id}/{rest}"
    problem = problem_of(service.client.get(path), 404, "no-such-trigger", instance=path)
    assert "awm recovered no trigger" in problem["detail"]
    links = service.client.get(f"/jobs/{job_id}").json()["links"]
    assert (links["triggers"], links["trigger_images"]) == (None, None)


@pytest.mark.parametrize("rest", PATHS.values())
def test_unfinished_and_failed_jobs_answer_as_for_the_model(service: Service, rest: str) -> None:
    """503 until the job has ended, 409 when it ended otherwise."""
    waiting, failed = service.job(), service.job()
    service.fail(failed, DamagedFile())
    path = f"/jobs/{waiting}/{rest}"
    answer = service.client.get(path)
    problem_of(answer, 503, "still-running", instance=path)
    assert int(answer.headers["retry-after"]) >= 1
    path = f"/jobs/{failed}/{rest}"
    problem_of(service.client.get(path), 409, "no-model", instance=path)


def test_delete_takes_the_files_along(service: Service, done: str) -> None:
    """After a DELETE they are gone at once, and with the next sweep off the disk."""
    assert service.client.delete(done).status_code == 204
    links = service.client.get(done).json()["links"]
    assert (links["triggers"], links["trigger_images"]) == (None, None)
    for rest in PATHS.values():
        answer = service.client.get(f"{done}/{rest}")
        problem_of(answer, 410, "expired", instance=f"{done}/{rest}")
    with service.context.database.write() as session:
        jobs.sweep(session, service.context.store, retention_seconds=60, orphan_grace_seconds=3600)
    assert not list(service.context.store.keys("outputs"))
