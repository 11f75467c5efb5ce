"""
Read the arrays of an ``.npz``, in chunks and never as a whole; nothing is unpickled.

The header before an array is a Python literal. It is not evaluated: three fields are matched in it, as
numpy writes them, and any other text is refused.
"""

import math
import re
import zipfile
from collections.abc import Iterator
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

MAX_MEMBERS = 16
"""Arrays in an .npz: three are known, and a script may leave a few more in it."""

MAX_HEADER_BYTES = 4096
"""Length of an array's header; numpy's own are of 118 bytes."""

MAX_RANK = 32
"""Dimensions of an array, which numpy itself bounded so for long."""

ALIASES = {"x": "images", "y": "labels"}

_MAGIC = b"\x93NUMPY\x01\x00"  # later versions may declare gigabytes, and are for structured types
_FIELD = re.compile(
    r" *'(?:(descr)' *: *'([<>|=][a-zA-Z][0-9]{1,9})'"
    r"|(fortran_order)' *: *(True|False)"
    r"|(shape)' *: *\( *((?:SIDE *(?:, *SIDE *){0,31},?)?) *\)) *(?:, *|(?=\}))".replace(
        "SIDE", "(?:0|[1-9][0-9]{0,18})"
    )
)
_REST = re.compile(r" *\} *\n?")  # any other space is one that only some readers take for a space
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def inspect(archive: zipfile.ZipFile, purpose: Purpose) -> SampleFile:
    """
    Check every array that is known by its name, value by value.

    Raises:
        Refused: One is not as it must be.
    """
    members = _members(archive, purpose)
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
    """Read an array's header."""
    start = member.read(len(_MAGIC) + 2)
    length = int.from_bytes(start[len(_MAGIC) :], "little")
    if not start.startswith(_MAGIC) or not length or length > MAX_HEADER_BYTES:
        raise InvalidSamples(f"The array {name!r} is not in numpy's format, or its header is odd.")
    header = _parsed(member.read(length), name)
    if len(start) + length + header.nbytes > info.file_size:
        raise DamagedFile(f"The array {name!r} is shorter than its shape says.")
    return header


def _parsed(header: bytes, name: str) -> _Header:
    text = header.decode("latin1")
    found: dict[str, str] = {}
    position = 1
    while field := _FIELD.match(text, position):
        key, value = (each for each in field.groups() if each is not None)
        if key in found:
            break
        found[key] = value
        position = field.end()
    if not text.startswith("{") or not _REST.fullmatch(text, position) or len(found) != 3:
        if "'|O" in text or "'O" in text:
            raise InvalidSamples(f"The array {name!r} holds objects, not numbers.")
        raise InvalidSamples(
            f"The array {name!r} has a damaged header, or is not of plain numbers."
        )
    try:
        dtype = np.dtype(found["descr"])
    except TypeError as exc:
        raise InvalidSamples(f"The array {name!r} is of an unknown type.") from exc
    if dtype.hasobject:
        raise InvalidSamples(f"The array {name!r} holds objects, not numbers.")
    sides = [int(side) for side in found["shape"].split(",") if side.strip()]
    if len(sides) == 1 and "," not in found["shape"]:
        raise InvalidSamples(f"The array {name!r} has a number for a shape.")
    return _Header(shape=tuple(sides), dtype=dtype)


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
