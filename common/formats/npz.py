"""
Read the arrays of an ``.npz``, in chunks and never as a whole; nothing is unpickled.

The header before an array is a Python literal. It is not evaluated: three fields are matched in it, as
numpy writes them, and any other text is refused.
"""

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import DamagedFile, InvalidSamples
from common.formats.arrays import Array, Opener, read_values

MAX_HEADER_BYTES = 4096
"""Length of an array's header; numpy's own are of 118 bytes."""

MAX_RANK = 32
"""Dimensions of an array, which numpy itself bounded so for long."""

_MAGIC = b"\x93NUMPY\x01\x00"  # later versions may declare gigabytes, and are for structured types
_FIELD = re.compile(
    r" *'(?:(descr)' *: *'([<>|=][a-zA-Z][0-9]{1,9})'"
    r"|(fortran_order)' *: *(True|False)"
    r"|(shape)' *: *\( *((?:SIDE *(?:, *SIDE *){0,31},?)?) *\)) *(?:, *|(?=\}))".replace(
        "SIDE", "(?:0|[1-9][0-9]{0,18})"
    )
)
_REST = re.compile(r" *\} *\n?")  # any other space is one that only some readers take for a space


@dataclass(frozen=True, kw_only=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def arrays_in(archive: zipfile.ZipFile) -> list[tuple[str, Opener]]:
    """Return the name of every array, and how it is opened."""
    return [
        (info.filename.removesuffix(".npy"), partial(_opened, archive, info))
        for info in archive.infolist()
    ]


@contextmanager
def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Array]:
    with archive.open(info) as member:
        header = _header(member, info, info.filename.removesuffix(".npy"))
        yield Array(
            shape=header.shape,
            type=str(header.dtype),
            dtype=header.dtype,
            chunks=_chunks(member, header),
        )


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
    yield from read_values(member, header.dtype, header.nbytes)
    if member.read(1):
        raise DamagedFile("An array is longer than its shape says.")
