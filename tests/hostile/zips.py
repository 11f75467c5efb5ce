"""Zips with two readings, archives of other kinds, and files that end early."""

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.hostile.pickles import LIVE, beside
from tests.hostile_files import (
    HONEST,
    Family,
    Field,
    HostileFile,
    mapping,
    pickled,
    torch_zip,
    zip_that_says_encrypted,
    zip_with_a_huge_directory,
    zip_with_a_lying_size,
    zip_with_lying_names,
    zip_with_one_name_twice,
)

UNSAFE = frozenset({"unsafe-zip"})
FOREIGN = frozenset({"unsupported-format"})
ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


def patched(magic: bytes, offset: int, content: bytes, *, which: int = 0) -> bytes:
    """Return an honest zip with *content* written at *offset* into one of its records."""
    found = bytearray(torch_zip())
    position = -1
    for _ in range(which + 1):
        position = found.index(magic, position + 1)
    found[position + offset : position + offset + len(content)] = content
    return bytes(found)


def with_member(name: str, content: bytes = b"x", *, mode: int = 0o100644) -> bytes:
    """Return an honest zip with one member more."""
    buffer = io.BytesIO(torch_zip())
    with zipfile.ZipFile(buffer, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, mode << 16
        archive.writestr(info, content)
    return buffer.getvalue()


def overlapping_members() -> bytes:
    """List a member twice under two names, with one content for both: how zip bombs are made."""
    content = bytearray(torch_zip(storages={"0": bytes(16), "1": bytes(16)}))
    first = content.index(ENTRY, content.index(ENTRY) + 1)
    entries = []
    position = -1
    while (position := content.find(ENTRY, position + 1)) >= 0:
        entries.append(position)
    one, other = (next(e for e in entries if content[e + 46 :].startswith(name))
                  for name in (b"archive/data/0", b"archive/data/1"))  # fmt: skip
    content[other + 42 : other + 46] = content[one + 42 : one + 46]
    assert first
    return bytes(content)


def bytes_in_front() -> bytes:
    """Put a script before the zip, as a self-extracting one does, with every place moved."""
    buffer = io.BytesIO(b"PK\x03\x04 this is not a member\n")
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, content in (("archive/data.pkl", HONEST), ("archive/version", b"3\n")):
            archive.writestr(name, content)
    return buffer.getvalue()


def second_directory() -> bytes:
    """Hide another zip between the members and the directory."""
    outer, inner = torch_zip(), torch_zip(pickled(mapping({})))
    start = struct.unpack_from("<I", outer, len(outer) - 6)[0]
    end = outer[:-6] + struct.pack("<IH", start + len(inner), 0)
    return outer[:start] + inner + end[start:]


def comment() -> bytes:
    """Put another zip's end into the comment."""
    buffer = io.BytesIO(torch_zip())
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"x" * 30 + END + bytes(18)
    return buffer.getvalue()


def zip64_end_that_differs() -> bytes:
    """Give the zip a second end that lists another number of members."""
    honest = torch_zip()
    count, length, start = struct.unpack_from("<HII", honest, len(honest) - 12)
    position = len(honest) - 22
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count - 1, count - 1, length, start
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, position, 1)
    return honest[:position] + end64 + locator + honest[position:]


def zip64_end_elsewhere() -> bytes:
    """Point to a zip64 end in another place of the file."""
    content = bytearray(zip64_end_that_differs())
    place = content.index(b"PK\x06\x07")
    content[place + 8 : place + 16] = struct.pack("<Q", 0)
    return bytes(content)


def zip64_field_too_many() -> bytes:
    """Give a member a zip64 field that its sizes do not ask for."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("archive/data.pkl", HONEST), ("archive/version", b"3\n")):
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<2HQ", 1, 8, 1 << 40)
            archive.writestr(info, content)
    return buffer.getvalue()


def second_name() -> bytes:
    """Give a member another name in an extra field."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        info.extra = struct.pack("<2HBI", 0x7075, 13, 1, 0) + b"evil.pkl"
        archive.writestr(info, HONEST)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def names_of_two_cases() -> bytes:
    """Hide a second description behind a name that torch's reader takes for the first."""
    return torch_zip(extra={"archive/DATA.PKL": pickled(mapping({}))})


