"""
Bad uploads, each built by a function named after its trick, and the small parts they are made of.

    hostile_files() -> tuple[HostileFile, ...]     each must be refused, or fail, and leave no canary
    honest_files() -> tuple[HostileFile, ...]      each must be taken

A file is for one field of a form; the others are those of ``tests.service.forms.parts()``, which every
honest file fits. ``build(canary)`` makes its bytes; if ``carries_code``, a plain unpickler that reads
them creates the file *canary* (``tests/common/formats/test_hostile_files.py`` proves it). ``codes`` are
what the gate may answer. Nothing here runs a pickle: the bytes are put together by hand, opcode by
opcode.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Family(StrEnum):
    """What a trick is about."""

    CODE = "code"  # a pickle that runs something
    PICKLE = "pickle"  # a pickle that lies, or costs too much
    TENSOR = "tensor"  # a tensor that lies about its place or size
    ZIP = "zip"  # a zip with two readings
    FORMAT = "format"  # another format under our names
    SAFETENSORS = "safetensors"
    NUMPY = "numpy"
    IMAGES = "images"
    HONEST = "honest"


class Field(StrEnum):
    """The field of the form that a file is for."""

    MODEL = "model"
    SAMPLES = "samples"
    EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True)
class HostileFile:
    """A file with its trick, where it goes, and the codes with which the gate may refuse it."""

    name: str
    family: Family
    build: Callable[[Path], bytes]
    suffix: str
    field: Field
    codes: frozenset[str]
    carries_code: bool = False

    def __str__(self) -> str:
        return f"{self.family}: {self.name}".replace(" ", "-")


def hostile_files() -> tuple[HostileFile, ...]:
    """Return every bad upload; none is larger than 2 MB."""
    from tests.hostile import pickles, samples, tensors, zips

    return (*pickles.files(), *tensors.files(), *zips.files(), *samples.files())


def honest_files() -> tuple[HostileFile, ...]:
    """Return good uploads of every kind that is taken."""
    from tests.hostile import honest

    return tuple(honest.files())


# The parts of a pickle ------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """Push a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    """Push a whole number of any size."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def sequence(*parts: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def numbers(values: Sequence[int]) -> bytes:
    """Push a tuple of whole numbers."""
    return sequence(*map(number, values))


def named(module: str, attribute: str) -> bytes:
    """Push what a module calls *attribute*."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """Push what *function* returns."""
    return function + sequence(*arguments) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    """Push a dict."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(body: bytes) -> bytes:
    """Return a whole pickle that leaves *body* on the stack."""
    return b"\x80\x02" + body + b"."


