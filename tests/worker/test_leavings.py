"""What a child leaves behind is read as if the upload itself had written it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.artefacts import MAX_CANDIDATES
from common.errors import InternalError, JobCrashed, WeightsNotFinite
from worker.leavings import ChildResult, as_problem, copy_plain, open_plain
from worker.leavings import read_result as read_open_result

CANDIDATE = b'{"files": [{"sha256": "' + b"0" * 64 + b'", "bytes": %s}]}'
TRIAL = b'{"report": {"metrics": {}, "evidence": {"trial": %s}}}'


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """Open a folder as the supervisor keeps a child's open."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_result(folder: Path) -> ChildResult | None:
    """Read what lies in *folder* as a result."""
    with opened(folder) as descriptor:
        return read_open_result(descriptor)


def take(folder: Path, name: str, *, limit: int = 100) -> bytes:
    """Return what a copy of the file *name* holds."""
    with opened(folder) as descriptor:
        copy_plain(name, folder / "copy", limit=limit, folder=descriptor)
    return (folder / "copy").read_bytes()


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
    """What a child says of its candidates' files comes back."""
    written = {"files": [{"sha256": "a" * 64, "bytes": 7}]}
    (tmp_path / "result.json").write_text(json.dumps(written))
    result = read_result(tmp_path)
    assert result is not None
    assert result.files is not None
    assert [(each.sha256, each.bytes) for each in result.files] == [("a" * 64, 7)]


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
        b'{"report": {"metrics": {}, "evidence": {"candidates": [1]}}}',
        b'{"files": {}}',
        b'{"files": [{"bytes": 1}]}',
        b'{"files": [{"sha256": "x", "bytes": 1}]}',
        CANDIDATE % b"-1",
        CANDIDATE % b"true",
        b'{"report": {"metrics": {}, "evidence": {"candidates": [%s]}}}'
        % b",".join([b"{}"] * (MAX_CANDIDATES + 1)),
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
    """A link in the place of the result or of the model is refused, of whichever kind."""
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "result.json").symlink_to(tmp_path / "secret")
    (tmp_path / "soft").symlink_to(tmp_path / "secret")
    (tmp_path / "hard").hardlink_to(tmp_path / "secret")
    assert read_result(tmp_path) is None
    for name in ("soft", "hard"):
        with pytest.raises(OSError, match=name):
            take(tmp_path, name)


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    """A pipe in the place of the model is refused at once."""
    os.mkfifo(tmp_path / "output")
    with pytest.raises(OSError, match="plain"):
        open_plain(tmp_path / "output")
    with pytest.raises(OSError, match="plain"):
        take(tmp_path, "output")


def test_folder_is_the_one_that_was_made(tmp_path: Path) -> None:
    """Whatever takes the place of a child's folder later is not read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "output").write_text("secret")
    with opened(tmp_path / "out") as descriptor:
        (tmp_path / "out").rmdir()
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError):
            copy_plain("output", tmp_path / "copy", limit=100, folder=descriptor)


def test_output_has_a_limit(tmp_path: Path) -> None:
    """A file is copied up to a size that can be meant."""
    (tmp_path / "output").write_bytes(b"weights")
    assert take(tmp_path, "output", limit=7) == b"weights"
    (tmp_path / "copy").unlink()
    with pytest.raises(InternalError):
        take(tmp_path, "output", limit=6)


def test_problem_crosses_the_process() -> None:
    """A problem comes back as its own class, an unknown one as a crash."""
    stored = WeightsNotFinite("'w' is NaN").as_dict()
    problem = as_problem(stored)
    assert isinstance(problem, WeightsNotFinite)
    assert problem.detail == "'w' is NaN"
    assert isinstance(as_problem({"code": "invented"}), JobCrashed)
    assert isinstance(as_problem({}), JobCrashed)
