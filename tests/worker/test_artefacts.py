"""What a child leaves beside the model is measured by us, and is what it said, or nothing is stored."""

import hashlib
from pathlib import Path

import pytest

from common import differences
from common.artefacts import Artefact
from common.errors import InternalError
from worker.artefacts import check_candidates
from worker.leavings import ClaimedCandidate, Evidence

MODEL = bytes(200_000)
OTHER = MODEL[:-1] + b"!"


def nothing() -> None:
    """See no reason to stop."""


def claim(*contents: bytes) -> Evidence:
    """Return evidence of candidates with *contents*."""
    return Evidence(
        candidates=[
            ClaimedCandidate(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
            for content in contents
        ]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that an honest child left, with the model and one other candidate."""
    (tmp_path / "output").write_bytes(MODEL)
    (tmp_path / "other").write_bytes(OTHER)
    (tmp_path / "candidate-0").touch()
    differences.write(tmp_path / "output", tmp_path / "other", tmp_path / "candidate-1")
    return tmp_path


def test_honest_candidates_are_measured(folder: Path) -> None:
    """Digest and size are those of the whole file."""
    found = check_candidates(folder, claim(MODEL, OTHER), check=nothing)
    assert found == {
        "candidate-0": Artefact(sha256=hashlib.sha256(MODEL).hexdigest(), bytes=len(MODEL)),
        "candidate-1": Artefact(sha256=hashlib.sha256(OTHER).hexdigest(), bytes=len(OTHER)),
    }


def test_run_without_candidates_leaves_none(folder: Path) -> None:
    """What is not spoken of is not stored, whatever lies there."""
    assert check_candidates(folder, Evidence(), check=nothing) == {}


def test_candidate_that_was_not_verified_is_refused(folder: Path) -> None:
    """Other bytes than the child says that it verified are never offered."""
    with pytest.raises(InternalError):
        check_candidates(folder, claim(MODEL, MODEL), check=nothing)


@pytest.mark.parametrize("content", [b"x", b"\xff" * 70_000, bytes(70_000)])
def test_what_are_no_differences_is_refused(folder: Path, content: bytes) -> None:
    """Bytes that make no file of the model are our fault, not a candidate."""
    (folder / "candidate-1").write_bytes(content)
    with pytest.raises(InternalError):
        check_candidates(folder, claim(MODEL, OTHER), check=nothing)


def test_no_link_is_followed(folder: Path) -> None:
    """A link in the place of a candidate is refused, and so is a place with nothing in it."""
    (folder / "candidate-1").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError):
        check_candidates(folder, claim(MODEL, OTHER), check=nothing)
    (folder / "candidate-1").symlink_to(folder / "elsewhere")
    with pytest.raises(OSError, match="candidate-1"):
        check_candidates(folder, claim(MODEL, OTHER), check=nothing)


def test_work_stops_where_it_is_told_to(folder: Path) -> None:
    """A cancel is noticed while files are read."""

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check_candidates(folder, claim(MODEL, OTHER), check=stop)
