"""What a child leaves beside the model is measured by us, and is what it said, or nothing is stored."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common import differences
from common.artefacts import Artefact
from common.errors import InternalError
from common.formats.model import ModelFormat
from common.spec import JobSpec, ModelInput, SamplesInput
from worker import trial_files
from worker.artefacts import check_candidates, make_trigger_files
from worker.leavings import ClaimedCandidate, ClaimedTrial, Evidence
from worker.trial_files import TRIAL, Counts, layout

MODEL = bytes(200_000)
OTHER = MODEL[:-1] + b"!"


def nothing() -> None:
    """See no reason to stop."""


def claim(*contents: bytes) -> list[ClaimedCandidate]:
    """Return what a child says of candidates with *contents*."""
    return [
        ClaimedCandidate(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for content in contents
    ]


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
    assert check_candidates(folder, [], check=nothing) == {}


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


# Triggers ------------------------------------------------------------------------------------------

SPEC = JobSpec(
    model=ModelInput(name="m.pt", sha256="0" * 64, bytes=1, format=ModelFormat.TORCH),
    samples=SamplesInput(sha256="0" * 64, bytes=1, count=9, classes=4, image_shape=(3, 8, 8)),
    architecture="small_cnn",
    architecture_args={},
    classes=4,
    method="auto",
    params={},
    seed=0,
)
COUNTS = Counts(triggers=2, samples=6, shown=3)
TRIED = Evidence(trial=ClaimedTrial(triggers=2, samples=6, shown=3))


@pytest.fixture
def numbers(tmp_path: Path) -> dict[str, Any]:
    """Return the arrays that an honest child left in the folder."""
    random = np.random.default_rng(0)
    arrays = {
        name: (
            random.random(shape, dtype=np.float32)
            if dtype.kind == "f"
            else random.integers(0, 4, shape)
        )
        for name, (dtype, shape) in layout(COUNTS, (3, 8, 8)).items()
    }
    trial_files.write(arrays, tmp_path / TRIAL)
    return arrays


def test_files_of_the_triggers_are_made_of_the_numbers(
    tmp_path: Path, numbers: dict[str, Any]
) -> None:
    """An ``.npz`` of all and a picture of each, written here, with the digests of what was written."""
    found = make_trigger_files(tmp_path, TRIED, SPEC)
    assert list(found) == ["triggers.npz", "trigger-0.png", "trigger-1.png"]
    for name, artefact in found.items():
        content = (tmp_path / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert artefact == Artefact(sha256=digest, bytes=len(content))
        if name.endswith(".png"):
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
    with np.load(tmp_path / "triggers.npz", allow_pickle=False) as archive:
        for name, array in numbers.items():
            assert (archive[name] == array).all()


def test_run_without_a_trial_leaves_no_trigger(tmp_path: Path, numbers: dict[str, Any]) -> None:
    """What is not spoken of is not looked at, whatever lies there."""
    assert numbers
    assert make_trigger_files(tmp_path, Evidence(), SPEC) == {}


@pytest.mark.parametrize("spoilt", [b"", b"\xff" * 10, None])
def test_damaged_trial_is_our_fault(
    tmp_path: Path, numbers: dict[str, Any], spoilt: bytes | None
) -> None:
    """Numbers that are too few, too many or out of their range make no file."""
    honest = (tmp_path / TRIAL).read_bytes()
    assert numbers
    content = honest + b"\0" if spoilt is None else spoilt + honest[len(spoilt) or len(honest) :]
    (tmp_path / TRIAL).write_bytes(content)
    with pytest.raises(InternalError):
        make_trigger_files(tmp_path, TRIED, SPEC)
    assert not list(tmp_path.glob("trigger*"))


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("mask", 1.0, True),
        ("mask", -0.01, False),
        ("pattern", 1.01, False),
        ("added", -1.0, True),
        ("added", -1.01, False),
        ("added", 1.01, False),
        ("added", np.nan, False),
        ("shift", -8.0, True),  # as many pixels as a side has
        ("shift", 8.0, True),
        ("shift", 8.01, False),
        ("shift", -np.inf, False),
        ("stamped", -0.01, False),
        ("sample", 8, True),
        ("sample", 9, False),
        ("label", -1, False),
        ("target", -1, True),
        ("target", 4, False),
    ],
)
def test_every_number_has_its_range(
    tmp_path: Path, numbers: dict[str, Any], name: str, value: float, *, fine: bool
) -> None:
    """One that is beyond it spoils the whole."""
    numbers[name].flat[-1] = value
    (tmp_path / TRIAL).unlink()
    trial_files.write(numbers, tmp_path / TRIAL)
    if fine:
        assert make_trigger_files(tmp_path, TRIED, SPEC)
    else:
        with pytest.raises(InternalError, match=f"{name} holds a value"):
            make_trigger_files(tmp_path, TRIED, SPEC)


def test_no_link_in_the_place_of_the_trial_or_of_its_files_is_followed(
    tmp_path: Path, numbers: dict[str, Any]
) -> None:
    """Neither is read through a link, nor is anything written through one."""
    assert numbers
    (tmp_path / TRIAL).rename(tmp_path / "elsewhere")
    (tmp_path / TRIAL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=TRIAL):
        make_trigger_files(tmp_path, TRIED, SPEC)
    (tmp_path / TRIAL).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / TRIAL)
    (tmp_path / "triggers.npz").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        make_trigger_files(tmp_path, TRIED, SPEC)
    assert not (tmp_path / "victim").exists()
