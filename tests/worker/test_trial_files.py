"""The arrays of a trial cross the process as bare numbers, and nothing else comes through."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worker.trial_files import NO_TARGET, Counts, layout, read, write, write_npz

SHAPE = (3, 4, 5)
COUNTS = Counts(triggers=2, samples=6, shown=3)
CLASSES, SAMPLES = 7, 100


def honest() -> dict[str, Any]:
    """Return the arrays of an honest child."""
    random = np.random.default_rng(0)
    return {
        name: (
            random.random(shape, dtype=np.float32)
            if dtype.kind == "f"
            else random.integers(0, CLASSES, shape)
        )
        for name, (dtype, shape) in layout(COUNTS, SHAPE).items()
    }


def written(folder: Path, arrays: dict[str, Any]) -> bytes:
    """Return what a child writes."""
    write(arrays, folder / "trial")
    return (folder / "trial").read_bytes()


def received(content: bytes, counts: Counts = COUNTS) -> dict[str, Any]:
    """Return what the supervisor reads."""
    return read(io.BytesIO(content), counts, image_shape=SHAPE, classes=CLASSES, samples=SAMPLES)


def test_arrays_come_back(tmp_path: Path) -> None:
    """``read(write(arrays)) == arrays``, types and shapes included."""
    arrays = honest()
    found = received(written(tmp_path, arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert (found[name] == array).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask", np.nan),
        ("pattern", np.inf),
        ("clean", -0.1),
        ("stamped", 1.1),
        ("target", CLASSES),
        ("target", NO_TARGET - 1),
        ("label", -1),
        ("sample", SAMPLES),
        ("clean_before", CLASSES),
        ("stamped_after", 2**62),
    ],
)
def test_value_out_of_its_range_is_refused(tmp_path: Path, name: str, value: float) -> None:
    """No picture has a value outside [0, 1], and no class is one that the model does not have."""
    arrays = honest()
    arrays[name].flat[-1] = value
    with pytest.raises(ValueError, match=name):
        received(written(tmp_path, arrays))


def test_a_trigger_may_have_no_target(tmp_path: Path) -> None:
    """It sends each class to another one."""
    arrays = honest()
    arrays["target"].flat[-1] = NO_TARGET
    assert received(written(tmp_path, arrays))["target"].flat[-1] == NO_TARGET


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    """A byte too few, a byte too many, or other counts than were written are refused."""
    content = written(tmp_path, honest())
    for wrong in (b"", content[:-1], content + b"\0"):
        with pytest.raises(ValueError, match=r"shorter|behind"):
            received(wrong)
    with pytest.raises(ValueError, match=r"shorter|behind|range"):
        received(content, Counts(triggers=1, samples=6, shown=3))


def test_counts_that_ask_for_too_much_are_refused() -> None:
    """Nothing is read where an array would be larger than an honest one."""
    with pytest.raises(ValueError, match="more values"):
        read(
            io.BytesIO(),
            Counts(triggers=16, samples=64, shown=64),
            image_shape=(3, 224, 224),
            classes=CLASSES,
            samples=SAMPLES,
        )


def test_npz_is_loaded_without_pickle(tmp_path: Path) -> None:
    """Every array is in the file under its name, as float32 or int64; the bytes are always the same."""
    arrays = honest()
    for name in ("one.npz", "other.npz"):
        write_npz(arrays, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as archive:
        assert set(archive.files) == set(arrays)
        for name, array in arrays.items():
            assert archive[name].dtype in {np.dtype(np.float32), np.dtype(np.int64)}
            assert (archive[name] == array).all()
    with pytest.raises(FileExistsError):
        write_npz(arrays, tmp_path / "one.npz")
