"""What a job leaves is downloaded whole, in parts, or not at all; never anything else with a 2xx."""

import base64
import hashlib
import shlex
import subprocess
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote

import pytest

from common.errors import DamagedFile, OutOfMemory
from tests.service.conftest import REPORT, Service, problem_of
from tests.service.forms import Part, model_pt, model_safetensors

RESULT = bytes(range(256)) * 4
TAG = f'"{hashlib.sha256(RESULT).hexdigest()}"'
STRONG = {"Range": "bytes=0-9"}


@pytest.fixture
def done(service: Service) -> str:
    """Return the path of a job that has ended with RESULT."""
    job_id = service.job()
    service.finish(job_id, RESULT)
    return f"/jobs/{job_id}"


def named(service: Service, filename: str) -> str:
    """Return the path of a finished job whose model was uploaded as *filename*."""
    job_id = service.job(model=Part("model", model_pt(), filename))
    service.finish(job_id, RESULT)
    return f"/jobs/{job_id}"


def test_finished_job_links_what_it_leaves(service: Service, done: str) -> None:
    """Every link of a finished job leads somewhere; its numbers are the report's."""
    job = service.client.get(done).json()
    assert job["state"] == "succeeded"
    assert job["verdict"] == "backdoored"
    assert job["remediation"] == "purified"
    assert job["output"] == {
        "name": "model-clean.pt",
        "sha256": TAG.strip('"'),
        "bytes": len(RESULT),
    }
    assert job["metrics"]["before"]["accuracy"] == 0.9
    assert job["metrics"]["before"]["attack_success_rate"] is None
    assert job["progress"]["fraction"] == 1.0
    links = {name: url for name, url in job["links"].items() if url is not None}
    assert set(links) == {"self", "model", "model_sha256", "report"}
    assert {service.client.get(url).status_code for url in links.values()} == {200}


def test_model_is_sent_whole(service: Service, done: str) -> None:
    """The download says its length, its digest and its name, and has a strong validator."""
    answer = service.client.get(f"{done}/model")
    assert answer.status_code == 200
    assert answer.content == RESULT
    headers = answer.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-length"] == str(len(RESULT))
    assert headers["etag"] == TAG
    assert headers["accept-ranges"] == "bytes"
    digest = base64.b64encode(hashlib.sha256(RESULT).digest()).decode()
    assert headers["repr-digest"] == f"sha-256=:{digest}:"
    assert headers["content-disposition"].startswith('attachment; filename="model-clean.pt"')
    assert parsedate_to_datetime(headers["last-modified"]).tzinfo is not None


