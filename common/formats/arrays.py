"""
Check the arrays of a sample file value by value, in chunks, whichever file they lie in.

    inspect(named, purpose) -> SampleFile

``npz`` and ``safetensors`` say which arrays there are, by name, and how each is opened; one that nobody
asks for is never opened.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import (
    DamagedFile,
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
    TooLarge,
)
from common.formats.samples import MAX_IMAGES, MAX_SIDE, Purpose, SampleFile

MAX_ARRAYS = 16
"""Arrays in a file: three are known, and a script may leave a few more in it."""

MAX_NUMBER = (1 << 63) - 1
"""A label or a target, which the worker holds as int64."""

ALIASES = {"x": "images", "y": "labels"}

_CHUNK_BYTES = 1 << 20
_TARGET_HINT = (
    "Add the attack's class: np.savez(…, images=…, labels=…, target=0), or "
    'save_file({…, "target": torch.tensor(0)}, …).'
)
_LABELS_HINT = (
    "Add the true classes: np.savez(…, images=images, labels=labels), or "
    'save_file({"images": images, "labels": labels}, …).'
)


@dataclass(frozen=True, kw_only=True)
class Array:
    """
    An array that has been opened.

    Attributes:
        type: What the file calls the type of its values, to be shown.
        dtype: What ``chunks`` are of, which holds every value of that type exactly.
        chunks: The values, in the order of the file.
    """

    shape: tuple[int, ...]
    type: str
    dtype: np.dtype[Any]
    chunks: Iterator[npt.NDArray[Any]]


Opener = Callable[[], AbstractContextManager[Array]]


def inspect(named: Sequence[tuple[str, Opener]], purpose: Purpose) -> SampleFile:
    """
    Check every array that is known by its name.

    Raises:
        Refused: One is not as it must be.
    """
    openers = _by_name(named, purpose)
    if "images" not in openers:
        raise InvalidSamples(f"The {purpose} file holds no array named 'images' or 'x'.")
    count, image_shape = _check_images(openers["images"], purpose)
    labels = _whole_numbers(openers.get("labels"), "labels", count, purpose)
    targets = None
    if purpose is Purpose.TRIGGERED:
        targets = _whole_numbers(openers.get("target"), "target", count, purpose)
        if targets is None:
            raise InvalidLabels(
                "The triggered file holds no array named 'target'.", hint=_TARGET_HINT
            )
    if labels is None and purpose is not Purpose.SAMPLES:
        raise InvalidLabels(
            f"The {purpose} file holds no array named 'labels' or 'y'.", hint=_LABELS_HINT
        )
    return SampleFile(count=count, image_shape=image_shape, labels=labels, targets=targets)


def read_values(file: IO[bytes], dtype: np.dtype[Any], nbytes: int) -> Iterator[npt.NDArray[Any]]:
    """
    Read *nbytes* of values from where *file* stands.

    Raises:
        DamagedFile: It ends before them.
    """
    step = max(_CHUNK_BYTES // dtype.itemsize, 1) * dtype.itemsize
    while nbytes:
        chunk = file.read(min(step, nbytes))
        if not chunk or len(chunk) % dtype.itemsize:
            raise DamagedFile("An array ends before its last value.")
        nbytes -= len(chunk)
        yield np.frombuffer(chunk, dtype)


def _by_name(named: Sequence[tuple[str, Opener]], purpose: Purpose) -> dict[str, Opener]:
    if len(named) > MAX_ARRAYS:
        raise InvalidSamples(f"The {purpose} file holds more than {MAX_ARRAYS} arrays.")
    openers: dict[str, Opener] = {}
    for alias, opener in named:
        name = ALIASES.get(alias, alias)
        if name in openers:
            raise InvalidSamples(f"The {purpose} file holds {name!r} twice.")
        openers[name] = opener
    return openers


def _check_images(opener: Opener, purpose: Purpose) -> tuple[int, tuple[int, int, int]]:
    with opener() as images:
        if len(images.shape) != 4:
            raise InvalidImages(f"The {purpose} images have the shape {images.shape}.")
        is_bytes = images.dtype == np.uint8
        if not is_bytes and images.dtype.kind != "f":
            raise InvalidImages(f"The {purpose} images are of the type {images.type}.")
        count, *rest = images.shape
        height, width, channels = rest if is_bytes else (rest[1], rest[2], rest[0])
        if not count:
            raise NoSamples(f"The {purpose} file holds no image.")
        if count > MAX_IMAGES:
            raise TooLarge(f"The {purpose} file holds {count} images; {MAX_IMAGES} are allowed.")
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and 0 < channels <= MAX_SIDE):
            raise InvalidImages(f"The {purpose} images have the shape {images.shape}.")
        for values in images.chunks:
            # A NaN fails both comparisons, which is why they are not turned around.
            if not is_bytes and not ((values >= 0) & (values <= 1)).all():
                raise ImagesOutOfRange(
                    f"The {purpose} images go from {values.min():g} to {values.max():g}."
                )
    return count, (channels, height, width)


def _whole_numbers(
    opener: Opener | None, name: str, count: int, purpose: Purpose
) -> tuple[int, ...] | None:
    if opener is None:
        return None
    with opener() as numbers:
        if numbers.dtype.kind not in "iu":
            raise InvalidLabels(f"The {purpose} {name} are of the type {numbers.type}.")
        one_for_all = name == "target" and numbers.shape == ()
        if numbers.shape != (count,) and not one_for_all:
            raise InvalidLabels(
                f"The {purpose} {name} have the shape {numbers.shape}; "
                f"{count} images need ({count},)."
            )
        values = [int(n) for chunk in numbers.chunks for n in chunk]
    for extreme in (min(values), max(values)):
        if not 0 <= extreme <= MAX_NUMBER:
            raise InvalidLabels(f"The {purpose} {name} hold {extreme}.")
    return tuple(values * count if one_for_all else values)
