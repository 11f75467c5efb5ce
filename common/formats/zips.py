"""
Open a zip whose every byte is accounted for.

A zip can be read in more than one way: by its directory or by the headers before its members, from its
front or from its end. Every reader of one and the same file (``zipfile``, torch's miniz, an unpacker)
must see the same members, so nothing is let through that leaves a choice. The file is, from the first
byte to the last: member after member, the directory, its end. No gap, no overlap, no comment; whatever
is said twice is said alike.

Source: PKWARE's APPNOTE.TXT, 4.3 and 4.5. Both writers that matter were read too: miniz in torch (sizes
0 before a member and true ones behind it, a zip64 end in every file) and ``zipfile`` (zip64 fields filled
in afterwards).
"""

import io
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import DamagedFile, Refused, UnsafeZip

MAX_NAME_BYTES = 512
"""Length of a member's name."""

_END = struct.Struct("<4s4H2IH")
_END_MAGIC = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")

_DESCRIPTOR_FLAG, _UTF8_FLAG = 0x8, 0x800
_ALLOWED_FLAGS = _DESCRIPTOR_FLAG | _UTF8_FLAG | 0x6  # and two bits that say how hard deflate tried
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075  # extra fields
_DOS_FOLDER = 0x10  # a mark among the outer attributes
_FULL = 0xFFFFFFFF  # "look into the zip64 field"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A member as the directory has it."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    bytes: int
    position: int


@contextmanager
def opened_zip(
    path: Path, *, max_members: int, max_directory_bytes: int, refusal: Refused
) -> Iterator[zipfile.ZipFile]:
    """
    Open a zip after its structure has been checked; names, sizes and places are then beyond doubt.

    Args:
        path: The file as uploaded.
        max_members: Members, counted before anything is made of them.
        max_directory_bytes: Size of the directory, which is read as a whole.
        refusal: What is raised if there are more.

    Raises:
        DamagedFile: It is no whole zip.
        UnsafeZip: It is one that two readers could read in two ways, or that no honest writer makes.
    """
    with path.open("rb") as file:
        try:
            start, length, count = _find_directory(file)
            if count > max_members or length > max_directory_bytes:
                raise refusal
            members = _read_directory(file, start, length, count)
            _check_names(members)
            _check_layout(file, members, start)
        except (struct.error, IndexError) as exc:
            raise DamagedFile("The zip ends early, or its directory is damaged.") from exc
        with zipfile.ZipFile(file) as archive:
            # Names are not compared: those without the UTF-8 flag are in a code page of 1981.
            if [_seen(info) for info in archive.infolist()] != [_meant(each) for each in members]:
                raise UnsafeZip("The zip's directory can be read in two ways.")
            yield archive


def is_zip(path: Path) -> bool:
    """Return whether a file means to be a zip, whole or not."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _seen(info: zipfile.ZipInfo) -> tuple[int, ...]:
    return (
        info.flag_bits, info.compress_type, info.CRC, info.compress_size, info.file_size,
        info.header_offset,
    )  # fmt: skip


def _meant(member: _Member) -> tuple[int, ...]:
    return (
        member.flags, member.method, member.crc, member.packed_bytes, member.bytes, member.position,
    )  # fmt: skip


# The directory -------------------------------------------------------------------------------------


def _find_directory(file: io.BufferedReader) -> tuple[int, int, int]:
    """Return where the directory starts, its length and its number of entries."""
    size = file.seek(0, os.SEEK_END)
    tail_bytes = min(size, _END.size + 0xFFFF)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    end = len(tail) - _END.size
    if end < 0 or not tail.startswith(_END_MAGIC, end):
        if 0 <= tail.rfind(_END_MAGIC) < end:
            raise UnsafeZip("The zip has bytes or a comment after its end.")
        raise DamagedFile("The zip has no end: it is cut off, or damaged.")
    position = size - _END.size
    _, disk, first_disk, here, count, length, start, comment = _END.unpack_from(tail, end)
    if comment:
        raise DamagedFile("The zip says that a comment follows its end, and none does.")
    if disk or first_disk or here != count:
        raise UnsafeZip("The zip is one part of several.")
    if end >= _LOCATOR.size and tail.startswith(b"PK\x06\x07", end - _LOCATOR.size):
        found = (start, length, count)
        start, length, count, position = _read_end64(
            file, tail[end - _LOCATOR.size : end], position
        )
        limits = (_FULL, _FULL, 0xFFFF)
        if any(
            small not in {large, limit}
            for small, large, limit in zip(found, (start, length, count), limits, strict=True)
        ):
            raise UnsafeZip("The zip has two ends that say different things.")
    elif _FULL in {start, length} or count == 0xFFFF:
        raise UnsafeZip("The zip refers to a zip64 end that it does not have.")
    if start + length != position:
        raise UnsafeZip("The zip's directory does not lie right before its end.")
    return start, length, count


def _read_end64(file: io.BufferedReader, locator: bytes, end: int) -> tuple[int, int, int, int]:
    """Return the directory's start, length and count, and where the zip64 end lies."""
    _, disk, position, disks = _LOCATOR.unpack(locator)
    if disk or disks != 1 or position != end - _LOCATOR.size - _END64.size:
        raise UnsafeZip("The zip's zip64 end does not lie right before its end.")
    file.seek(position)
    magic, rest, _, _, disk, first_disk, here, count, length, start = _END64.unpack(
        file.read(_END64.size)
    )
    if magic != b"PK\x06\x06" or rest != _END64.size - 12:
        raise UnsafeZip("The zip's zip64 end is not where it should be.")
    if disk or first_disk or here != count:
        raise UnsafeZip("The zip is one part of several.")
    return start, length, count, position


