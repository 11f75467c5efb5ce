"""Sample files as tensors: what the gate promises is checked again, as if there were no gate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import (
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
    Refused,
    UnsafeZip,
)
from common.formats.samples import Purpose
from tests import hostile_files as hostile
from tests.support.inputs import npz
from worker.samples import Samples, load_samples

BYTES = np.zeros((2, 4, 4, 3), np.uint8)
FLOATS = np.zeros((2, 3, 4, 4), np.float32)
LABELS = np.arange(2)


def loaded(folder: Path, content: bytes) -> Samples:
    """Return what the loader makes of *content*."""
    (folder / "samples").write_bytes(content)
    return load_samples(folder / "samples", Purpose.TRIGGERED)


@pytest.mark.parametrize("images", [BYTES, FLOATS, FLOATS.astype(">f8"), FLOATS.astype("f2")])
@pytest.mark.parametrize("order", ["C", "F"])
def test_images_are_contiguous_float32_in_range(
    tmp_path: Path, images: np.ndarray, order: Any
) -> None:
    """Whatever order of bytes and sides a file has, images are (N, C, H, W) float32, row by row."""
    found = loaded(tmp_path, npz(images=np.array(images, order=order), labels=LABELS.astype(">u2")))
    assert found.images.shape == (2, 3, 4, 4)
    assert found.images.dtype == torch.float32
    assert found.images.is_contiguous()
    assert found.labels is not None
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [0, 1]


def test_one_target_stands_for_all(tmp_path: Path) -> None:
    """A single target is every image's, in memory of its own."""
    found = loaded(tmp_path, npz(images=BYTES, labels=LABELS, target=3))
    assert found.targets is not None
    assert found.targets.is_contiguous()
    assert found.targets.tolist() == [3, 3]


def test_aliases_are_names(tmp_path: Path) -> None:
    """``x`` and ``y`` are images and labels."""
    found = loaded(tmp_path, npz(x=BYTES, y=LABELS))
    assert found.labels is not None


def test_other_arrays_are_never_read(tmp_path: Path) -> None:
    """An array of another name may be anything, a pickle too: nobody looks at it."""
    others = np.array([{"any": "thing"}], dtype=object)
    assert len(loaded(tmp_path, npz(images=BYTES, names=others)).images) == 2


def test_targets_are_read_where_they_are_used(tmp_path: Path) -> None:
    """A target beside clean samples is nothing to the gate, and so nothing to the loader."""
    (tmp_path / "samples").write_bytes(npz(images=BYTES, labels=LABELS, target=[-1, 0, 1]))
    assert load_samples(tmp_path / "samples", Purpose.SAMPLES).targets is None
    with pytest.raises(InvalidLabels):
        load_samples(tmp_path / "samples", Purpose.TRIGGERED)


def _image(header: str, data: bytes = b"", **options: Any) -> bytes:
    return hostile.npz({"images": hostile.npy(header, data, **options)})


BAD: dict[str, tuple[Callable[[], bytes], type[Refused]]] = {
    "nothing": (lambda: b"", InvalidSamples),
    "no zip": (lambda: b"no zip at all", InvalidSamples),
    "a bare array": (lambda: hostile.npy(hostile.npy_header((1,)), b"x"), InvalidSamples),
    "a bare pickle": (lambda: hostile.pickled(hostile.named("os", "system")), InvalidSamples),
    "half a zip": (lambda: npz(images=BYTES)[:200], InvalidSamples),
    "encrypted": (hostile.zip_that_says_encrypted, UnsafeZip),
    "no images": (lambda: npz(labels=LABELS), InvalidSamples),
    "images under two names": (lambda: npz(images=BYTES, x=BYTES), InvalidSamples),
    "no array": (lambda: hostile.npz({"images": b"no array"}), InvalidSamples),
    "objects": (lambda: npz(images=np.array([{}], object)), InvalidSamples),
    "a terabyte": (lambda: _image(hostile.npy_header((1 << 40, 4, 4, 3))), InvalidSamples),
    "a product that wraps": (
        lambda: _image(hostile.npy_header((1 << 32, 1 << 32, 1, 1))), InvalidSamples),
    "negative sides": (lambda: _image(hostile.npy_header((-1, -4, 4, 3))), InvalidSamples),
    "nested brackets": (lambda: _image("(" * 5000), InvalidSamples),
    "another version": (
        lambda: _image(hostile.npy_header((1, 1, 1, 1)), b"x", version=(3, 0)), InvalidSamples),
    "three sides": (lambda: npz(images=BYTES[0]), InvalidImages),
    "no height": (lambda: npz(images=BYTES[:, :0]), InvalidImages),
    "no image": (lambda: npz(images=BYTES[:0]), NoSamples),
    "texts": (lambda: npz(images=np.full((1, 3, 4, 4), "0.5")), InvalidImages),
    "complex numbers": (lambda: npz(images=FLOATS.astype(complex)), InvalidImages),
    "truth values": (lambda: npz(images=FLOATS.astype(bool)), InvalidImages),
    "whole numbers": (lambda: npz(images=FLOATS.astype(int)), InvalidImages),
    "a NaN": (lambda: npz(images=np.full_like(FLOATS, np.nan)), ImagesOutOfRange),
    "infinity": (lambda: npz(images=np.full_like(FLOATS, np.inf)), ImagesOutOfRange),
    "more than float32 holds": (
        lambda: npz(images=np.full((1, 3, 4, 4), 1e300)), ImagesOutOfRange),
    "below 0": (lambda: npz(images=FLOATS - 0.1), ImagesOutOfRange),
    "too few labels": (lambda: npz(images=BYTES, labels=LABELS[:1]), InvalidLabels),
    "one label for all": (lambda: npz(images=BYTES, labels=1), InvalidLabels),
    "labels in two rows": (lambda: npz(images=BYTES, labels=[LABELS]), InvalidLabels),
    "fractions for labels": (lambda: npz(images=BYTES, labels=LABELS / 2), InvalidLabels),
    "a negative label": (lambda: npz(images=BYTES, labels=LABELS - 1), InvalidLabels),
    "a label past every class": (
        lambda: npz(images=BYTES, labels=np.full(2, 2**64 - 1, np.uint64)), InvalidLabels),
    "a negative target": (lambda: npz(images=BYTES, target=-1), InvalidLabels),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_file_is_refused_without_the_gate(tmp_path: Path, bad: str) -> None:
    """What the gate should have stopped is refused by a name of its own, with a hint."""
    build, problem = BAD[bad]
    with pytest.raises(problem) as caught:
        loaded(tmp_path, build())
    assert caught.value.hint


def test_object_array_runs_nothing(tmp_path: Path) -> None:
    """The pickle in an array of objects is not read."""
    canary = tmp_path / "canary"
    pickle = hostile.pickled(hostile.GADGETS["eval"](canary))
    with pytest.raises(InvalidSamples):
        loaded(tmp_path, _image(hostile.npy_header((), "|O"), pickle))
    assert not canary.exists()
