"""
Tell what a sample file holds, and check every value in it, in bounded memory.

A sample file is an ``.npz`` with ``images`` (uint8 NHWC, or float NCHW in [0, 1]), ``labels`` (whole
numbers) and, for triggered samples, ``target``; ``x`` and ``y`` are aliases. Arrays are read in chunks
and never as a whole; nothing is unpickled.
"""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import (
    ClassCountMismatch,
    DamagedFile,
    EmptyFile,
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
    TooLarge,
)
from common.formats.zips import is_zip, opened_zip

MAX_MEMBERS = 16
"""Arrays in an .npz: three are known, and a script may leave a few more in it."""

MAX_SIDE = 4096
"""Height or width of an image."""

MAX_IMAGES = 1_000_000
"""Images in a file, so that labels, which are held as a whole, take little memory."""

_MAX_DIRECTORY_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20
ALIASES = {"x": "images", "y": "labels"}


class Purpose(StrEnum):
    """What a sample file is for, which says what it must hold."""

    SAMPLES = "samples"  # clean images to purify with; labels are optional
    EVALUATION = "evaluation"  # clean, labelled images, only to measure
    TRIGGERED = "triggered"  # triggered images with true labels and target, only to measure


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A sample file's facts; ``image_shape`` is (channels, height, width) whatever the layout."""

    count: int
    image_shape: tuple[int, int, int]
    labels: tuple[int, ...] | None
    targets: tuple[int, ...] | None

    @property
    def classes(self) -> int | None:
        """How many classes have a sample; ``None`` without labels."""
        return None if self.labels is None else len(set(self.labels))