def _read_directory(file: io.BufferedReader, start: int, length: int, count: int) -> list[_Member]:
    file.seek(start)
    directory = file.read(length)
    members: list[_Member] = []
    position = 0
    for _ in range(count):
        member, position = _read_entry(directory, position)
        members.append(member)
    if position != length:
        raise UnsafeZip("The zip's directory holds more than its entries.")
    return members


def _read_entry(directory: bytes, position: int) -> tuple[_Member, int]:
    (
        magic, made_by, _needs, flags, method, _time, _date, crc, packed, unpacked,
        name_bytes, extra_bytes, comment_bytes, disk, _inner, outer, offset,
    ) = _ENTRY.unpack_from(directory, position)  # fmt: skip
    if magic != b"PK\x01\x02":
        raise DamagedFile("The zip's directory is damaged.")
    name_end = position + _ENTRY.size + name_bytes
    name = directory[position + _ENTRY.size : name_end]
    extra = directory[name_end : name_end + extra_bytes]
    if len(name) != name_bytes or len(extra) != extra_bytes:
        raise DamagedFile("The zip's directory is damaged.")
    if flags & 0x2041:  # encrypted, strongly, or the directory itself
        raise UnsafeZip("The zip is encrypted.")
    if flags & ~_ALLOWED_FLAGS or disk or comment_bytes:
        raise UnsafeZip("A member of the zip is patched, commented or on another disk.")
    kind = stat.S_IFMT(outer >> 16) if made_by >> 8 == 3 else 0
    is_folder = name.endswith(b"/")
    if kind not in {0, stat.S_IFDIR if is_folder else stat.S_IFREG}:
        raise UnsafeZip("A member of the zip is a link or a device.")
    if is_folder and unpacked:
        raise UnsafeZip("A folder in the zip has content.")
    if outer & _DOS_FOLDER and not is_folder:
        # miniz leaves it out and hands torch memory that was never written.
        raise UnsafeZip("A member of the zip is a file by its name and a folder by its mark.")
    unpacked, packed, offset = _widened(extra, (unpacked, packed, offset))
    member = _Member(
        raw_name=name, flags=flags, method=method, crc=crc, packed_bytes=packed, bytes=unpacked,
        position=offset,
    )  # fmt: skip
    return member, name_end + extra_bytes


def _widened(extra: bytes, numbers: tuple[int, int, int]) -> list[int]:
    """Return *numbers* with those that are full taken from the zip64 field, which holds no others."""
    field = _extra_fields(extra).get(_ZIP64, b"")
    wide = iter(struct.unpack(f"<{len(field) // 8}Q", field))
    found = [next(wide, -1) if number == _FULL else number for number in numbers]
    if -1 in found or next(wide, None) is not None:
        raise UnsafeZip("A member of the zip has a zip64 field that does not fit its sizes.")
    return found


