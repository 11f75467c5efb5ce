"""Sample files as tensors: images float32 (N, C, H, W) in [0, 1], labels and targets int64 (N,)."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor

from common.errors import (
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
)
from common.formats import image_folders
from common.formats.arrays import ALIASES
from common.formats.safetensors import is_safetensors
from common.formats.samples import Purpose
from worker.image_folders import load as load_folders

Array = npt.NDArray[Any]

_DAMAGE = (
    safetensors.SafetensorError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RecursionError,
    RuntimeError,  # encrypted, or compressed in a way that Python does not know
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)
"""What zipfile, numpy and safetensors throw at a file that is not what it says."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """
    Images with what is known of them.

    Attributes:
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64, or ``None`` when the file has none.
        targets: ``(N,)`` int64, the class each trigger aims at; only in triggered samples.
    """

    images: Tensor
    labels: Tensor | None
    targets: Tensor | None


def load_samples(path: Path, purpose: Purpose) -> Samples:
    """
    Load a sample file that the gate has let through.

    Arrays that *purpose* has no use for are never read, as the gate does not read them.

    Raises:
        InvalidSamples: It is damaged after all.
        NoSamples: It holds no image.
        InvalidImages: The images are no images.
        ImagesOutOfRange: One has a value that is none, or outside [0, 1].
        InvalidLabels: Labels or targets are no whole numbers, one for each image.
    """
    wanted = {"images", "labels"} | ({"target"} if purpose is Purpose.TRIGGERED else set())
    try:
        arrays = _arrays(path, wanted)
    except _DAMAGE as exc:
        raise InvalidSamples(f"The sample file cannot be read: {str(exc)[:200]}.") from exc
    if "images" not in arrays:
        raise InvalidSamples
    images = _images(arrays["images"])
    return Samples(
        images=images,
        labels=_whole_numbers(arrays.get("labels"), len(images)),
        targets=_whole_numbers(arrays.get("target"), len(images), one_for_all=True),
    )


def _arrays(path: Path, wanted: Collection[str]) -> dict[str, Array]:
    """Read what is *wanted*, whichever file it is in."""
    if is_safetensors(path):
        with safetensors.safe_open(path, "pt") as file:
            chosen = _chosen(file.keys(), wanted)
            return {name: _in_numpy(file.get_tensor(its)) for name, its in chosen.items()}
    if not zipfile.is_zipfile(path):
        raise InvalidSamples("The sample file is none of .npz, .safetensors and a zip of images.")
    with zipfile.ZipFile(path) as zipped:
        if image_folders.are_in(zipped):
            images, labels = load_folders(path)
            return {"images": images, "labels": labels}
        with np.load(path, allow_pickle=False) as archive:
            chosen = _chosen(archive.files, wanted)
            return {name: _read(archive, zipped, its) for name, its in chosen.items()}


def _chosen(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """Return what the file calls each of the arrays that are *wanted*."""
    chosen: dict[str, str] = {}
    for alias in names:
        name = ALIASES.get(alias, alias)
        if name in chosen:
            raise InvalidSamples("The sample file holds an array under two names.")
        if name in wanted:
            chosen[name] = alias
    return chosen


def _in_numpy(tensor: Tensor) -> Array:
    """Copy a tensor out of the mapped file; numpy has no bfloat16, and float32 holds its values."""
    if tensor.dtype is torch.bfloat16:
        return tensor.float().numpy()
    return tensor.numpy().copy()


def _read(archive: np.lib.npyio.NpzFile, zipped: zipfile.ZipFile, name: str) -> Array:
    """
    Read one array, whose header is compared with the member's size before its memory is asked for.

    Raises:
        ValueError: It is no array, or is shorter than it says.
    """
    info = next(info for info in zipped.infolist() if info.filename.removesuffix(".npy") == name)
    with zipped.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is of a version that numbers do not need")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{name} is shorter than its shape says")
    array = archive[name]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is no array")  # noqa: TRY004 - the file's fault, not the caller's
    return array


def _images(array: Array) -> Tensor:
    if array.ndim != 4 or not all(array.shape[1:]):
        raise InvalidImages(f"The images have the shape {array.shape}.")
    if not len(array):
        raise NoSamples
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).float() / 255
    if array.dtype.kind != "f":  # numpy would parse texts, and drop half of a complex number
        raise InvalidImages(f"The images are of the type {str(array.dtype)[:40]}.")
    with np.errstate(over="ignore"):  # what overflows is out of range
        images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    # A NaN fails both comparisons, which is why they are not turned around.
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ImagesOutOfRange
    return images


def _whole_numbers(array: Array | None, count: int, *, one_for_all: bool = False) -> Tensor | None:
    if array is None:
        return None
    if array.shape != (count,) and not (one_for_all and array.shape == ()):
        raise InvalidLabels(f"{count} images have labels of the shape {array.shape}.")
    if array.dtype.kind not in "iu":
        raise InvalidLabels(f"Labels of the type {str(array.dtype)[:40]}.")
    numbers = array.astype(np.int64)  # contiguous, in the machine's order of bytes
    if bool((numbers < 0).any()):
        raise InvalidLabels("A label is negative, or larger than any number of classes.")
    return torch.from_numpy(np.broadcast_to(numbers, count).copy())
