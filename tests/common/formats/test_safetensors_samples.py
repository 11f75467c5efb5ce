"""
Samples in safetensors: torch's types, a header that lies, and bounded memory.

What arrays must be, in an .npz as in here, is tested in test_samples.py.
"""

import json
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from common.errors import (
    DamagedFile,
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    Problem,
    TooLarge,
)
from common.formats.samples import Purpose, SampleFile, inspect_samples
from tests.common.formats.test_safetensors import LIES
from tests.common.formats.test_torch_zip import FLOATS
from tests.hostile_files import entry, safetensors_file
from tests.service.forms import model_safetensors
from tests.support.inputs import npz
from worker.samples import load_samples

IMAGES = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])
MAX_BYTES = 64 << 20


def inspect(path: Path, purpose: Purpose = Purpose.SAMPLES) -> SampleFile:
    """Inspect with the limit of these tests."""
    return inspect_samples(path, purpose, max_bytes=MAX_BYTES)


def written(content: bytes, tmp_path: Path) -> Path:
    """Write the bytes of an upload."""
    path = tmp_path / "clean.safetensors"
    path.write_bytes(content)
    return path


def refused(content: bytes, tmp_path: Path) -> Problem:
    """Return what the gate says of a file that it must not take."""
    with pytest.raises(Problem) as caught:
        inspect(written(content, tmp_path))
    assert caught.value.hint
    return caught.value


# Honest files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_images_of_every_float_type_of_torch_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    """``save_file({"images": images, "labels": labels})`` is all that a user of torch has to do."""
    path = tmp_path / "s"
    save_file({"images": IMAGES.to(dtype), "labels": LABELS, "target": torch.tensor(2)}, path)
    assert inspect(path, Purpose.TRIGGERED) == SampleFile(
        count=4, image_shape=(3, 5, 6), labels=(0, 1, 2, 1), targets=(2, 2, 2, 2)
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, -0.01, 1.0 + 2**-7],
    ids=["NaN", "infinity", "minus infinity", "below 0", "above 1"],
)
def test_value_outside_the_range_is_found(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    """The least that any type can be above 1, and what is no number, in the last of many chunks."""
    images = torch.ones(5, 1, 512, 512).to(dtype)
    images[-1, -1, -1, -1] = value
    assert isinstance(refused(save({"images": images}), tmp_path), ImagesOutOfRange)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]
)
def test_types_that_no_model_has_may_lie_beside(tmp_path: Path, dtype: torch.dtype) -> None:
    """What nobody asks for is left alone, whatever it is of; but no images are of it."""
    other = torch.ones(4, 3, 5, 6).to(dtype)
    assert inspect(written(save({"images": IMAGES, "other": other}), tmp_path)).count == 4
    assert isinstance(refused(save({"images": other}), tmp_path), InvalidImages)


def test_metadata_may_lie_beside(tmp_path: Path) -> None:
    """A note in the header is not looked at."""
    path = written(save({"images": IMAGES}, metadata={"format": "pt", "note": "größe"}), tmp_path)
    assert inspect(path).count == 4


def test_header_whose_length_reads_as_a_zip_passes(tmp_path: Path) -> None:
    """A header of 19280 bytes starts as a zip does, and is still a header."""
    entries = {"images": entry("U8", [1, 2, 2, 3], 0, 12)}
    header = json.dumps(entries).encode().ljust(int.from_bytes(b"PK", "little"))
    path = written(safetensors_file(header, bytes(12)), tmp_path)
    assert path.read_bytes().startswith(b"PK")
    assert inspect(path).count == 1
    assert len(load_samples(path, Purpose.SAMPLES).images) == 1


# Files with two readings ---------------------------------------------------------------------------


