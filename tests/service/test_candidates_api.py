"""Every candidate of a run is downloaded as the model is: whole, in parts, or not at all."""

import base64
import hashlib
import subprocess
from pathlib import Path

import pytest

from common import jobs
from common.differences import BLOCK_BYTES
from common.errors import DamagedFile
from tests.service.conftest import REPORT, Service, problem_of
from tests.service.forms import Part, model_pt

MILD = bytes(3 * BLOCK_BYTES + 100)
CHOSEN = MILD[: BLOCK_BYTES + 7] + b"chosen" + MILD[BLOCK_BYTES + 13 :]
STRONG = MILD[:-3] + b"end"
CANDIDATES = [MILD, CHOSEN, STRONG]
EVIDENCE = {
    "candidates": [
        {"strength": strength, "chosen": content is CHOSEN}
        for strength, content in zip((0.1, 0.5, 1.0), CANDIDATES, strict=True)
    ]
}


def digest(content: bytes) -> str:
    """Return the digest as the service writes it."""
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def done(service: Service) -> str:
    """Return the path of a job that chose the second of three candidates."""
    job_id = service.job(model=Part("model", model_pt(), "net.v2.pth"))
    service.finish(job_id, CHOSEN, candidates=CANDIDATES, report={**REPORT, "evidence": EVIDENCE})
    return f"/jobs/{job_id}"