def tar() -> bytes:
    """Write torch's oldest format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(HONEST)
        archive.addfile(info, io.BytesIO(HONEST))
    return buffer.getvalue()


def legacy() -> bytes:
    """Write torch's format from before 1.6: a magic number, then pickles one after the other."""
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    return magic + b"\x80\x02M\xe9\x03." + HONEST


TRICKS: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "one name twice": (zip_with_one_name_twice, UNSAFE),
    "another name where it lies": (zip_with_lying_names, UNSAFE),
    "encrypted": (zip_that_says_encrypted, UNSAFE),
    "encrypted before the member alone": (lambda: patched(LOCAL, 6, b"\x01"), UNSAFE),
    "four gigabytes in the directory": (zip_with_a_lying_size, UNSAFE),
    "another size before the member": (lambda: patched(LOCAL, 22, b"\x01\x00\x00\x00"), UNSAFE),
    "another checksum before the member": (lambda: patched(LOCAL, 14, b"abcd"), UNSAFE),
    "another method before the member": (lambda: patched(LOCAL, 8, b"\x08\x00"), UNSAFE),
    "a wrong checksum in both": (
        lambda: torch_zip().replace(b"weight", b"weighs"), frozenset({"damaged-file"})),
    "a place outside the file": (lambda: patched(ENTRY, 42, b"\xff\xff\xff\x7f"), UNSAFE),
    "a member in another's place": (lambda: patched(ENTRY, 42, bytes(4), which=1), UNSAFE),
    "members that overlap": (overlapping_members, UNSAFE),
    "bytes in front": (bytes_in_front, UNSAFE),
    "a zip between members and directory": (second_directory, UNSAFE),
    "bytes after the end": (lambda: torch_zip() + b"#!/bin/sh\n", UNSAFE),
    "a second zip after the end": (lambda: torch_zip() + torch_zip(), UNSAFE),
    "an end in the comment": (comment, UNSAFE),
    "a comment that is not there": (
        lambda: torch_zip()[:-2] + b"\x05\x00", frozenset({"damaged-file"})),
    "a comment on a member": (lambda: patched(ENTRY, 32, b"\x01\x00"), UNSAFE),
    "one member fewer than it says": (lambda: patched(END, 8, b"\x05\x00\x05\x00"),
                                      frozenset({"damaged-file", "unsafe-zip"})),
    "one member more than it says": (lambda: patched(END, 8, b"\x03\x00\x03\x00"), UNSAFE),
    "a part of several": (lambda: patched(END, 4, b"\x01\x00"), UNSAFE),
    "a zip64 end that differs": (zip64_end_that_differs, UNSAFE),
    "a zip64 end elsewhere": (zip64_end_elsewhere, UNSAFE),
    "a zip64 end that is missing": (lambda: patched(END, 16, b"\xff\xff\xff\xff"), UNSAFE),
    "a zip64 field nobody asks for": (zip64_field_too_many, UNSAFE),
    "a second name in an extra field": (second_name, UNSAFE),
    "names of two cases": (names_of_two_cases, FOREIGN),
    "a link": (lambda: with_member("archive/data/1", b"/etc/passwd", mode=0o120777), UNSAFE),
    "a device": (lambda: with_member("archive/data/1", b"", mode=0o020666), UNSAFE),
    "a path upwards": (lambda: with_member("archive/data/../../evil"), UNSAFE),
    "a path from the root": (lambda: with_member("/etc/cron.d/evil"), UNSAFE),
    "a path with backslashes": (lambda: with_member("archive\\..\\evil"), UNSAFE),
    "a name with an escape": (lambda: with_member("archive/\x1b[2J"), UNSAFE),
    "a very long name": (lambda: with_member("archive/" + "x" * 5000), UNSAFE),
    "a folder that is a file": (lambda: with_member("archive/data/", b"x"), UNSAFE),
    "a file marked as a folder": (lambda: patched(ENTRY, 38, b"\x10", which=2), UNSAFE),
    "another folder": (lambda: with_member("evil/data.pkl", HONEST), FOREIGN),
    "a hidden member": (lambda: with_member("archive/evil.so"), FOREIGN),
    "a storage by a name": (lambda: with_member("archive/data/x"), FOREIGN),
    "a huge directory": (lambda: zip_with_a_huge_directory(35_000), UNSAFE),
    "compressed": (lambda: torch_zip(compression=zipfile.ZIP_DEFLATED), FOREIGN),
    "compressed with bzip2": (lambda: torch_zip(compression=zipfile.ZIP_BZIP2), FOREIGN),
    "compressed with lzma": (lambda: torch_zip(compression=zipfile.ZIP_LZMA), FOREIGN),
    "a bomb for a storage": (
        lambda: torch_zip(storages={"0": bytes(200 << 20)}, compression=zipfile.ZIP_DEFLATED), FOREIGN),
    "a huge description": (
        lambda: torch_zip(bytes(17 << 20), compression=zipfile.ZIP_DEFLATED), FOREIGN),
    "no description": (lambda: torch_zip().replace(b"data.pkl", b"data.pkm"), FOREIGN),
    "big endian": (lambda: torch_zip(extra={"archive/byteorder": b"big"}), FOREIGN),
    "a version of the future": (lambda: torch_zip(extra={"archive/version": b"999"}), FOREIGN),
}  # fmt: skip