def test_zip_at_the_end_is_not_read(tmp_path: Path) -> None:
    """An .npz as the last tensor is found by ``zipfile``; gate and loader both read the first one."""
    other = npz(images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.arange(9))
    entries = {
        "images": entry("U8", [1, 2, 2, 3], 0, 12),
        "z": entry("U8", [len(other)], 12, 12 + len(other)),
    }
    path = written(safetensors_file(entries, bytes(12) + other), tmp_path)
    assert inspect(path).count == 1
    assert load_samples(path, Purpose.SAMPLES).images.shape == (1, 3, 2, 2)


# Hostile files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    """What is damage in a model is damage in samples, and the rest is said with a hint for samples."""
    content, problem = LIES[lie]
    found = refused(content, tmp_path)
    # A file that does not even start as this format does is none.
    assert type(found) in ({DamagedFile} if problem is DamagedFile else {InvalidSamples})
    assert "torch.save" not in found.hint


def test_truncated_file_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    """A file that is cut anywhere behind its first bytes is damaged."""
    whole = save({"images": IMAGES, "labels": LABELS})
    for length in [9, 20, *range(60, len(whole), 41), len(whole) - 1]:
        assert isinstance(refused(whole[:length], tmp_path), DamagedFile)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"12345678{", InvalidSamples),
        (model_safetensors(), InvalidSamples),
        (safetensors_file({}), InvalidSamples),
        (save({"images": IMAGES, "x": LABELS}), InvalidSamples),
        (safetensors_file({"images": entry("C64", [1, 1, 1, 1], 0, 8)}, bytes(8)), InvalidSamples),
        (save({"images": (IMAGES * 255).byte()[0]}), InvalidImages),
        (save({"images": IMAGES, "labels": LABELS.float()}), InvalidLabels),
        (safetensors_file({"images": entry("U8", [1 << 20, 1, 1, 0], 0, 0)}), TooLarge),
        (safetensors_file({"images": entry("U8", [1, 1, 1, 0], 0, 0)}), InvalidImages),
    ],
    ids=["a text", "a model", "nothing", "images twice", "complex", "no batch", "float labels",
         "a great many", "no channel"],
)  # fmt: skip
def test_wrong_content_is_refused(tmp_path: Path, content: bytes, problem: type[Problem]) -> None:
    """Each mistake is refused by its class."""
    assert type(refused(content, tmp_path)) is problem


def test_bytes_in_the_order_of_torch_are_told_from_images(tmp_path: Path) -> None:
    """uint8 (N, C, H, W) are taken for W channels, and the hint of what follows says what to do."""
    path = written(save({"images": (IMAGES * 255).byte()}), tmp_path)
    assert inspect(path).image_shape == (6, 3, 5)
    assert "images / 255" in InvalidImages().hint


def test_file_above_the_limit_is_too_large(tmp_path: Path) -> None:
    """Nothing is read of a file that is larger than samples may be."""
    path = written(save({"images": IMAGES}), tmp_path)
    assert inspect_samples(path, Purpose.SAMPLES, max_bytes=path.stat().st_size).count == 4
    with pytest.raises(TooLarge):
        inspect_samples(path, Purpose.SAMPLES, max_bytes=path.stat().st_size - 1)


@pytest.mark.parametrize("dtype", ["U8", "F64", "BF16"])
def test_images_are_read_in_bounded_memory(tmp_path: Path, dtype: str) -> None:
    """A large file is never held as a whole, nor widened as a whole."""
    size = {"U8": 1, "F64": 8, "BF16": 2}[dtype]
    count = (48 << 20) // size // 1024
    path = tmp_path / "s"
    entries = {"images": entry(dtype, [count, 32, 32, 1], 0, count * 1024 * size)}
    path.write_bytes(safetensors_file(entries))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count * 1024 * size)
    tracemalloc.start()
    assert inspect(path).count == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_labels_are_little_endian(tmp_path: Path) -> None:
    """Numbers are in the format's order of bytes, whatever the machine's is."""
    entries = {"images": entry("U8", [1, 1, 1, 1], 0, 1), "labels": entry("I32", [1], 1, 5)}
    path = written(safetensors_file(entries, b"\0" + struct.pack("<i", 258)), tmp_path)
    assert inspect(path).labels == (258,)
