"""
A file as its differences from another one of the same length.

    write(base, other, target)     write to *target* the blocks in which *other* is not *base*
    whole(base, differences)       read *other* again, at any place

Law: ``whole(base, write(base, other))`` is *other*, byte for byte.

Each block stands behind its number (eight bytes, little-endian), in rising order; the last block of a
file may be shorter. A reader takes nothing on trust but the base.
"""

import io
import os
import struct
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 64 << 10
"""A block: small beside a layer, and large beside its number."""

_NUMBER = struct.Struct("<Q")


def write(base: Path, other: Path, target: Path) -> None:
    """
    Write the blocks of *other* that differ from *base*'s to the new file *target*.

    Raises:
        ValueError: The two files are not of the same length.
    """
    if base.stat().st_size != other.stat().st_size:
        raise ValueError("the files are not of the same length")
    with base.open("rb") as one, other.open("rb") as two, target.open("xb") as file:
        number = 0
        while block := two.read(BLOCK_BYTES):
            if block != one.read(BLOCK_BYTES):
                file.write(_NUMBER.pack(number) + block)
            number += 1


def whole(base: BinaryIO, differences: BinaryIO) -> BinaryIO:
    """
    Return the file that *differences* make of *base*; closing it closes both.

    Raises:
        ValueError: They are not differences from a file of this length.
    """
    return io.BufferedReader(_Patched(base, differences), BLOCK_BYTES)


class _Patched(io.RawIOBase):
    def __init__(self, base: BinaryIO, differences: BinaryIO) -> None:
        self._base, self._differences = base, differences
        self._size = base.seek(0, os.SEEK_END)
        self._places = _places(differences, self._size)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        number, offset = divmod(self._position, BLOCK_BYTES)
        length = min(len(buffer), BLOCK_BYTES - offset, self._size - self._position)
        if length <= 0:
            return 0
        if number in self._places:
            self._differences.seek(self._places[number] + offset)
            chunk = self._differences.read(length)
        else:
            self._base.seek(self._position)
            chunk = self._base.read(length)
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._base.close()
            self._differences.close()
        super().close()


def _places(differences: BinaryIO, size: int) -> dict[int, int]:
    """Return where the bytes of each block of *differences* begin."""
    end = differences.seek(0, os.SEEK_END)
    places: dict[int, int] = {}
    last, position = -1, 0
    while position < end:
        differences.seek(position)
        head = differences.read(_NUMBER.size)
        if len(head) != _NUMBER.size:
            raise ValueError("a block without its number")
        (number,) = _NUMBER.unpack(head)
        length = min(BLOCK_BYTES, size - number * BLOCK_BYTES)
        if not last < number or length <= 0 or position + _NUMBER.size + length > end:
            raise ValueError("a block that the file does not have")
        places[number] = position + _NUMBER.size
        last, position = number, position + _NUMBER.size + length
    return places