@dataclass(frozen=True, kw_only=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """The number of values, exact whatever the declared shape."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def inspect_samples(path: Path, purpose: Purpose, *, max_bytes: int) -> SampleFile:
    """
    Read and check a sample file.

    Args:
        path: The file as uploaded.
        purpose: What it must hold.
        max_bytes: Size of all its arrays together, unpacked.

    Raises:
        Refused: It is no such file; the class says why.
    """
    if not path.stat().st_size:
        raise EmptyFile(f"The {purpose} file is empty.")
    if not is_zip(path):
        raise InvalidSamples(f"The {purpose} file is not an .npz.")
    try:
        with opened_zip(
            path,
            max_members=MAX_MEMBERS,
            max_directory_bytes=_MAX_DIRECTORY_BYTES,
            refusal=InvalidSamples(f"The {purpose} file holds more than {MAX_MEMBERS} arrays."),
        ) as archive:
            return _inspect(archive, purpose, max_bytes)
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
        zlib.error,
    ) as exc:
        raise DamagedFile(f"The {purpose} file is a truncated or damaged zip.") from exc


def check_labels(file: SampleFile, purpose: Purpose, *, classes: int) -> None:
    """
    Check that every label and target is one of the model's classes.

    Raises:
        ClassCountMismatch: One is not.
    """
    for name, values in (("label", file.labels), ("target", file.targets)):
        highest = max(values or (0,))
        if highest >= classes:
            raise ClassCountMismatch(
                f"The {purpose} file has the {name} {highest}; the model has {classes} classes, "
                f"0 to {classes - 1}."
            )


def _inspect(archive: zipfile.ZipFile, purpose: Purpose, max_bytes: int) -> SampleFile:
    members = _members(archive, purpose)
    if sum(info.file_size for info in members.values()) > max_bytes:
        raise TooLarge(f"The {purpose} file unpacks to more than {max_bytes} bytes.")
    if "images" not in members:
        raise InvalidSamples(f"The {purpose} file holds no array named 'images' or 'x'.")
    count, image_shape = _check_images(archive, members["images"], purpose)
    labels = _whole_numbers(archive, members.get("labels"), "labels", count, purpose)
    targets = None
    if purpose is Purpose.TRIGGERED:
        targets = _whole_numbers(archive, members.get("target"), "target", count, purpose)
        if targets is None:
            raise InvalidLabels(
                "The triggered file holds no array named 'target'.",
                hint="Add the attack's class: np.savez(…, images=…, labels=…, target=0).",
            )
    if labels is None and purpose is not Purpose.SAMPLES:
        raise InvalidLabels(
            f"The {purpose} file holds no array named 'labels' or 'y'.",
            hint="Add the true classes: np.savez(…, images=images, labels=labels).",
        )
    return SampleFile(count=count, image_shape=image_shape, labels=labels, targets=targets)


def _members(archive: zipfile.ZipFile, purpose: Purpose) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise InvalidSamples(f"The {purpose} file holds more than {MAX_MEMBERS} arrays.")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        # The other methods are never numpy's, and a few bytes of LZMA can ask for gigabytes.
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise InvalidSamples(
                f"The {purpose} file is compressed in a way that numpy never uses."
            )
        name = info.filename.removesuffix(".npy")
        name = ALIASES.get(name, name)
        if name in members:
            raise InvalidSamples(f"The {purpose} file holds {name!r} twice.")
        members[name] = info
    return members


def _check_images(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, purpose: Purpose
) -> tuple[int, tuple[int, int, int]]:
    with archive.open(info) as member:
        header = _header(member, info, "images")
        if len(header.shape) != 4:
            raise InvalidImages(f"The {purpose} images have the shape {header.shape}.")
        is_bytes = header.dtype == np.uint8
        if not is_bytes and header.dtype.kind != "f":
            raise InvalidImages(f"The {purpose} images are of the type {header.dtype}.")
        count, *rest = header.shape
        height, width, channels = rest if is_bytes else (rest[1], rest[2], rest[0])
        if not count:
            raise NoSamples(f"The {purpose} file holds no image.")
        if count > MAX_IMAGES:
            raise TooLarge(f"The {purpose} file holds {count} images; {MAX_IMAGES} are allowed.")
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and 0 < channels <= MAX_SIDE):
            raise InvalidImages(f"The {purpose} images have the shape {header.shape}.")
        for values in _chunks(member, header):
            # A NaN fails both comparisons, which is why they are not turned around.
            if not is_bytes and not ((values >= 0) & (values <= 1)).all():
                raise ImagesOutOfRange(
                    f"The {purpose} images go from {values.min():g} to {values.max():g}."
                )
    return count, (channels, height, width)


def _whole_numbers(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo | None,
    name: str,
    count: int,
    purpose: Purpose,
) -> tuple[int, ...] | None:
    if info is None:
        return None
    with archive.open(info) as member:
        header = _header(member, info, name)
        if header.dtype.kind not in "iu":
            raise InvalidLabels(f"The {purpose} {name} are of the type {header.dtype}.")
        one_for_all = name == "target" and header.shape == ()
        if header.shape != (count,) and not one_for_all:
            raise InvalidLabels(
                f"The {purpose} {name} have the shape {header.shape}; "
                f"{count} images need ({count},)."
            )
        values = [int(n) for chunk in _chunks(member, header) for n in chunk]
    if min(values) < 0:
        raise InvalidLabels(f"The {purpose} {name} hold {min(values)}.")
    return tuple(values * count if one_for_all else values)


def _header(member: IO[bytes], info: zipfile.ZipInfo, name: str) -> _Header:
    """
    Read an array's header; numpy parses it as a literal of at most 10,000 characters.

    Only version 1.0 is read, whose header has at most 64 KiB: later ones may declare gigabytes, and
    numpy writes them only for structured types.
    """
    try:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("another version")  # noqa: TRY301 - refused as all that numpy refuses
        shape, _fortran, dtype = np.lib.format.read_array_header_1_0(member)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        SyntaxError,
        tokenize.TokenError,
        MemoryError,
        RecursionError,
    ) as exc:
        raise InvalidSamples(f"The array {name!r} has a damaged header.") from exc
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise InvalidSamples(f"The array {name!r} holds objects, not numbers.")
    header = _Header(shape=tuple(shape), dtype=dtype)
    if any(type(n) is not int or n < 0 for n in header.shape):
        raise InvalidSamples(f"The array {name!r} has the shape {header.shape}.")
    if header.nbytes > info.file_size:
        raise DamagedFile(f"The array {name!r} is shorter than its shape says.")
    return header


def _chunks(member: IO[bytes], header: _Header) -> Iterator[npt.NDArray[Any]]:
    """Yield the values in the order of the file; the last read checks length and checksum."""
    step = max(_CHUNK_BYTES // header.dtype.itemsize, 1) * header.dtype.itemsize
    left = header.nbytes
    while left:
        chunk = member.read(min(step, left))
        if not chunk or len(chunk) % header.dtype.itemsize:
            raise DamagedFile("An array ends before its last value.")
        left -= len(chunk)
        yield np.frombuffer(chunk, header.dtype)
    if member.read(1):
        raise DamagedFile("An array is longer than its shape says.")