KIN: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "nothing": (lambda: b"", frozenset({"empty-file"})),
    "two letters": (lambda: b"PK", FOREIGN),
    "zeros": (lambda: bytes(1000), FOREIGN),
    "an ELF program": (lambda: b"\x7fELF" + bytes(200), FOREIGN),
    "a script": (lambda: b"#!/bin/sh\ntouch /tmp/x\n", FOREIGN),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(60), FOREIGN),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(60), FOREIGN),
    "tar": (tar, FOREIGN),
    "legacy": (legacy, frozenset({"pickled-module"})),
    "TorchScript": (lambda: torch_zip(extra={"archive/code/__torch__.py": b"1"}), FOREIGN),
    "TorchScript by its constants": (lambda: torch_zip(extra={"archive/constants.pkl": b"."}), FOREIGN),
    "an exported program": (
        lambda: torch_zip(extra={"archive/archive_format": b"pt2", "archive/models/model.json": b"{}"}),
        FOREIGN),
    "an exported program of the first kind": (
        lambda: torch_zip(extra={"archive/serialized_exported_program.json": b"{}"}), FOREIGN),
    "a package": (lambda: torch_zip(extra={"archive/.data/extern_modules": b"os"}), FOREIGN),
}  # fmt: skip

LENGTH = len(torch_zip())
CUTS = (4, 30, 46, LENGTH // 4, LENGTH // 2, LENGTH - 200, LENGTH - 23, LENGTH - 22, LENGTH - 1)


def pickle_in_front(canary: Path) -> bytes:
    """Put a pickle that runs before a zip that is honest: one file for two readers."""
    return pickled(LIVE["exec"](canary)) + torch_zip()


def code_in_a_hidden_directory(canary: Path) -> bytes:
    """Hide a zip whose description runs behind one whose description does not."""
    return torch_zip(beside(LIVE["exec"](canary))) + torch_zip()


def files() -> list[HostileFile]:
    """Return all of them, as model files."""
    found = [
        HostileFile(
            name=name,
            family=family,
            build=lambda _, build=build: build(),  # type: ignore[misc]
            suffix=".pt",
            field=Field.MODEL,
            codes=codes,
        )
        for family, table in ((Family.ZIP, TRICKS), (Family.FORMAT, KIN))
        for name, (build, codes) in table.items()
    ]
    found += [
        HostileFile(
            name=f"cut after {length} bytes",
            family=Family.ZIP,
            build=lambda _, length=length: torch_zip()[:length],  # type: ignore[misc]
            suffix=".pt",
            field=Field.MODEL,
            codes=frozenset({"damaged-file"}),
        )
        for length in CUTS
    ]
    found.append(
        HostileFile(
            name="a pickle in front of a zip",
            family=Family.CODE,
            build=pickle_in_front,
            suffix=".pt",
            field=Field.MODEL,
            carries_code=True,
            codes=frozenset({"pickled-module"}),
        )
    )
    found.append(
        HostileFile(
            name="code in a zip before the zip",
            family=Family.CODE,
            build=code_in_a_hidden_directory,
            suffix=".pt",
            field=Field.MODEL,
            carries_code=True,
            codes=UNSAFE,
        )
    )
    return found
