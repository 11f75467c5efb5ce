"""Sample files as tensors: what the gate promises is checked again, as if there were no gate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save

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


# The same arrays in safetensors ---------------------------------------------------------------------


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("images", [BYTES, FLOATS + 0.3, FLOATS + 1 / 3, FLOATS.astype("f2")])
@pytest.mark.parametrize("target", [1, [1, 0]])
def test_safetensors_and_npz_load_alike(
    tmp_path: Path, purpose: Purpose, images: np.ndarray, target: Any
) -> None:
    """The same arrays are the same samples in either file."""
    arrays = {"images": images, "labels": LABELS, "target": np.array(target)}
    (tmp_path / "npz").write_bytes(npz(**arrays))
    (tmp_path / "safetensors").write_bytes(safetensors.numpy.save(arrays))
    first, second = (load_samples(tmp_path / name, purpose) for name in ("npz", "safetensors"))
    assert (first.targets is None) == (purpose is not Purpose.TRIGGERED)
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        if one is None:
            assert other is None
        else:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
            assert other.is_contiguous()


def test_bfloat16_is_exact(tmp_path: Path) -> None:
    """Images in bfloat16, which numpy does not know, keep every bit."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = loaded(tmp_path, save({"x": images, "y": torch.arange(2)}))
    assert torch.equal(found.images, images.float())
    assert found.labels is not None


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_labels_of_every_whole_type_of_torch_load(tmp_path: Path, dtype: torch.dtype) -> None:
    """Labels may be of the types that torch has for little else."""
    found = loaded(
        tmp_path, save({"images": torch.zeros(2, 1, 4, 4), "labels": torch.arange(2).to(dtype)})
    )
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]


def test_samples_outlive_their_file(tmp_path: Path) -> None:
    """The library maps a file into memory; what is loaded does not change with it."""
    found = loaded(tmp_path, save({"images": torch.full((2, 3, 4, 4), 0.5)}))
    with (tmp_path / "samples").open("r+b") as file:
        file.write(bytes((tmp_path / "samples").stat().st_size))
    assert bool((found.images == 0.5).all())


def test_other_tensors_are_never_read(tmp_path: Path) -> None:
    """A tensor of another name may be of a type that numpy cannot hold."""
    others = torch.zeros(3, dtype=torch.float8_e5m2)
    assert len(loaded(tmp_path, save({"images": torch.zeros(2, 3, 4, 4), "z": others})).images) == 2


def _images_of(dtype: str, shape: list[int], data: bytes = b"") -> bytes:
    return hostile.safetensors_file({"images": hostile.entry(dtype, shape, 0, len(data))}, data)


BAD_SAFETENSORS: dict[str, tuple[Callable[[], bytes], type[Refused]]] = {
    "half a file": (lambda: save({"images": torch.zeros(2, 3, 4, 4)})[:200], InvalidSamples),
    "a header of exabytes": (
        lambda: hostile.safetensors_file({"a": 1}, length=1 << 62), InvalidSamples),
    "no JSON": (lambda: hostile.safetensors_file(b"{" * 100), InvalidSamples),
    "no images": (lambda: save({"labels": torch.arange(2)}), InvalidSamples),
    "images under two names": (
        lambda: save({"images": torch.zeros(2, 3, 4, 4), "x": torch.ones(1)}), InvalidSamples),
    "a terabyte": (lambda: _images_of("F32", [1 << 30, 1, 16, 16], bytes(8)), InvalidSamples),
    "a product that wraps": (lambda: _images_of("F32", [1 << 32, 1 << 32, 1, 1]), InvalidSamples),
    "sides that overflow": (lambda: _images_of("F32", [0, 1 << 40, 1 << 40, 1]), InvalidSamples),
    "an unknown type": (lambda: _images_of("OBJ", [1, 1, 1, 1], bytes(1)), InvalidSamples),
    "a type of a byte": (lambda: _images_of("F8_E4M3", [1, 1, 1, 1], bytes(1)), InvalidSamples),
    "three sides": (lambda: _images_of("U8", [1, 1, 1], bytes(1)), InvalidImages),
    "no height": (lambda: _images_of("U8", [1, 0, 1, 1]), InvalidImages),
    "no image": (lambda: _images_of("U8", [0, 1, 1, 1]), NoSamples),
    "whole numbers": (lambda: save({"images": torch.zeros(2, 3, 4, 4).int()}), InvalidImages),
    "a NaN": (lambda: save({"images": torch.full((2, 3, 4, 4), torch.nan)}), ImagesOutOfRange),
    "a NaN in bfloat16": (
        lambda: save({"images": torch.full((2, 3, 4, 4), torch.nan).bfloat16()}), ImagesOutOfRange),
    "above 1": (lambda: save({"images": torch.full((2, 3, 4, 4), 2.0)}), ImagesOutOfRange),
    "too few labels": (
        lambda: save({"images": torch.zeros(2, 3, 4, 4), "labels": torch.arange(1)}), InvalidLabels),
    "fractions for labels": (
        lambda: save({"images": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2).bfloat16()}),
        InvalidLabels),
    "a negative target": (
        lambda: save({"images": torch.zeros(2, 3, 4, 4), "target": torch.tensor(-1)}), InvalidLabels),
}  # fmt: skip


# Without the gate -----------------------------------------------------------------------------------


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


ALL_BAD = BAD | {f"safetensors: {name}": each for name, each in BAD_SAFETENSORS.items()}


@pytest.mark.parametrize("bad", ALL_BAD)
def test_bad_file_is_refused_without_the_gate(tmp_path: Path, bad: str) -> None:
    """What the gate should have stopped is refused by a name of its own, with a hint."""
    build, problem = ALL_BAD[bad]
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
