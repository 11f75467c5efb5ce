"""
What is fuzzed, one target per parser, and what must hold for every input.

1. Nothing but a ``Problem`` leaves a parser.
2. What the gate accepts, the strict loader behind it accepts: ``torch.load(weights_only=True)``,
   safetensors, ``numpy.load(allow_pickle=False)``, ``json``; and it reads the same keys and shapes.

Memory and time are bounded by the fuzzer that calls these (``fuzz.one``). A broken law is an
``AssertionError``, or whatever the parser threw. Seeds and tokens are built by code, from what honest
users send and from the hostile files of the tests.
"""

import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from common.errors import (
    DamagedFile,
    InvalidImages,
    NoStateDict,
    Problem,
    UnsafePickle,
    UnsupportedFormat,
    WeightsNotFinite,
)
from common.formats import image_folders
from common.formats.model import check_finite, inspect_model
from common.formats.safetensors import is_safetensors
from common.formats.samples import Purpose, inspect_samples
from service import fields
from tests import hostile_files as hostile
from tests.hostile.honest import SAMPLES
from worker import checkpoints
from worker.samples import load_samples

MAX_SAMPLE_BYTES = 1 << 20
_FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else None

warnings.filterwarnings("ignore", "Detected pickle protocol")


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    One parser.

    Attributes:
        check: Let the parser read an input; return whether it was accepted, raise where a law is broken.
        seeds: Build the inputs to start from; some are accepted.
        tokens: Byte strings that the format is made of.
    """

    check: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...] = field(default=())


def _must_hint(problem: Problem) -> None:
    assert problem.hint, f"{problem.code} says not what to do"


def _written(content: bytes) -> Path:
    """Write *content* over the file of this process."""
    path = _scratch()
    path.write_bytes(content)
    return path


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def _scratch() -> Path:
    if not _SCRATCH:
        _SCRATCH.append(tempfile.TemporaryDirectory(prefix="weightwash-fuzz-", dir=_FOLDER))
    return Path(_SCRATCH[0].name) / "input"


# Model files ---------------------------------------------------------------------------------------


def check_model(content: bytes) -> bool:
    """Hold the gate for model files against the loader behind it."""
    path = _written(content)
    try:
        described = inspect_model(path)
        check_finite(path, described)
    except Problem as exc:
        _must_hint(exc)
        return False
    try:
        loaded = checkpoints.load(path, described.format)
    except (DamagedFile, UnsafePickle, NoStateDict, WeightsNotFinite) as exc:
        raise AssertionError(f"the gate accepts what the loader refuses: {exc}") from exc
    except UnsupportedFormat:  # it counts what the gate need not: depth, reuse, overlaps
        return False
    shapes = {key: tuple(tensor.shape) for key, tensor in loaded.tensors.items()}
    assert shapes == described.shapes, "gate and loader see other tensors"
    dtypes = {key: str(tensor.dtype) for key, tensor in loaded.tensors.items()}
    assert dtypes == {key: f"torch.{t.dtype}" for key, t in described.tensors.items()}
    return True


def check_description(content: bytes) -> bool:
    """Hold the walk of a pickle against torch's, in a zip that is otherwise honest."""
    return check_model(hostile.torch_zip(content))


def check_header(content: bytes) -> bool:
    """Hold the reading of a safetensors header against the library's, with bytes that suit many."""
    data = bytes(16)
    accepted = check_model(hostile.safetensors_file(content, data))
    if accepted:
        names = safetensors.torch.load(hostile.safetensors_file(content, data)).keys()
        assert all(isinstance(name, str) for name in names)
    return accepted


def _torch_saves(root: object) -> bytes:
    file = io.BytesIO()
    torch.save(root, file)
    return file.getvalue()


def _model_roots() -> list[object]:
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1)).state_dict()
    return [
        state,
        {"net": state, "acc": 0.5, "epoch": 3, "flags": [True, None, (1, "x")]},
        {f"module.{key}": value.half() for key, value in state.items()},
        dict(torch.nn.Linear(2, 2).named_parameters()),
        {"w": torch.arange(12.0).reshape(3, 4).T, "v": torch.ones(3, dtype=torch.bool)},
    ]


