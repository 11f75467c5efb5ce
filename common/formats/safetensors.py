"""
The safetensors format: a length, a JSON header, then the tensors' bytes; a model's, or samples.

Source: the format's specification; the limits on the header are ours.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from common.errors import DamagedFile, InvalidSamples, UnsupportedFormat
from common.formats.arrays import Array, Opener, read_values
from common.formats.model import (
    ITEM_BYTES,
    ModelFile,
    ModelFormat,
    TensorInfo,
    check_names,
    contiguous_stride,
    find_state_dict,
)

MAX_HEADER_BYTES = 4 << 20
"""Size of the header: ten thousand tensors take less than 2 MiB."""

MAX_TENSORS = 10_000
"""Tensors in a file; ResNet-152 has 932."""

MAX_RANK = 8
"""Dimensions of a tensor; a convolution over volumes has five."""

MAX_BRACKETS = 5 * MAX_TENSORS
"""Lists and objects in the header: three for each tensor, and a few."""

MAX_DEPTH = 3
"""Lists and objects inside each other: the header, a tensor, its shape."""

MAX_ELEMENTS = 1 << 40
"""Any number in the header, and any product of sides, so that all of them stay small numbers."""

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}"-]', re.DOTALL)
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
"""The types of a state dict's tensors."""

_SAMPLE_DTYPES: Mapping[str, str] = {
    **_DTYPES,
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
}
"""Those of samples, and of what lies beside them: all that the library has known since 0.5."""

_ITEM_BYTES: Mapping[str, int] = {
    **ITEM_BYTES,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "float8_e5m2": 1,
    "float8_e4m3fn": 1,
}

_READ_AS: Mapping[str, str] = {"bfloat16": "float32", "float8_e5m2": "V1", "float8_e4m3fn": "V1"}
"""What stands for a type that numpy lacks; images of bytes without a meaning are refused."""


def looks_like(head: bytes) -> bool:
    """Return whether a file that starts with *head* means to be safetensors."""
    return len(head) > 8 and head[8:9] == b"{"


def is_safetensors(path: Path) -> bool:
    """Return whether a file means to be safetensors, whole or not."""
    with path.open("rb") as file:
        return looks_like(file.read(9))


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


def arrays_in(path: Path) -> list[tuple[str, Opener]]:
    """
    Return the name of every array of a sample file, and how it is opened.

    Raises:
        DamagedFile: Header and file do not agree.
        InvalidSamples: The header holds more than samples need, or other types.
    """
    try:
        described, start = _read_header(path, _SAMPLE_DTYPES)
        check_names(described)
    except UnsupportedFormat as exc:
        raise InvalidSamples(exc.detail) from exc
    return [
        (name, partial(_opened, path, info, start + begin))
        for name, (info, (begin, _)) in described.items()
    ]


@contextmanager
def _opened(path: Path, info: TensorInfo, position: int) -> Iterator[Array]:
    with path.open("rb") as file:
        file.seek(position)
        yield Array(
            shape=info.shape,
            type=info.dtype,
            dtype=np.dtype(_READ_AS.get(info.dtype, info.dtype)),
            chunks=_values(file, info),
        )


def _values(file: IO[bytes], info: TensorInfo) -> Iterator[npt.NDArray[Any]]:
    nbytes = math.prod(info.shape) * _ITEM_BYTES[info.dtype]
    if info.dtype != "bfloat16":
        yield from read_values(file, np.dtype(info.dtype).newbyteorder("<"), nbytes)
        return
    for halves in read_values(file, np.dtype("<u2"), nbytes):  # each is the upper half of a float32
        yield (halves.astype(np.uint32) << 16).view(np.float32)


def _read_header(
    path: Path, dtypes: Mapping[str, str] = _DTYPES
) -> tuple[dict[str, tuple[TensorInfo, tuple[int, int]]], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UnsupportedFormat(f"The header is larger than {MAX_HEADER_BYTES} bytes.")
        if 8 + length > size:
            raise DamagedFile("The file ends inside its header.")
        header = file.read(length)
    try:
        text = header.decode()
        _check_nesting(text)
        entries = json.loads(text, object_pairs_hook=_unique)
        described = _describe(entries, dtypes)
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise DamagedFile(f"The header is damaged: {exc}.") from exc
    _check_layout([span for _, span in described.values()], size - 8 - length)
    return described, 8 + length


def _check_nesting(text: str) -> None:
    """Count lists and objects before any is made of them; a minus is in no number of a header."""
    depth = count = 0
    for token in _TOKENS.finditer(text):
        match token[0][0]:
            case "{" | "[":
                depth, count = depth + 1, count + 1
            case "}" | "]":
                depth -= 1
            case _ if len(token[0]) == 1:
                raise ValueError("a text without an end, or a negative number")
        if depth > MAX_DEPTH or count > MAX_BRACKETS:
            raise ValueError("it is nested too deep, or too long")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _describe(
    entries: Any, dtypes: Mapping[str, str]
) -> dict[str, tuple[TensorInfo, tuple[int, int]]]:
    if not isinstance(entries, dict):
        raise TypeError("not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(text) is not str for text in metadata.values()):
        raise TypeError("the metadata are not texts")
    for text in (*metadata, *metadata.values()):
        text.encode()  # half a surrogate pair is no text to the library
    if len(entries) > MAX_TENSORS:
        raise UnsupportedFormat(f"The file holds more than {MAX_TENSORS} tensors.")
    return {name: _describe_one(name, entry, dtypes) for name, entry in entries.items()}


def _describe_one(
    name: str, entry: Any, dtypes: Mapping[str, str]
) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TypeError(f"{name!r} is not described by type, shape and offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        raise UnsupportedFormat(
            f"{name!r} is of a type that is not taken; there are {', '.join(dtypes)}.",
            hint="Convert it where the model was built, such as with .float(), and save again.",
        )
    dtype = dtypes[entry["dtype"]]
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    if not isinstance(shape, list):
        raise TypeError(f"{name!r} has an impossible shape")
    if len(shape) > MAX_RANK:
        raise UnsupportedFormat(f"{name!r} has more than {MAX_RANK} dimensions.")
    if any(type(n) is not int or not 0 <= n <= MAX_ELEMENTS for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has an impossible shape or place")
    # The library multiplies from the left, and overflows before it comes to a side of 0.
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise ValueError(f"{name!r} has an impossible shape")
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{name!r} is not as long as its shape says")
    info = TensorInfo(
        shape=tuple(shape),
        dtype=dtype,
        storage=name,
        offset=0,
        stride=contiguous_stride(tuple(shape)),
    )
    return info, (begin, end)


def _check_layout(spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise DamagedFile("The tensors overlap or leave gaps.")
        position = end
    if position != data_bytes:
        raise DamagedFile("The file is longer or shorter than its header says.")