def storage(elements: int, *, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Push a reference to a storage."""
    parts = (text("storage"), named("torch", kind), text(key), text("cpu"), number(elements))
    return sequence(*parts) + b"Q"


def tensor(
    shape: Sequence[int],
    stride: Sequence[int],
    *,
    of: bytes | None = None,
    offset: int = 0,
) -> bytes:
    """Push a tensor; its storage is ``of``, by default four float32 under the key 0."""
    return call(
        named("torch._utils", "_rebuild_tensor_v2"),
        storage(4) if of is None else of,
        number(offset),
        numbers(shape),
        numbers(stride),
        b"\x89",
        call(named("collections", "OrderedDict")),
    )


HONEST = pickled(mapping({"weight": tensor((4,), (1,))}))
"""A state dict with one tensor of four float32 in storage 0."""


# The zip around it ---------------------------------------------------------------------------------


def torch_zip(
    description: bytes = HONEST,
    storages: Mapping[str, bytes] | None = None,
    *,
    extra: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    root: str = "archive",
) -> bytes:
    """Return a zip as ``torch.save`` lays it out, by default an honest one."""
    members = {
        f"{root}/data.pkl": description,
        f"{root}/byteorder": b"little",
        **{
            f"{root}/data/{key}": content
            for key, content in ({"0": bytes(16)} if storages is None else storages).items()
        },
        f"{root}/version": b"3\n",
        **(extra or {}),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def zip_with_one_name_twice() -> bytes:
    """Give the second reader of ``data.pkl`` another file than the first."""
    second = {"archive/data.pkm": pickled(mapping({}))}
    return torch_zip(extra=second).replace(b"data.pkm", b"data.pkl")


def zip_with_lying_names() -> bytes:
    """Call a member one thing in the directory and another where it lies."""
    return torch_zip().replace(b"archive/data/0", b"archive/data/9", 1)


def zip_that_says_encrypted() -> bytes:
    """Set the encryption bit of every member in the directory."""
    content = bytearray(torch_zip())
    position = -1
    while (position := content.find(b"PK\x01\x02", position + 1)) >= 0:
        content[position + 8] |= 1
    return bytes(content)


def zip_with_a_lying_size() -> bytes:
    """Declare a terabyte for a member of sixteen bytes."""
    content = bytearray(torch_zip())
    position = content.find(b"PK\x01\x02")
    content[position + 20 : position + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


def zip_with_a_huge_directory(entries: int) -> bytes:
    """List one member a great many times, each time under another name."""
    member = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, 0, 0, 8, 0) + b"archive/"
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0
    )
    directory = b"".join(entry + b"%08d" % n for n in range(entries))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), len(member), 0)
    return member + directory + end


def zip_of_zeros_deflated(name: str, header: bytes, zeros: int, *, noise: int = 0) -> bytes:
    """
    Pack *zeros* zero bytes behind *header* into a thousandth of their size.

    With *noise* bytes that do not pack in each MiB it is less, so that no ratio gives it away.
    """
    content = random.Random(0).randbytes(noise) + bytes((1 << 20) - noise)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w") as member,
    ):
        member.write(header)
        for _ in range(zeros >> 20):
            member.write(content)
    return buffer.getvalue()


# Pickles that want to run code ---------------------------------------------------------------------


def _touch(canary: Path) -> bytes:
    return text(f"touch {canary}")


GADGETS: Mapping[str, Callable[[Path], bytes]] = {
    "os.system by GLOBAL and REDUCE": lambda canary: call(named("os", "system"), _touch(canary)),
    "posix.system": lambda canary: call(named("posix", "system"), _touch(canary)),
    "os.system by STACK_GLOBAL": lambda canary: call(
        text("os") + text("system") + b"\x93", _touch(canary)
    ),
    "os.system by INST": lambda canary: b"(" + _touch(canary) + b"ios\nsystem\n",
    "os.system by OBJ": lambda canary: b"(" + named("os", "system") + _touch(canary) + b"o",
    "Popen by NEWOBJ": lambda canary: (
        named("subprocess", "Popen")
        + sequence(sequence(text("touch"), text(str(canary))))
        + b"\x81"
    ),
    "Popen by NEWOBJ_EX": lambda canary: (
        named("subprocess", "Popen")
        + sequence(sequence(text("touch"), text(str(canary))))
        + b"}\x92"
    ),
    "eval": lambda canary: call(
        named("builtins", "eval"), text(f"__import__('os').system('touch {canary}')")
    ),
    "eval as Python 2 called it": lambda canary: call(
        named("__builtin__", "eval"), text(f"open('{canary}', 'w')")
    ),
    "exec by way of getattr": lambda canary: call(
        call(named("builtins", "getattr"), named("builtins", "__import__"), text("__call__")),
        _touch(canary),
    ),
    "runpy": lambda canary: call(named("runpy", "run_path"), text(str(canary))),
    "functools.partial": lambda canary: call(
        call(named("functools", "partial"), named("os", "system")), _touch(canary)
    ),
    "torch.load": lambda canary: call(named("torch", "load"), text(str(canary))),
    "torch.hub.load": lambda canary: call(named("torch.hub", "load"), text(str(canary))),
    "a global of an allowed function": lambda canary: call(
        named("torch._utils", "_rebuild_tensor_v2.__globals__"), _touch(canary)
    ),
    "an allowed name with a suffix": lambda canary: call(
        named("collections", "OrderedDict.fromkeys"), _touch(canary)
    ),
    "an allowed name split elsewhere": lambda canary: call(
        named("collections OrderedDict", ""), _touch(canary)
    ),
    "__setstate__ by BUILD on a class": lambda canary: (
        named("collections", "OrderedDict")
        + mapping({"__setstate__": named("torch", "Size")})
        + b"b"
        + mapping({"path": text(str(canary))})
        + b"b"
    ),
    "__setstate__ by BUILD on a plain dict": lambda canary: (
        b"}" + mapping({"__setstate__": text(str(canary))}) + b"b"
    ),
    "EXT1": lambda canary: b"\x82\x01" + sequence(_touch(canary)) + b"R",
    "EXT2": lambda canary: b"\x83\x01\x00" + sequence(_touch(canary)) + b"R",
    "EXT4": lambda canary: b"\x84\x01\x00\x00\x00" + sequence(_touch(canary)) + b"R",
    "a text persistent id": lambda canary: b"P" + str(canary).encode() + b"\n",
    "a call of a string": lambda canary: call(text("os.system"), _touch(canary)),
    "a call of a tensor": lambda canary: call(tensor((4,), (1,)), _touch(canary)),
    "an out-of-band buffer": lambda canary: b"\x97",
}
"""Ways to have code run by a pickle, by name; each makes a body that would create *canary*."""


def pickle_of_doubling_lists(depth: int) -> bytes:
    """Hold a list whose walked or printed form doubles with every level: a billion laughs."""
    body = b"]q\x00"
    for level in range(depth):
        inner, outer = bytes([level]), bytes([level + 1])
        body += b"](h" + inner + b"h" + inner + b"eq" + outer
    return pickled(sequence(body))


# safetensors ---------------------------------------------------------------------------------------


def safetensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file; *header* may be bytes that are no JSON, and *length* may lie."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype: str, shape: Sequence[object], begin: object, end: object) -> dict[str, object]:
    """Return a header's entry for one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# numpy files ---------------------------------------------------------------------------------------


def npy(header: str | bytes, data: bytes = b"", *, version: tuple[int, int] = (1, 0)) -> bytes:
    """Return an .npy with a header of any text."""
    encoded = header.encode("latin1") if isinstance(header, str) else header
    length = struct.pack("<H" if version == (1, 0) else "<I", len(encoded))
    return b"\x93NUMPY" + bytes(version) + length + encoded + data


def npy_header(shape: object, descr: object = "|u1", *, fortran: bool = False) -> str:
    """Return the header that describes an array."""
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape}) + "\n"


def npz(members: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an .npz of members that may be anything."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, compression)
    return buffer.getvalue()
