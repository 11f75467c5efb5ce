"""
The safetensors format: a length, a JSON header, then the tensors' bytes.

Source: the format's specification; the limits on the header are ours.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import DamagedFile, UnsupportedFormat
from common.formats.model import (
    ITEM_BYTES,
    ModelFile,
    ModelFormat,
    TensorInfo,
    contiguous_stride,
    find_state_dict,
)

MAX_HEADER_BYTES = 4 << 20
"""Size of the header: ten thousand tensors take less than 2 MiB."""

MAX_TENSORS = 10_000
"""Tensors in a file; ResNet-152 has 932."""

MAX_RANK = 8
"""Dimensions of a tensor; a convolution over volumes has five."""

MAX_ELEMENTS = 1 << 40
"""Any number in the header, so that products of shapes stay small numbers."""

_CHUNK_BYTES = 1 << 20
_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def looks_like(head: bytes) -> bool:
    """Return whether a file that starts with *head* means to be safetensors."""
    return len(head) > 8 and head[8:9] == b"{"


def inspect(path: Path) -> ModelFile:
    """
    Read the header.

    Raises:
        DamagedFile: Header and file do not agree.
        UnsupportedFormat: The header is larger than any honest one.
        NoStateDict: It names no tensor.
    """
    described, _ = _read_header(path)
    wrapper, prefix, tensors = find_state_dict(
        {name: info for name, (info, _) in described.items()}
    )
    return ModelFile(
        format=ModelFormat.SAFETENSORS, wrapper=wrapper, prefix=prefix, tensors=tensors
    )


def storages(path: Path) -> Iterator[tuple[str, Iterator[tuple[int, bytes]]]]:
    """Yield every tensor's name with its bytes in chunks."""
    described, start = _read_header(path)
    with path.open("rb") as file:
        for name, (_, (begin, end)) in described.items():

            def chunks(begin: int = begin, end: int = end) -> Iterator[tuple[int, bytes]]:
                for position in range(begin, end, _CHUNK_BYTES):
                    file.seek(start + position)
                    yield position - begin, file.read(min(_CHUNK_BYTES, end - position))

            yield name, chunks()


def tensor_positions(path: Path) -> dict[str, int]:
    """Return the position of each tensor's first byte in the file, in the header's order."""
    described, start = _read_header(path)
    return {name: start + begin for name, (_, (begin, _end)) in described.items()}


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, tuple[int, int]]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UnsupportedFormat(f"The header is larger than {MAX_HEADER_BYTES} bytes.")
        if 8 + length > size:
            raise DamagedFile("The file ends inside its header.")
        header = file.read(length)
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique)
        described = _describe(entries)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise DamagedFile(f"The header is damaged: {exc}.") from exc
    _check_layout([span for _, span in described.values()], size - 8 - length)
    return described, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _describe(entries: Any) -> dict[str, tuple[TensorInfo, tuple[int, int]]]:
    if not isinstance(entries, dict):
        raise TypeError("not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(text) is not str for text in metadata.values()):
        raise TypeError("the metadata are not texts")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    described: dict[str, tuple[TensorInfo, tuple[int, int]]] = {}
    for name, entry in entries.items():
        dtype = _DTYPES[entry["dtype"]]
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        if not isinstance(shape, list) or len(shape) > MAX_RANK:
            raise TypeError(f"{name!r} has an impossible shape")
        if any(type(n) is not int or not 0 <= n <= MAX_ELEMENTS for n in (*shape, begin, end)):
            raise ValueError(f"{name!r} has an impossible shape or place")
        elements = 1
        for n in shape:
            elements *= n
        if end - begin != elements * ITEM_BYTES[dtype]:
            raise ValueError(f"{name!r} is not as long as its shape says")
        info = TensorInfo(
            shape=tuple(shape),
            dtype=dtype,
            storage=name,
            offset=0,
            stride=contiguous_stride(tuple(shape)),
        )
        described[name] = info, (begin, end)
    return described


def _check_layout(spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise DamagedFile("The tensors overlap or leave gaps.")
        position = end
    if position != data_bytes:
        raise DamagedFile("The file is longer or shorter than its header says.")
