"""
The zip that ``torch.save`` writes: ``data.pkl`` describes the tensors, ``data/<key>`` hold their bytes.

Nothing in ``data.pkl`` is run: ``pickle_walk`` reads it against an allow-list and yields descriptions.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import DamagedFile, PickledModule, UnsupportedFormat
from common.formats.model import ModelFile, ModelFormat, find_state_dict, read_chunks
from common.formats.pickle_walk import walk
from common.formats.zips import opened_zip

MAX_PICKLE_BYTES = 16 << 20
"""Size of the description: a thousand-layer network with its optimiser takes less than 1 MiB."""

MAX_MEMBERS = 100_000
"""Files in the zip: one per tensor, and a few."""

_MAX_DIRECTORY_BYTES = 8 << 20  # 80 bytes for each of them

_CHUNK_BYTES = 1 << 20  # a multiple of every element size


def inspect(path: Path) -> ModelFile:
    """
    Read the structure of a torch zip.

    Raises:
        Refused: It is damaged, or holds anything but a state dict with plain values.
    """
    with _opened(path) as archive:
        members, root_name = _members(archive)
        description = archive.read(f"{root_name}/data.pkl")
        sizes = {
            name.removeprefix(f"{root_name}/data/"): info.file_size
            for name, info in members.items()
            if name.startswith(f"{root_name}/data/")
        }
        wrapper, prefix, tensors = find_state_dict(walk(description, storage_bytes=sizes))
    return ModelFile(format=ModelFormat.TORCH, wrapper=wrapper, prefix=prefix, tensors=tensors)


def storages(path: Path) -> Iterator[tuple[str, Iterator[tuple[int, bytes]]]]:
    """Yield every storage's key with its bytes in chunks; a wrong checksum raises ``DamagedFile``."""
    with _opened(path) as archive:
        members, root_name = _members(archive)
        for name in members:
            key = name.removeprefix(f"{root_name}/data/")
            if key != name:
                with archive.open(name) as member:
                    yield key, read_chunks(_chunks(member))


def _chunks(member: IO[bytes]) -> Iterator[bytes]:
    try:
        while chunk := member.read(_CHUNK_BYTES):
            yield chunk
    except (zipfile.BadZipFile, EOFError) as exc:  # raised at whoever reads, not in `storages`
        raise DamagedFile("The bytes of a tensor do not match their checksum.") from exc


def _members(archive: zipfile.ZipFile) -> tuple[dict[str, zipfile.ZipInfo], str]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise UnsupportedFormat(f"The zip holds {len(infos)} files; {MAX_MEMBERS} are allowed.")
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise UnsupportedFormat("The zip holds two files of one name.")
    roots = {name.split("/", 1)[0] for name in members if name.endswith("/data.pkl")}
    if any("/code/" in name or name.endswith("constants.pkl") for name in members):
        raise UnsupportedFormat("The file is a TorchScript archive, which holds code.")
    if len(roots) != 1:
        raise UnsupportedFormat("The file is a zip, but not one that torch.save wrote.")
    root = roots.pop()
    description = members.get(f"{root}/data.pkl")
    if description is None or description.file_size > MAX_PICKLE_BYTES:
        raise UnsupportedFormat("The zip's data.pkl is missing or implausibly large.")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsupportedFormat("The zip is compressed; torch.save never does that.")
        if info.flag_bits & 0x1:
            raise UnsupportedFormat("The zip is encrypted.")
    order = members.get(f"{root}/byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise UnsupportedFormat("The file was written on a big-endian machine.")
    return members, root


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with opened_zip(
            path,
            max_directory_bytes=_MAX_DIRECTORY_BYTES,
            refusal=UnsupportedFormat("The zip's directory is implausibly large."),
        ) as archive:
            yield archive
    except (PickledModule, UnsupportedFormat):
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
