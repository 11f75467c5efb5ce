"""
The zip that ``torch.save`` writes: ``data.pkl`` describes the tensors, ``data/<key>`` hold their bytes.

Nothing in ``data.pkl`` is run: ``pickle_walk`` reads it against an allow-list and yields descriptions.
The members are those that ``torch.save`` writes and no others, under the names it gives them: torch's
own reader finds members without regard to case, and takes the folder of the first one for that of all.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import DamagedFile, Refused, UnsupportedFormat
from common.formats.model import ModelFile, ModelFormat, find_state_dict, read_chunks
from common.formats.pickle_walk import walk
from common.formats.zips import opened_zip

MAX_PICKLE_BYTES = 16 << 20
"""Size of the description: a thousand-layer network with its optimiser takes less than 1 MiB."""

MAX_MEMBERS = 50_000
"""Files in the zip: one per tensor, and a few. ``pickle_walk`` takes no more than 33,000 tensors."""

_MAX_DIRECTORY_BYTES = 8 << 20  # 160 bytes for each of them
_MAX_REMARK_BYTES = 64

_CHUNK_BYTES = 1 << 20  # a multiple of every element size

_STORAGE = re.compile(r"data/[0-9]{1,20}")  # a number, in old files an address
_REMARKS: Mapping[str, re.Pattern[bytes]] = {
    "version": re.compile(rb"0*([1-9]|10)\n?"),
    "byteorder": re.compile(rb"little"),
    ".format_version": re.compile(rb"[0-9]{1,4}"),
    ".storage_alignment": re.compile(rb"[0-9]{1,6}"),
    ".data/serialization_id": re.compile(rb"[0-9]*"),
}
"""What lies beside description and storages, and what it may say."""


def inspect(path: Path) -> ModelFile:
    """
    Read the structure of a torch zip.

    Raises:
        Refused: It is damaged, or holds anything but a state dict with plain values.
    """
    with _opened(path) as archive:
        members = _members(archive)
        sizes = {
            name.removeprefix("data/"): info.file_size
            for name, info in members.items()
            if _STORAGE.fullmatch(name)
        }
        root = walk(archive.read(members["data.pkl"]), storage_bytes=sizes)
        wrapper, prefix, tensors = find_state_dict(root)
    return ModelFile(format=ModelFormat.TORCH, wrapper=wrapper, prefix=prefix, tensors=tensors)


def storages(path: Path) -> Iterator[tuple[str, Iterator[tuple[int, bytes]]]]:
    """Yield every storage's key with its bytes in chunks; a wrong checksum raises ``DamagedFile``."""
    with _opened(path) as archive:
        for name, info in _members(archive).items():
            if _STORAGE.fullmatch(name):
                with archive.open(info) as member:
                    yield name.removeprefix("data/"), read_chunks(_chunks(member))


def _chunks(member: IO[bytes]) -> Iterator[bytes]:
    try:
        while chunk := member.read(_CHUNK_BYTES):
            yield chunk
    except (zipfile.BadZipFile, EOFError) as exc:  # raised at whoever reads, not in `storages`
        raise DamagedFile("The bytes of a tensor do not match their checksum.") from exc


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by their names below the one folder that all of them lie in."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    _refuse_kin(names)
    root, separator, _ = names[0].partition("/") if names else ("", "", "")
    if not separator or not all(name.startswith(f"{root}/") for name in names):
        raise UnsupportedFormat("The file is a zip, but not one that torch.save wrote.")
    members = {info.filename.removeprefix(f"{root}/"): info for info in infos}
    if not {"data.pkl", "version"} <= members.keys():
        raise UnsupportedFormat("The file is a zip, but not one that torch.save wrote.")
    if members["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise UnsupportedFormat("The zip's data.pkl is implausibly large.")
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsupportedFormat("The zip is compressed; torch.save never does that.")
        if name in _REMARKS:
            _check_remark(name, archive, info)
        elif name != "data.pkl" and not _STORAGE.fullmatch(name):
            raise UnsupportedFormat(f"The zip holds {name[:80]!r}, which torch.save never writes.")
    return members


def _refuse_kin(names: list[str]) -> None:
    """Refuse the other archives that torch makes, by their names."""
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise UnsupportedFormat("The file is a TorchScript archive, which holds code.")
    if any(
        name.endswith(("/archive_format", "serialized_exported_program.json", "/models/model.json"))
        for name in names
    ):
        raise UnsupportedFormat("The file is a program that torch.export wrote (.pt2).")
    if any("/.data/extern_modules" in name for name in names):
        raise UnsupportedFormat("The file is a torch.package archive, which holds code.")


def _check_remark(name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    said = archive.read(info) if info.file_size <= _MAX_REMARK_BYTES else b""
    if name == "byteorder" and said == b"big":
        raise UnsupportedFormat("The file was written on a big-endian machine.")
    if not _REMARKS[name].fullmatch(said):
        raise UnsupportedFormat(f"The zip's {name!r} holds something that torch.save never writes.")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with opened_zip(
            path,
            max_members=MAX_MEMBERS,
            max_directory_bytes=_MAX_DIRECTORY_BYTES,
            refusal=UnsupportedFormat(f"The zip holds more than {MAX_MEMBERS} files."),
        ) as archive:
            yield archive
    except Refused:
        raise
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        KeyError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        UnicodeDecodeError,
        ValueError,
        struct.error,
        zlib.error,
    ) as exc:
        raise DamagedFile("The file is a truncated or damaged zip.") from exc
