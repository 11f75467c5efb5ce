"""Tensors that lie, in a pickle or in a safetensors header."""

import struct
from collections.abc import Callable, Mapping

from common.formats.safetensors import MAX_HEADER_BYTES, MAX_TENSORS
from tests.hostile_files import (
    Family,
    Field,
    HostileFile,
    call,
    entry,
    mapping,
    named,
    number,
    numbers,
    pickled,
    safetensors_file,
    sequence,
    storage,
    tensor,
    text,
    torch_zip,
)

DAMAGED = frozenset({"damaged-file"})
LIMIT = frozenset({"unsupported-format", "damaged-file"})
W = entry("F32", [2], 0, 8)
HALF = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def weight(body: bytes) -> bytes:
    """Return a zip with one tensor."""
    return torch_zip(pickled(mapping({"weight": body})))


def sparse_tensor() -> bytes:
    """Ask for a sparse tensor, whose indices nobody has checked."""
    return call(named("torch._utils", "_rebuild_sparse_tensor"), number(0), sequence())


def subclass() -> bytes:
    """Ask for a tensor of any type."""
    return call(
        named("torch._tensor", "_rebuild_from_type_v2"), number(0), number(0), sequence(), b"}"
    )


IN_PICKLES: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "an element outside the storage": (lambda: weight(tensor((5,), (1,))), DAMAGED),
    "an offset outside the storage": (lambda: weight(tensor((4,), (1,), offset=1 << 39)), DAMAGED),
    "a negative offset": (lambda: weight(tensor((4,), (1,), offset=-4)), DAMAGED),
    "a negative stride": (lambda: weight(tensor((4,), (-1,))), DAMAGED),
    "negative sides": (lambda: weight(tensor((-2, -2), (1, 1))), DAMAGED),
    "a terabyte of stride 0": (lambda: weight(tensor((1 << 38,), (0,))), DAMAGED),
    "sides whose product wraps around": (lambda: weight(tensor((1 << 33,) * 4, (0,) * 4)), DAMAGED),
    "windows that overlap": (lambda: weight(tensor((3, 2), (1, 1))), DAMAGED),
    "nine dimensions": (lambda: weight(tensor((1,) * 9, (1,) * 9)), LIMIT),
    "a storage of a terabyte": (lambda: weight(tensor((4,), (1,), of=storage(1 << 38))), DAMAGED),
    "a storage longer than its record": (lambda: weight(tensor((4,), (1,), of=storage(5))), DAMAGED),
    "a record longer than its storage": (
        lambda: torch_zip(storages={"0": bytes(20)}), DAMAGED),
    "a storage that is not there": (lambda: weight(tensor((4,), (1,), of=storage(4, key="9"))), DAMAGED),
    "a storage of two types": (
        lambda: torch_zip(pickled(mapping({
            "a": tensor((4,), (1,)),
            "b": tensor((4,), (1,), of=storage(4, kind="IntStorage"))}))), DAMAGED),
    "a storage by a path": (
        lambda: weight(tensor((4,), (1,), of=storage(4, key="../version"))), DAMAGED),
    "a quantised storage": (
        lambda: weight(tensor((4,), (1,), of=storage(4, kind="QInt8Storage"))),
        frozenset({"unsafe-pickle"})),
    "a sparse tensor": (lambda: weight(sparse_tensor()), frozenset({"unsafe-pickle"})),
    "a tensor of any type": (lambda: weight(subclass()), frozenset({"unsafe-pickle"})),
    "a shape that is a text": (
        lambda: weight(call(named("torch._utils", "_rebuild_tensor_v2"), storage(4), number(0),
                            text("4"), numbers((1,)), b"\x89",
                            call(named("collections", "OrderedDict")))), DAMAGED),
    "a name with a NUL": (
        lambda: torch_zip(pickled(mapping({"a\0b": tensor((4,), (1,))}))), LIMIT),
    "a name of half a surrogate pair": (
        lambda: torch_zip(pickled(b"}X\x03\x00\x00\x00\xed\xa0\x80" + tensor((4,), (1,)) + b"s")),
        LIMIT),
    "a name of a hundred thousand letters": (
        lambda: torch_zip(pickled(mapping({"w" * 100_000: tensor((4,), (1,))}))), LIMIT),
    "no tensor": (lambda: torch_zip(pickled(b"}")), frozenset({"no-state-dict"})),
    "a NaN": (
        lambda: torch_zip(storages={"0": struct.pack("<4f", 1, 2, float("nan"), 4)}),
        frozenset({"weights-not-finite"})),
}  # fmt: skip