def _extra_fields(extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    position = 0
    while position < len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4 + length
        if kind in fields or kind == _UNICODE_PATH or position > len(extra):
            raise UnsafeZip("A member of the zip has a second name, or a damaged extra field.")
        fields[kind] = extra[position - length : position]
    return fields


def _check_names(members: Sequence[_Member]) -> None:
    names = {each.raw_name for each in members}
    if len(names) != len(members):
        raise UnsafeZip("The zip holds two members of one name.")
    for name in names:
        parts = name.removesuffix(b"/").split(b"/")
        if len(name) > MAX_NAME_BYTES:
            raise UnsafeZip("The zip holds a member with a very long name.")
        if any(part in {b"", b".", b".."} for part in parts) or set(name) & _FORBIDDEN:
            raise UnsafeZip(f"The zip holds a member named {name[:80]!r}.")


_FORBIDDEN = frozenset(b"\\\x7f") | frozenset(range(32))
"""Bytes of a name that are a separator, an end or a trick to some reader."""


# The members ---------------------------------------------------------------------------------------


def _check_layout(file: io.BufferedReader, members: Sequence[_Member], directory: int) -> None:
    """Hold the header before each member against the directory, and every gap against 0."""
    ordered = sorted(members, key=lambda each: each.position)
    expected = 0
    following_positions = [each.position for each in ordered[1:]] + [directory]
    for member, following in zip(ordered, following_positions, strict=False):
        if member.position != expected:
            raise UnsafeZip("The zip has bytes before, between or shared by its members.")
        file.seek(member.position)
        header = file.read(_LOCAL.size)
        (
            magic, _needs, flags, method, _time, _date, crc, packed, unpacked, name_bytes, extra_bytes,
        ) = _LOCAL.unpack(header)  # fmt: skip
        names = file.read(name_bytes + extra_bytes)
        if magic != b"PK\x03\x04" or (flags, method, names[:name_bytes]) != (
            member.flags, member.method, member.raw_name,
        ):  # fmt: skip
            raise UnsafeZip(
                "A member of the zip is one thing in the directory and another before it."
            )
        _check_numbers(member, (crc, packed, unpacked), _extra_fields(names[name_bytes:]))
        content_end = member.position + len(header) + len(names) + member.packed_bytes
        expected = content_end
        if member.flags & _DESCRIPTOR_FLAG:
            file.seek(content_end)
            _check_descriptor(member, file.read(max(min(following - content_end, 25), 0)))
            expected = following
    if expected != directory:
        raise UnsafeZip("The zip has bytes between its last member and its directory.")


def _check_numbers(member: _Member, numbers: tuple[int, int, int], extra: dict[int, bytes]) -> None:
    """Check what the header before a member says: the truth, or nothing if it follows behind."""
    follows = bool(member.flags & _DESCRIPTOR_FLAG)
    truth = (member.crc, member.packed_bytes, member.bytes)
    is_wide = _ZIP64 in extra
    for place, (number, true) in enumerate(zip(numbers, truth, strict=True)):
        is_put_off = follows and number == 0
        is_elsewhere = is_wide and place > 0 and number == _FULL
        if number != true and not is_put_off and not is_elsewhere:
            raise UnsafeZip("A member's sizes differ between the directory and before the member.")
    wide = extra.get(_ZIP64, b"")
    known = {member.packed_bytes, member.bytes, member.position} | ({0} if follows else set())
    if len(wide) % 8 or not known.issuperset(struct.unpack(f"<{len(wide) // 8}Q", wide)):
        raise UnsafeZip("A member's sizes differ between the directory and before the member.")


def _check_descriptor(member: _Member, found: bytes) -> None:
    """Check what lies behind a member, with or without a signature, in 32 or 64 bits."""
    numbers = (member.crc, member.packed_bytes, member.bytes)
    fitting = ["<IQQ"] if max(numbers) > _FULL else ["<III", "<IQQ"]
    packed = [struct.pack(form, *numbers) for form in fitting]
    if found not in {each for plain in packed for each in (plain, b"PK\x07\x08" + plain)}:
        raise UnsafeZip("A member's sizes differ between the directory and behind the member.")