def _torch_seeds() -> list[bytes]:
    return [*map(_torch_saves, _model_roots()), hostile.torch_zip(), hostile.zip_with_one_name_twice(),
            hostile.zip_with_lying_names(), hostile.zip_that_says_encrypted(),
            hostile.zip_with_a_lying_size()]  # fmt: skip


def _description_seeds() -> list[bytes]:
    descriptions = []
    for content in map(_torch_saves, _model_roots()):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            descriptions.append(archive.read("archive/data.pkl"))
    gadgets = [hostile.pickled(build(Path("/canary"))) for build in hostile.GADGETS.values()]
    two = hostile.mapping(
        {"weight": hostile.tensor((4,), (1,)), "t": hostile.tensor((2, 2), (1, 2))}
    )
    beside = hostile.mapping({"net": two, "epoch": hostile.number(3), "x": hostile.number(1 << 70)})
    return [hostile.HONEST, hostile.pickled(two), hostile.pickled(beside), *descriptions, *gadgets]


_GLOBALS = (
    ("collections", "OrderedDict"), ("collections", "Counter"), ("torch", "Size"), ("torch", "device"),
    ("torch", "float32"), ("torch", "FloatStorage"), ("torch", "BoolStorage"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("os", "system"),
)  # fmt: skip

_PICKLE_TOKENS = (
    *(hostile.named(*name) for name in _GLOBALS),
    *(hostile.text(text) for text in ("storage", "cpu", "cuda:0", "0", "weight", "state_dict")),
    *(hostile.number(n) for n in (-1, 0, 1, 4, 1 << 31, 1 << 40)),
    hostile.storage(4), hostile.tensor((4,), (1,)), hostile.tensor((2, 2), (1, 1)),
    b"q\x00", b"h\x00", b"}(", b"](", b"u", b"e", b"b", b"t", b"R", b"Q", b"\x85", b"\x86", b"\x87",
    b"\x88", b"\x89", b"\x93", b"\x94", b"G" + bytes(8),
)  # fmt: skip


def _safetensors_seeds() -> list[bytes]:
    tensors = {"w": torch.ones(2, 2), "module.b": torch.ones(3).half(), "n": torch.tensor(3)}
    honest = safetensors.torch.save(tensors, metadata={"format": "pt"})
    entry = hostile.entry("F32", [2, 2], 0, 16)
    return [
        honest,
        safetensors.torch.save({"module.w": torch.zeros(0, 3)}),
        hostile.safetensors_file({"w": entry}, bytes(16)),
        hostile.safetensors_file({"w": entry}, bytes(15)),
        hostile.safetensors_file({"w": entry, "v": entry}, bytes(16)),
        hostile.safetensors_file(b'{"w": 1, "w": 2}'),
        hostile.safetensors_file(b"{" * 100),
    ]


def _header_seeds() -> list[bytes]:
    entry = hostile.entry
    headers: list[object] = [
        {"w": entry("F32", [2, 2], 0, 16)},
        {"a": entry("F16", [4], 0, 8), "b": entry("BF16", [2, 2], 8, 16)},
        {"a": entry("I64", [], 0, 8), "b": entry("U8", [8], 8, 16), "__metadata__": {"k": "v"}},
        {"a": entry("F64", [2], 0, 16), "z": entry("BOOL", [0, 3], 16, 16)},
        {"w": entry("F32", [1 << 62, 4], 0, 16)},
        {"w": entry("F32", [True], 0, 16)},
    ]
    return [json.dumps(header).encode() for header in headers]


_JSON_TOKENS = (b'{"', b'":', b"[", b"]", b"}", b",", b"null", b"true", b"1e999", b"-1", b"NaN",
                b"\\u0000", b"\\ud800", b'"__metadata__":{}', b'"dtype":"F32"', b'"shape":[',
                b'"data_offsets":[', b"9223372036854775808", b"\xff")  # fmt: skip


# Sample files --------------------------------------------------------------------------------------


def check_samples(content: bytes) -> bool:
    """Hold the gate for sample files against numpy, safetensors and Pillow, for each purpose."""
    path = _written(content)
    accepted = False
    for purpose in Purpose:
        try:
            described = inspect_samples(path, purpose, max_bytes=MAX_SAMPLE_BYTES)
        except Problem as exc:
            _must_hint(exc)
            continue
        try:
            loaded = load_samples(path, purpose)
        except Problem as exc:
            if isinstance(exc, InvalidImages) and _holds_pictures(path):
                continue  # they are decoded by the loader alone
            raise AssertionError(f"the gate accepts what the loader refuses: {exc}") from exc
        assert tuple(loaded.images.shape) == (described.count, *described.image_shape)
        if described.labels is not None:
            assert loaded.labels is not None
            assert loaded.labels.tolist() == list(described.labels)
        if described.targets is not None:
            assert loaded.targets is not None
            assert loaded.targets.tolist() == list(described.targets)
        accepted = True
    return accepted


def _holds_pictures(path: Path) -> bool:
    if is_safetensors(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return image_folders.are_in(archive)


def check_array(content: bytes) -> bool:
    """Hold the reading of one array against numpy's, as the images and as the labels of a file."""
    labels = hostile.npy(hostile.npy_header((2,)), bytes(2))
    images = hostile.npy(hostile.npy_header((2, 2, 2, 1)), bytes(8))
    as_images = check_samples(hostile.npz({"images": content, "labels": labels}))
    as_labels = check_samples(hostile.npz({"images": images, "labels": content, "target": labels}))
    return as_images or as_labels


def check_sample_header(content: bytes) -> bool:
    """Hold the reading of a safetensors header against the library's, with bytes that suit many."""
    return check_samples(hostile.safetensors_file(content, bytes(16)))


def _npz(*, compressed: bool = False, **arrays: object) -> bytes:
    file = io.BytesIO()
    named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    (np.savez_compressed if compressed else np.savez)(file, **named)
    return file.getvalue()


def _sample_seeds() -> list[bytes]:
    images = np.arange(2 * 3 * 3 * 1, dtype=np.uint8).reshape(2, 3, 3, 1)
    floats = np.zeros((2, 1, 3, 3), np.float32)
    return [
        *(build() for _, build in SAMPLES.values()),
        _npz(images=images, labels=[0, 1]),
        _npz(images=images, labels=[0, 1], target=1),
        _npz(x=floats, y=[0, 1], target=[1, 1]),
        _npz(images=floats.astype(">f8"), names=["a", "b"]),
        _npz(compressed=True, images=images, labels=[0, 1]),
        *_tensor_seeds(),
        hostile.zip_that_says_encrypted(),
        hostile.zip_with_a_lying_size(),
    ]


def _tensor_seeds() -> list[bytes]:
    images = torch.arange(2 * 2 * 2).reshape(2, 2, 2, 1).byte()
    floats, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    honest = safetensors.torch.save({"images": images, "labels": labels, "target": torch.tensor(1)})
    return [
        honest,
        honest[:-1],
        safetensors.torch.save({"x": floats.bfloat16(), "y": labels.short(), "target": labels}),
        safetensors.torch.save({"images": floats.half(), "z": floats}, metadata={"format": "pt"}),
        safetensors.torch.save({"images": floats.double() + 1}),
        safetensors.torch.save({"images": images, "labels": labels.to(torch.uint64)}),
    ]


def _sample_header_seeds() -> list[bytes]:
    entry = hostile.entry
    headers: list[object] = [
        {"images": entry("U8", [1, 4, 4, 1], 0, 16)},
        {"x": entry("F16", [2, 1, 2, 1], 0, 8), "labels": entry("I32", [2], 8, 16)},
        {"images": entry("BF16", [2, 1, 1, 2], 0, 8), "y": entry("U16", [2], 8, 12),
         "target": entry("U32", [], 12, 16), "__metadata__": {"k": "v"}},
        {"images": entry("U8", [8, 1, 1, 1], 0, 8), "z": entry("F8_E5M2", [2, 4], 8, 16)},
        {"images": entry("F64", [2, 1, 1, 1], 0, 16), "x": entry("U8", [0], 16, 16)},
        {"images": entry("U8", [1 << 40, 1 << 40, 0, 1], 0, 0)},
    ]  # fmt: skip
    return [json.dumps(header).encode() for header in headers]


def _array_seeds() -> list[bytes]:
    header = hostile.npy_header
    return [
        hostile.npy(header((2, 3, 3, 1)), bytes(18)),
        hostile.npy(header((2, 1, 2, 2), "<f4"), bytes(32)),
        hostile.npy(header((2, 1, 1, 1), ">f8", fortran=True), bytes(16)),
        hostile.npy(header((2,), "<i8"), bytes(16)),
        hostile.npy(header((), "<u2"), bytes(2)),
        hostile.npy(header((2,), "|O"), b"\x80\x02cos\nsystem\n."),
        hostile.npy(header((1 << 40,)), b""),
        hostile.npy(header((2,)), bytes(2), version=(2, 0)),
    ]


_NPY_TOKENS = (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"'descr': ", b"'fortran_order': ",
               b"'shape': ", b"True", b"False", b"(2, 3, 3, 1)", b"(2,)", b"()", b"'<f4'", b"'>i8'",
               b"'|u1'", b"'|O'", b"'|V8'", b"-1", b"99999999999999999999",
               b"[('a', '<f4')]")  # fmt: skip

_TENSOR_TOKENS = (b'"images":{', b'"x":{', b'"labels":{', b'"y":{', b'"target":{', b'"dtype":"U8"',
                  b'"dtype":"BF16"', b'"dtype":"F16"', b'"dtype":"F64"', b'"dtype":"I64"',
                  b'"dtype":"U64"', b'"dtype":"F8_E4M3"', b'"shape":[]', b"[2,1,1,2]",
                  b"1099511627776")  # fmt: skip

_IMAGE_TOKENS = (b"\x89PNG\r\n\x1a\n", b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND",
                 b"\xff\xd8\xff\xe0", b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xd9",
                 b"a/1.png", b"a/1.jpg", b"classes.json")  # fmt: skip

_ZIP_TOKENS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08",
               b"images.npy", b"labels.npy", b"archive/data.pkl", b"archive/data/0", b"archive/byteorder",
               b"\x01\x00\x10\x00", b"\xff\xff\xff\xff", b"\xff\xff")  # fmt: skip


# Plain fields --------------------------------------------------------------------------------------


def check_fields(content: bytes) -> bool:
    """Hold the readers of plain fields against ``json``: what is accepted can be sent back."""
    text = content.decode(errors="surrogateescape")
    texts = dict.fromkeys(("params", "seed", "mean", "cancel_after"), text)
    accepted = False
    readers: tuple[Callable[[], object], ...] = (
        lambda: fields.json_object(texts, "params"),
        lambda: fields.whole_number(texts, "seed", default=0, low=0, high=2**63 - 1),
        lambda: fields.per_channel(texts, "mean", 3),
        lambda: fields.cancel_after(texts),
    )
    for read in readers:
        try:
            value = read()
        except Problem as exc:
            _must_hint(exc)
            continue
        accepted = True
        sent = json.dumps(value, allow_nan=False).encode()
        assert json.loads(sent) == (list(value) if isinstance(value, tuple) else value)
    return accepted


def _field_seeds() -> list[bytes]:
    return [b"{}", b'{"epochs": 3, "flip": false, "tau": 1e3}', b'{"a": {"b": [1, {"c": null}]}}', b"7",
            b"0.49,0.48,0.45", b"0.5", b"-1", b"nan", b'{"a": 1, "a": 2}', b'{"x": "\\ud800"}',
            b'{"x": NaN}', b"[" * 100, b"1" * 5000]  # fmt: skip


TARGETS: Mapping[str, Target] = {
    "torch_zip": Target(
        check=check_model, seeds=_torch_seeds, tokens=(*_ZIP_TOKENS, *_PICKLE_TOKENS)
    ),
    "pickle_walk": Target(check=check_description, seeds=_description_seeds, tokens=_PICKLE_TOKENS),
    "safetensors": Target(check=check_model, seeds=_safetensors_seeds, tokens=_JSON_TOKENS),
    "safetensors_header": Target(check=check_header, seeds=_header_seeds, tokens=_JSON_TOKENS),
    "samples": Target(
        check=check_samples,
        seeds=_sample_seeds,
        tokens=(*_ZIP_TOKENS, *_NPY_TOKENS, *_IMAGE_TOKENS, *_JSON_TOKENS, *_TENSOR_TOKENS),
    ),
    "samples_header": Target(
        check=check_sample_header,
        seeds=_sample_header_seeds,
        tokens=(*_JSON_TOKENS, *_TENSOR_TOKENS),
    ),
    "npy": Target(check=check_array, seeds=_array_seeds, tokens=_NPY_TOKENS),
    "fields": Target(check=check_fields, seeds=_field_seeds, tokens=_JSON_TOKENS),
}
"""Every target by its name."""