IN_SAFETENSORS: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "a header of exabytes": (lambda: safetensors_file({"w": W}, bytes(8), length=1 << 62), LIMIT),
    "a header just above the limit": (
        lambda: safetensors_file({"w": W}, bytes(8), length=MAX_HEADER_BYTES + 1), LIMIT),
    "a header longer than the file": (
        lambda: safetensors_file({"w": W}, bytes(8), length=4000), DAMAGED),
    "a header of no length": (lambda: safetensors_file({"w": W}, bytes(8), length=0), DAMAGED),
    "overlapping tensors": (
        lambda: safetensors_file({"w": W, "v": entry("F32", [2], 4, 12)}, bytes(12)), DAMAGED),
    "two tensors in one place": (lambda: safetensors_file({"w": W, "v": W}, bytes(8)), DAMAGED),
    "a gap between tensors": (
        lambda: safetensors_file({"w": W, "v": entry("F32", [2], 12, 20)}, bytes(20)), DAMAGED),
    "a pickle behind the tensors": (
        lambda: safetensors_file({"w": W}, bytes(8) + b"cos\nsystem\n."), DAMAGED),
    "a tensor cut short": (lambda: safetensors_file({"w": W}, bytes(7)), DAMAGED),
    "a shape of exabytes": (
        lambda: safetensors_file({"w": entry("F32", [1 << 60] * 4, 0, 8)}, bytes(8)), DAMAGED),
    "a shape whose product wraps around": (
        lambda: safetensors_file({"w": entry("F32", [1 << 32, 1 << 32], 0, 0)}), DAMAGED),
    "a shape that overflows before its 0": (
        lambda: safetensors_file({"w": entry("F32", [1 << 40, 1 << 40, 0], 0, 0)}), DAMAGED),
    "a negative shape": (
        lambda: safetensors_file({"w": entry("F32", [-1, -2], 0, 8)}, bytes(8)), DAMAGED),
    "offsets turned around": (
        lambda: safetensors_file({"w": entry("F32", [2], 8, 0)}, bytes(8)), DAMAGED),
    "a fraction for a side": (
        lambda: safetensors_file({"w": entry("F32", [2.5], 0, 8)}, bytes(8)), DAMAGED),
    "nine dimensions": (lambda: safetensors_file({"w": entry("F32", [1] * 9, 0, 4)}, bytes(4)), LIMIT),
    "an unknown type": (lambda: safetensors_file({"w": entry("OBJ", [8], 0, 8)}, bytes(8)), LIMIT),
    "a name twice": (
        lambda: safetensors_file(HALF + b"," + HALF[1:] + b"}", bytes(8)), DAMAGED),
    "a name twice by an escape": (
        lambda: safetensors_file(HALF + b"," + HALF[1:].replace(b'"w"', b'"\\u0077"') + b"}", bytes(8)),
        DAMAGED),
    "a field twice": (
        lambda: safetensors_file(
            b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), DAMAGED),
    "deep JSON": (lambda: safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), DAMAGED),
    "a million lists": (lambda: safetensors_file(b'{"a":[' + b"[]," * 600_000 + b"[]]}"), DAMAGED),
    "a number of a million digits": (
        lambda: safetensors_file(
            b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}',
            bytes(8)), DAMAGED),
    "a text of quotes": (lambda: safetensors_file(b'{"' + b'\\"' * 500_000), DAMAGED),
    "a great many tensors": (
        lambda: safetensors_file({f"{n:x}": entry("U8", [0], 0, 0) for n in range(MAX_TENSORS + 1)}),
        LIMIT),
    "a name that turns the writing": (lambda: safetensors_file({"\u202ew": W}, bytes(8)), LIMIT),
    "metadata that is a tensor": (
        lambda: safetensors_file({"__metadata__": W}, bytes(8)), DAMAGED),
    "a header in UTF-16": (
        lambda: safetensors_file(HALF.decode().encode("utf-16-le"), bytes(8)), DAMAGED),
    "a NaN": (
        lambda: safetensors_file({"w": W}, struct.pack("<2f", float("nan"), 1)),
        frozenset({"weights-not-finite"})),
}  # fmt: skip


def files() -> list[HostileFile]:
    """Return both kinds."""
    return [
        HostileFile(
            name=name,
            family=family,
            build=lambda _, build=build: build(),  # type: ignore[misc]
            suffix=suffix,
            field=Field.MODEL,
            codes=codes,
        )
        for family, suffix, table in (
            (Family.TENSOR, ".pt", IN_PICKLES),
            (Family.SAFETENSORS, ".safetensors", IN_SAFETENSORS),
        )
        for name, (build, codes) in table.items()
    ]