@pytest.mark.parametrize("number", range(3))
def test_candidate_is_sent_whole(service: Service, done: str, number: int) -> None:
    """Its bytes, length, digest and name are its own."""
    content = CANDIDATES[number]
    answer = service.client.get(f"{done}/model?candidate={number}")
    assert answer.status_code == 200
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["etag"] == f'"{digest(content)}"'
    expected = base64.b64encode(hashlib.sha256(content).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{expected}:"
    name = f"net.v2-clean-candidate{number}.pth"
    assert answer.headers["content-disposition"].startswith(f'attachment; filename="{name}"')
    line = service.client.get(f"{done}/model.sha256?candidate={number}").text
    assert line == f"{digest(content)}  {name}\n"
    head = service.client.head(f"{done}/model?candidate={number}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == answer.headers["etag"]


def test_chosen_candidate_is_the_model(service: Service, done: str) -> None:
    """Both addresses give the same bytes under the same validator."""
    model = service.client.get(f"{done}/model")
    chosen = service.client.get(f"{done}/model?candidate=1")
    assert model.content == chosen.content == CHOSEN
    assert model.headers["etag"] == chosen.headers["etag"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        (f"bytes={BLOCK_BYTES - 5}-{BLOCK_BYTES + 20}", BLOCK_BYTES - 5, BLOCK_BYTES + 20),
        ("bytes=-10", len(STRONG) - 10, len(STRONG) - 1),
        (f"bytes={3 * BLOCK_BYTES - 1}-", 3 * BLOCK_BYTES - 1, len(STRONG) - 1),
    ],
)
@pytest.mark.parametrize("number", range(3))
def test_range_of_a_candidate_is_sent_alone(
    service: Service, done: str, number: int, asked: str, first: int, last: int
) -> None:
    """A range is cut out of the candidate, wherever its differences from the model lie."""
    answer = service.client.get(f"{done}/model?candidate={number}", headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == CANDIDATES[number][first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(STRONG)}"


def test_resumed_download_never_mixes_candidates(service: Service, done: str) -> None:
    """``If-Range`` and ``If-None-Match`` take the candidate's own tag and no other one's."""
    path, tag, model = f"{done}/model?candidate=0", f'"{digest(MILD)}"', f'"{digest(CHOSEN)}"'
    for condition, status in ((tag, 206), (model, 200)):
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert service.client.get(path, headers=headers).status_code == status
    for condition, status in ((tag, 304), (model, 200)):
        answer = service.client.get(path, headers={"If-None-Match": condition})
        assert answer.status_code == status
    behind = service.client.get(path, headers={"Range": f"bytes={len(MILD)}-"})
    problem_of(behind, 416, "range-not-satisfiable", instance=f"{done}/model")
    assert behind.headers["content-range"] == f"bytes */{len(MILD)}"


def test_job_and_report_link_every_candidate(service: Service, done: str) -> None:
    """The links are in the report's order and lead to the candidates."""
    links = service.client.get(done).json()["links"]["candidates"]
    assert [service.client.get(url).content for url in links] == CANDIDATES
    found = service.client.get(f"{done}/report.json").json()["evidence"]["candidates"]
    assert [candidate["model"] for candidate in found] == links
    assert [candidate["strength"] for candidate in found] == [0.1, 0.5, 1.0]


def test_digest_line_is_what_sha256sum_checks(service: Service, done: str, tmp_path: Path) -> None:
    """``sha256sum -c`` accepts the line for the candidate."""
    line = service.client.get(f"{done}/model.sha256?candidate=2")
    file = tmp_path / line.text.split("  ", 1)[1].rstrip("\n")
    file.write_bytes(service.client.get(f"{done}/model?candidate=2").content)
    subprocess.run(
        ["sha256sum", "--strict", "-c", "-"], input=line.content, cwd=tmp_path, check=True
    )


# Not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["model", "model.sha256"])
def test_number_behind_the_last_is_404(service: Service, done: str, rest: str) -> None:
    """Whoever asks for too high a number is told how many there are."""
    for number in ("3", "15", "16", "9" * 30):
        answer = service.client.get(f"{done}/{rest}?candidate={number}")
        problem = problem_of(answer, 404, "no-such-candidate", instance=f"{done}/{rest}")
        assert "3 candidates, 0 to 2" in problem["detail"]
        assert "evidence.candidates" in problem["hint"]


def test_method_without_candidates_says_so(service: Service) -> None:
    """A run with one result has no candidate, not even the first."""
    job_id = service.job(method="awm")
    service.finish(job_id, CHOSEN)
    path = f"/jobs/{job_id}/model"
    answer = service.client.get(f"{path}?candidate=0")
    problem = problem_of(answer, 404, "no-such-candidate", instance=path)
    assert "awm has no candidates" in problem["detail"]
    assert service.client.get(f"/jobs/{job_id}").json()["links"]["candidates"] is None


@pytest.mark.parametrize("number", ["-1", "one", "1.5", "", "0x1"])
def test_what_is_no_number_is_refused(service: Service, done: str, number: str) -> None:
    """Anything but a whole number from 0 is a problem of the request."""
    answer = service.client.get(f"{done}/model?candidate={number}")
    problem_of(answer, 422, "invalid-field", instance=f"{done}/model")


def test_unfinished_and_failed_jobs_answer_as_for_the_model(service: Service) -> None:
    """503 until the job has ended, 409 when it ended otherwise: whatever the number."""
    waiting, failed = service.job(), service.job()
    service.fail(failed, DamagedFile())
    for number in (0, 99):
        path = f"/jobs/{waiting}/model"
        answer = service.client.get(f"{path}?candidate={number}")
        problem_of(answer, 503, "still-running", instance=path)
        assert int(answer.headers["retry-after"]) >= 1
        path = f"/jobs/{failed}/model"
        problem_of(service.client.get(f"{path}?candidate={number}"), 409, "no-model", instance=path)


def test_delete_takes_the_candidates_along(service: Service, done: str) -> None:
    """After a DELETE they are gone at once, and with the next sweep off the disk."""
    assert service.client.delete(done).status_code == 204
    assert service.client.get(done).json()["links"]["candidates"] is None
    answer = service.client.get(f"{done}/model?candidate=0")
    problem_of(answer, 410, "expired", instance=f"{done}/model")
    with service.context.database.write() as session:
        jobs.sweep(session, service.context.store, retention_seconds=60, orphan_grace_seconds=3600)
    assert not list(service.context.store.keys("outputs"))


def test_lost_file_is_no_2xx(service: Service, done: str) -> None:
    """A candidate that the store has lost is gone; the model is still there."""
    for key in list(service.context.store.keys("outputs")):
        if key.endswith("candidate-2"):
            service.context.store.delete(key)
    answer = service.client.get(f"{done}/model?candidate=2")
    problem_of(answer, 410, "expired", instance=f"{done}/model")
    assert service.client.get(f"{done}/model").content == CHOSEN


def test_another_tenant_learns_nothing(guarded: Service) -> None:
    """A candidate of another tenant's job is a 404, as of a job that never was."""
    acme, rival = guarded.token("acme"), guarded.token("rival")
    job_id = guarded.job(headers=acme)
    guarded.finish(job_id, CHOSEN, candidates=CANDIDATES)
    path = f"/jobs/{job_id}/model"
    assert guarded.client.get(f"{path}?candidate=0", headers=acme).content == MILD
    for number in (0, 9):
        answer = guarded.client.get(f"{path}?candidate={number}", headers=rival)
        problem_of(answer, 404, "not-found", instance=path)