def test_head_says_the_same_without_the_body(service: Service, done: str) -> None:
    """HEAD has the headers of GET; a range is for GET alone."""
    whole = service.client.get(f"{done}/model")
    for asked in ({}, STRONG):
        answer = service.client.head(f"{done}/model", headers=asked)
        assert answer.status_code == 200
        assert answer.content == b""
        for name in ("content-length", "etag", "content-disposition", "repr-digest"):
            assert answer.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-199", 100, 199),
        ("bytes=1000-", 1000, 1023),
        ("bytes=1023-", 1023, 1023),
        ("bytes=-1", 1023, 1023),
        ("bytes=-100", 924, 1023),
        ("bytes=-99999", 0, 1023),
        ("bytes=0-99999", 0, 1023),
    ],
)
def test_range_is_sent_alone(
    service: Service, done: str, asked: str, first: int, last: int
) -> None:
    """A range that lies in the file is 206 with those bytes and their place."""
    answer = service.client.get(f"{done}/model", headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == RESULT[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(RESULT)}"
    assert answer.headers["content-length"] == str(last - first + 1)
    assert answer.headers["etag"] == TAG


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=1024-2000", "bytes=-0"])
def test_range_behind_the_end_is_416(service: Service, done: str, asked: str) -> None:
    """A range that begins behind the end is refused with the length there is."""
    answer = service.client.get(f"{done}/model", headers={"Range": asked})
    problem_of(answer, 416, "range-not-satisfiable", instance=f"{done}/model")
    assert answer.headers["content-range"] == f"bytes */{len(RESULT)}"


@pytest.mark.parametrize(
    "asked", ["bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "bytes=0-1,5-9", "items=0-1", "0-1"]
)
def test_range_that_is_not_served_is_ignored(service: Service, done: str, asked: str) -> None:
    """What is malformed, of another unit, or several ranges gets the whole file."""
    answer = service.client.get(f"{done}/model", headers={"Range": asked})
    assert answer.status_code == 200
    assert answer.content == RESULT


@pytest.mark.parametrize(
    ("condition", "status"),
    [(TAG, 206), ('"other"', 200), (f"W/{TAG}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)],
)
def test_range_of_another_file_is_the_whole_file(
    service: Service, done: str, condition: str, status: int
) -> None:
    """``If-Range`` keeps a resumed download from mixing two files: only the same tag will do."""
    answer = service.client.get(f"{done}/model", headers=STRONG | {"If-Range": condition})
    assert answer.status_code == status
    assert answer.content == (RESULT[:10] if status == 206 else RESULT)


@pytest.mark.parametrize("condition", [TAG, "*", f'"other", {TAG}', f"W/{TAG}"])
def test_known_model_is_304(service: Service, done: str, condition: str) -> None:
    """Who has the file is not sent it again."""
    for headers in ({}, STRONG):
        answer = service.client.get(
            f"{done}/model", headers={"If-None-Match": condition, **headers}
        )
        assert answer.status_code == 304
        assert answer.content == b""
        assert answer.headers["etag"] == TAG
    other = service.client.get(f"{done}/model", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200


# Not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["model", "model.sha256", "report.json"])
def test_unfinished_job_is_503(service: Service, rest: str) -> None:
    """Until the job has ended there is nothing but a wish to come back."""
    job_id = service.job()
    for words in ("queued", "running 0% starting"):
        answer = service.client.get(f"/jobs/{job_id}/{rest}")
        problem = problem_of(answer, 503, "still-running", instance=f"/jobs/{job_id}/{rest}")
        assert int(answer.headers["retry-after"]) >= 1
        assert words in problem["detail"]
        if words == "queued":
            service.claim(job_id)
    assert service.client.head(f"/jobs/{job_id}/model").status_code == 503


@pytest.mark.parametrize("rest", ["model", "model.sha256"])
def test_failed_job_has_no_model(service: Service, rest: str) -> None:
    """A job that ended otherwise is 409, with what went wrong."""
    failed, cancelled = service.job(), service.job()
    service.fail(failed, DamagedFile("The file is torn."))
    service.client.post(f"/jobs/{cancelled}/cancel")
    for job_id, words in ((failed, "failed: The file is torn."), (cancelled, "cancelled")):
        path = f"/jobs/{job_id}/{rest}"
        problem = problem_of(service.client.get(path), 409, "no-model", instance=path)
        assert words in problem["detail"]


def test_error_of_a_job_is_a_problem(service: Service) -> None:
    """What a worker stored reads like what the service answers."""
    job_id = service.job()
    service.fail(job_id, OutOfMemory())
    job = service.client.get(f"/jobs/{job_id}").json()
    assert job["state"] == "failed"
    assert job["error"]["code"] == "out-of-memory"
    assert job["error"]["type"] == "urn:weightwash:problem:out-of-memory"
    assert job["error"]["hint"]
    assert job["error"]["instance"] == job["links"]["self"]
    assert job["error"]["request_id"] == job["request_id"]


def test_lost_file_is_no_2xx(service: Service, done: str) -> None:
    """A model that the store no longer has is gone, not empty."""
    for key in list(service.context.store.keys("outputs")):
        service.context.store.delete(key)
    answer = service.client.get(f"{done}/model")
    problem_of(answer, 410, "expired", instance=f"{done}/model")


# Formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "own", "other"),
    [("pt", "pt", "safetensors"), ("safetensors", "safetensors", "pt")],
)
def test_format_is_the_uploaded_one(service: Service, form: str, own: str, other: str) -> None:
    """The format that was uploaded can be named; another one or an unknown one is refused."""
    content = model_pt() if form == "pt" else model_safetensors()
    job_id = service.job(model=Part("model", content, f"net.{form}"))
    service.finish(job_id, RESULT)
    path = f"/jobs/{job_id}/model"
    assert service.client.get(f"{path}?format={own}").content == RESULT
    for refused in (other, "onnx", ""):
        answer = service.client.get(f"{path}?format={refused}")
        problem_of(answer, 422, "invalid-field", instance=path)


# Names and digests ---------------------------------------------------------------------------------

HOSTILE_NAMES = [
    "../../etc/passwd",
    "..\\..\\boot.ini",
    "/etc/shadow",
    "....//x.pt",
    "..",
    ".",
    "...",
    "-rf",
    "--output=x.pt",
    "-.pt",
    ".bashrc",
    "a;rm -rf ~.pt",
    "$(touch x).pt",
    "`id`.pt",
    "a|b&c>d<e*?.pt",
    "a%0d%0aSet-Cookie: x=1.pt",
    "tab\there.pt",
    "bell\x07.pt",
    "\x1b[31mred.pt",
    "ünïcode-模型.pt",
    "right\u202eto-left.pt",
    "zero\u200bwidth.pt",
    "emoji-😀.pt",
    "x" * 5000 + ".pt",
    " .pt",
    "model.pt ",
    "a'b.pt",
    "%2e%2e%2fx.pt",
    "con.pt\0.exe",
    "C:\\Users\\me\\model.pt",
]


@pytest.mark.parametrize("filename", HOSTILE_NAMES, ids=lambda name: ascii(name)[:30])
def test_hostile_name_comes_out_harmless(service: Service, tmp_path: Path, filename: str) -> None:
    """Whatever the upload was called, the download's name is one plain word of a shell."""
    path = named(service, filename)
    disposition = service.client.get(f"{path}/model").headers["content-disposition"]
    plain = disposition.split('filename="')[1].split('"')[0]
    name = unquote(disposition.split("filename*=UTF-8''")[1])
    line = service.client.get(f"{path}/model.sha256").text
    assert line == f"{TAG[1:-1]}  {name}\n"
    assert service.client.get(path).json()["output"]["name"] == name
    assert plain.isascii()
    for found in (plain, name):
        assert "-clean" in found
        assert found[0] not in "-. "
        assert len(found) <= 130
        assert found.isprintable()
        assert not set(found) & set("/\\\"'`$;|&<>*?%\n\r\t:!~#{}[]")
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / name).write_bytes(RESULT)  # it is a name in this folder, and in no other
    assert [child.name for child in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    ("filename", "download"),
    [
        ("model.pt", "model-clean.pt"),
        ("net.v2.pth", "net.v2-clean.pth"),
        ("checkpoint", "checkpoint-clean"),
        ("a b.pt", "a b-clean.pt"),
        ("résumé.pt", "résumé-clean.pt"),
        ("models/net.safetensors", "net-clean.safetensors"),
        ("..", "model-clean"),
    ],
)
def test_download_is_named_after_the_upload(service: Service, filename: str, download: str) -> None:
    """The stem gets ``-clean``, the suffix stays."""
    path = named(service, filename)
    assert service.client.get(f"{path}/model.sha256").text.endswith(f"  {download}\n")


def test_quote_and_newline_cannot_leave_the_header(service: Service) -> None:
    """A name that tries to end its header ends up as underscores, or the form is refused."""
    for filename in ('a"; filename="b.pt', "a\r\nX-Evil: 1\r\n.pt", 'a\\"b.pt'):
        answer = service.post(model=Part("model", model_pt(), filename))
        assert answer.status_code in {202, 400}
        if answer.status_code == 202:
            service.finish(answer.json()["id"], RESULT)
            model = service.client.get(f"/jobs/{answer.json()['id']}/model")
            assert "x-evil" not in model.headers
            assert model.headers["content-disposition"].count('"') == 2


@pytest.mark.parametrize(
    "filename", ["model.pt", "a b (1).pt", "résumé-模型.pt", "x" * 500 + ".pt"]
)
def test_digest_line_is_what_sha256sum_checks(
    service: Service, tmp_path: Path, filename: str
) -> None:
    """``sha256sum -c`` accepts the line for the file, and not for another one."""
    path = named(service, filename)
    line = service.client.get(f"{path}/model.sha256")
    assert line.headers["content-type"] == "text/plain; charset=utf-8"
    name = line.text.split("  ", 1)[1].rstrip("\n")
    file = tmp_path / name
    file.write_bytes(service.client.get(f"{path}/model").content)

    def check() -> int:
        return subprocess.run(
            shlex.split("sha256sum --strict -c -"), input=line.content, cwd=tmp_path,
            capture_output=True, check=False,
        ).returncode  # fmt: skip

    assert check() == 0
    file.write_bytes(RESULT[:-1])
    assert check() != 0


# The report ----------------------------------------------------------------------------------------


def test_report_says_what_was_done_to_what(service: Service, done: str) -> None:
    """The report stands by itself: the job's question beside the worker's answer."""
    answer = service.client.get(f"{done}/report.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.endswith("}\n")
    report = answer.json()
    assert report["object"] == "report"
    assert report["job"] == done.removeprefix("/jobs/")
    assert report["metrics"] == REPORT["metrics"]
    assert report["state"] == "succeeded"
    assert report["verdict"] == "backdoored"
    assert report["method"] == "auto"
    assert report["params"] == service.client.get(done).json()["params"]
    assert None not in report["params"].values()
    assert report["input"]["samples"]["count"] == 4
    assert report["output"]["sha256"] == TAG.strip('"')


def test_failed_job_may_have_a_report(service: Service) -> None:
    """A job that failed has its report if the worker wrote one, else a 409."""
    silent, telling = service.job(), service.job()
    service.fail(silent, DamagedFile())
    service.fail(telling, DamagedFile(), report={"warnings": ["torn"]})
    path = f"/jobs/{silent}/report.json"
    problem_of(service.client.get(path), 409, "no-report", instance=path)
    assert service.client.get(f"/jobs/{silent}").json()["links"]["report"] is None
    url = service.client.get(f"/jobs/{telling}").json()["links"]["report"]
    assert service.client.get(url).json()["warnings"] == ["torn"]
