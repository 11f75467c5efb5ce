"""A file put together from another one and its differences is the file that was meant."""

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import differences
from common.differences import BLOCK_BYTES

SIZE = 3 * BLOCK_BYTES + 1000
BASE = bytes(SIZE)


def changed_at(*places: int) -> bytes:
    """Return BASE with other bytes at *places*."""
    content = bytearray(BASE)
    for place in places:
        content[place] = 1
    return bytes(content)


def differences_of(folder: Path, other: bytes) -> bytes:
    """Return the differences of *other* from BASE."""
    (folder / "base").write_bytes(BASE)
    (folder / "other").write_bytes(other)
    differences.write(folder / "base", folder / "other", folder / "target")
    return (folder / "target").read_bytes()


def block(number: int, length: int = BLOCK_BYTES) -> bytes:
    """Return a block as it stands in a file of differences."""
    return struct.pack("<Q", number) + bytes(length)


@pytest.mark.parametrize(
    ("places", "blocks"),
    [
        ((), 0),
        ((0,), 1),
        ((BLOCK_BYTES - 1, BLOCK_BYTES), 2),
        ((5, 6, 7), 1),
        ((SIZE - 1,), 1),
        ((0, BLOCK_BYTES, 2 * BLOCK_BYTES, SIZE - 1), 4),
    ],
)
def test_whole_file_comes_back(tmp_path: Path, places: tuple[int, ...], blocks: int) -> None:
    """The file is put together byte for byte, and no more is kept than the blocks that differ."""
    other = changed_at(*places)
    changed = differences_of(tmp_path, other)
    assert len(changed) <= blocks * len(block(0))
    with differences.whole(io.BytesIO(BASE), io.BytesIO(changed)) as file:
        assert file.read() == other


@given(
    places=st.lists(st.integers(0, SIZE - 1), max_size=5),
    start=st.integers(0, SIZE + 10),
    length=st.integers(0, 2 * BLOCK_BYTES),
)
def test_any_part_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], start: int, length: int
) -> None:
    """Reading from anywhere gives what the file has there."""
    other = changed_at(*places)
    changed = differences_of(tmp_path_factory.mktemp("part"), other)
    with differences.whole(io.BytesIO(BASE), io.BytesIO(changed)) as file:
        assert file.seek(start) == start
        assert file.read(length) == other[start : start + length]


def test_files_of_two_lengths_have_no_differences(tmp_path: Path) -> None:
    """What is longer or shorter than the base is refused and nothing is written."""
    with pytest.raises(ValueError, match="length"):
        differences_of(tmp_path, BASE[1:])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"\0" * 8,
        block(0)[:-1],
        block(4),
        block(2**63),
        block(1) + block(0),
        block(1) + block(1),
        block(3),
        block(3, 1000) + b"\0",
        block(0) + block(1)[:-1],
    ],
    ids=[
        "no number",
        "no bytes",
        "a byte short",
        "behind the end",
        "far behind the end",
        "falling",
        "twice",
        "a last block that is too long",
        "something behind it",
        "a second block that is short",
    ],
)
def test_what_are_no_differences_is_refused(content: bytes) -> None:
    """A file that no honest writer left is not read."""
    with pytest.raises(ValueError, match="block"):
        differences.whole(io.BytesIO(BASE), io.BytesIO(content))


def test_closing_closes_both() -> None:
    """Whoever closes the file leaves nothing open."""
    base, changed = io.BytesIO(BASE), io.BytesIO()
    differences.whole(base, changed).close()
    assert base.closed
    assert changed.closed
