"""What a child leaves behind is read as if the upload itself had written it."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from common.errors import InternalError, JobCrashed, WeightsNotFinite
from worker.leavings import as_problem, digest_output, read_result

CANDIDATE = (
    b'{"report": {"metrics": {}, "evidence": {"candidates": [{"sha256": "'
    + b"0" * 64
    + b'", "bytes": %s}]}}}'
)
TRIAL = b'{"report": {"metrics": {}, "evidence": {"trial": %s}}}'


def test_honest_result_is_read(tmp_path: Path) -> None:
    """A result comes back as it was written."""
    metrics = {"before": {"accuracy": 0.5}, "after": {"accuracy": None}}
    written = {"verdict": None, "remediation": "purified", "report": {"metrics": metrics}}
    (tmp_path / "result.json").write_text(json.dumps(written))
    result = read_result(tmp_path)
    assert result is not None
    assert result.report == {"metrics": metrics}
    assert result.evidence.candidates == []


def test_candidates_of_a_result_are_read(tmp_path: Path) -> None:
    """What a child says of its candidates' files comes back beside whatever else it says of them."""
    said = {"sha256": "a" * 64, "bytes": 7, "strength": 0.1}
    evidence = {"candidates": [said], "triggers": []}
    written = {"report": {"metrics": {}, "evidence": evidence}}
    (tmp_path / "result.json").write_text(json.dumps(written))
    result = read_result(tmp_path)
    assert result is not None
    assert [(each.sha256, each.bytes) for each in result.evidence.candidates] == [("a" * 64, 7)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"verdict": 1}',
        b'{"verdict": "perfectly clean"}',
        b'{"remediation": "blessed"}',
        b'{"unknown": 1}',
        b'{"report": {}}',
        b'{"report": {"metrics": {"before": {"accuracy": NaN}}}}',
        b'{"report": {"metrics": {"before": {"accuracy": "high"}}}}',
        b'{"report": {"metrics": []}}',
        b'{"report": {"metrics": {}, "evidence": 1}}',
        b'{"report": {"metrics": {}, "evidence": {"candidates": 1}}}',
        b'{"report": {"metrics": {}, "evidence": {"candidates": [{"bytes": 1}]}}}',
        b'{"report": {"metrics": {}, "evidence": {"candidates": [{"sha256": "x", "bytes": 1}]}}}',
        CANDIDATE % b"-1",
        CANDIDATE % b"true",
        b'{"report": {"metrics": {}, "evidence": {"candidates": [%s]}}}' % b",".join([b"{}"] * 17),
        TRIAL % b'{"triggers": 1, "samples": 1}',
        TRIAL % b'{"triggers": 0, "samples": 1, "shown": 1}',
        TRIAL % b'{"triggers": 17, "samples": 1, "shown": 1}',
        TRIAL % b'{"triggers": 1, "samples": 65, "shown": 1}',
        TRIAL % b'{"triggers": 1, "samples": 1, "shown": 2}',
        TRIAL % b'{"triggers": 1, "samples": 1, "shown": -1}',
        TRIAL % b'{"triggers": 1, "samples": 1, "shown": 1, "more": 1}',
        b'{"report": {"metrics": {}, "evidence": {"triggers": [1]}}}',
        b"[" * 100_000,
        b" " * ((16 << 20) + 1),
    ],
)
def test_anything_else_is_no_result(tmp_path: Path, content: bytes) -> None:
    """What is not a result, or is implausibly large, counts as a crash."""
    (tmp_path / "result.json").write_bytes(content)
    assert read_result(tmp_path) is None


def test_no_link_is_followed(tmp_path: Path) -> None:
    """A link in the place of the result or of the model is refused."""
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "result.json").symlink_to(tmp_path / "secret")
    (tmp_path / "output").symlink_to(tmp_path / "secret")
    assert read_result(tmp_path) is None
    with pytest.raises(OSError, match="output"):
        digest_output(tmp_path / "output", limit=100)


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    """A pipe in the place of the model is refused at once."""
    os.mkfifo(tmp_path / "output")
    with pytest.raises(OSError, match="plain"):
        digest_output(tmp_path / "output", limit=100)


def test_output_has_a_limit(tmp_path: Path) -> None:
    """The digest is that of the bytes, up to a size that can be meant."""
    (tmp_path / "output").write_bytes(b"weights")
    assert digest_output(tmp_path / "output", limit=7) == (
        hashlib.sha256(b"weights").hexdigest(),
        7,
    )
    with pytest.raises(InternalError):
        digest_output(tmp_path / "output", limit=6)


def test_problem_crosses_the_process() -> None:
    """A problem comes back as its own class, an unknown one as a crash."""
    stored = WeightsNotFinite("'w' is NaN").as_dict()
    problem = as_problem(stored)
    assert isinstance(problem, WeightsNotFinite)
    assert problem.detail == "'w' is NaN"
    assert isinstance(as_problem({"code": "invented"}), JobCrashed)
    assert isinstance(as_problem({}), JobCrashed)
