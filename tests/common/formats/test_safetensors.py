"""What safetensors writes is read exactly; a header that lies is refused."""

import json
import math
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.errors import (
    DamagedFile,
    NoStateDict,
    Problem,
    Refused,
    UnsupportedFormat,
    WeightsNotFinite,
)
from common.formats.model import ModelFile, ModelFormat, check_finite, inspect_model
from common.formats.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, tensor_positions
from tests.common.formats.test_torch_zip import DTYPES, FLOATS, small_net
from tests.hostile_files import entry, safetensors_file


def saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Write *state* as a client would."""
    save_file(state, path, metadata={"format": "pt"})
    return path


def written(content: bytes, tmp_path: Path) -> Path:
    """Write the bytes of an upload."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def inspected(path: Path) -> ModelFile:
    """Inspect a file and read every weight of it."""
    model = inspect_model(path)
    check_finite(path, model)
    return model


def assert_describes(model: ModelFile, state: dict[str, torch.Tensor]) -> None:
    """Check every key, shape and type against the tensors themselves."""
    assert model.format is ModelFormat.SAFETENSORS
    assert model.wrapper is None
    assert set(model.tensors) == set(state)
    for key, tensor in state.items():
        assert model.tensors[key].shape == tuple(tensor.shape)
        assert model.tensors[key].dtype == str(tensor.dtype).removeprefix("torch.")


# Honest files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_is_described(tmp_path: Path, prefix: str) -> None:
    """A network's state dict is read, with and without the prefix of ``DataParallel``."""
    state = small_net().state_dict()
    path = saved({prefix + key: tensor for key, tensor in state.items()}, tmp_path / "m")
    model = inspected(path)
    assert model.prefix == prefix
    assert_describes(model, state)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=12).filter(
            lambda t: t != "__metadata__"
        ),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=6,
    )
)
def test_any_state_dict_is_described_exactly(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    """``inspect_model(save_file(state)) == state``, for keys, shapes and types."""
    state = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
    model = inspected(saved(state, tmp_path_factory.mktemp("any") / "m"))
    assert_describes(model, {key.removeprefix(model.prefix): t for key, t in state.items()})


def test_positions_are_where_the_bytes_lie(tmp_path: Path) -> None:
    """``tensor_positions`` points at each tensor's first byte."""
    state = {name: torch.full((3,), float(n)) for n, name in enumerate("abc")}
    path = saved(state, tmp_path / "m")
    content = path.read_bytes()
    for name, position in tensor_positions(path).items():
        assert content[position : position + 12] == state[name].numpy().tobytes()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 700_000])
def test_not_finite_weight_is_found(
    tmp_path: Path, value: float, dtype: torch.dtype, place: int
) -> None:
    """NaN and both infinities are found in every float type, with the key named."""
    bad = torch.ones(700_001).to(dtype)
    bad[place] = value
    path = saved({"a": torch.ones(3), "module.bad": bad}, tmp_path / "m")
    model = inspect_model(path)
    with pytest.raises(WeightsNotFinite, match="bad"):
        check_finite(path, model)


def test_not_finite_weight_behind_the_prefix_is_found(tmp_path: Path) -> None:
    """The prefix that a key loses does not hide its bytes."""
    path = saved({"module.bad": torch.tensor([math.nan])}, tmp_path / "m")
    with pytest.raises(WeightsNotFinite):
        check_finite(path, inspect_model(path))


# Headers that lie ----------------------------------------------------------------------------------

W = entry("F32", [2], 0, 8)
TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
LIES: dict[str, tuple[bytes, type[Problem]]] = {
    "a header of exabytes": (safetensors_file({"w": W}, bytes(8), length=(1 << 63) + 5),
                             UnsupportedFormat),
    "a header above the limit": (safetensors_file({"w": W}, bytes(8), length=MAX_HEADER_BYTES + 1),
                                 UnsupportedFormat),
    "a header longer than the file": (safetensors_file({"w": W}, bytes(8), length=1000),
                                      DamagedFile),
    "a header cut short": (safetensors_file({"w": W}, bytes(8), length=20), DamagedFile),
    "a header of length 0": (safetensors_file({"w": W}, bytes(8), length=0), DamagedFile),
    "no tensor": (safetensors_file({}), NoStateDict),
    "only metadata": (safetensors_file({"__metadata__": {"a": "b"}}), NoStateDict),
    "metadata that is a number": (safetensors_file({"__metadata__": 1, "w": W}, bytes(8)),
                                  DamagedFile),
    "metadata that holds a number": (safetensors_file({"__metadata__": {"a": 1}, "w": W}, bytes(8)),
                                     DamagedFile),
    "overlapping tensors": (safetensors_file({"w": W, "v": entry("F32", [2], 4, 12)}, bytes(12)),
                            DamagedFile),
    "one place for two tensors": (safetensors_file({"w": W, "v": W}, bytes(8)), DamagedFile),
    "a gap": (safetensors_file({"w": W, "v": entry("F32", [2], 12, 20)}, bytes(20)), DamagedFile),
    "a gap before the first": (safetensors_file({"w": entry("F32", [2], 4, 12)}, bytes(12)),
                               DamagedFile),
    "bytes after the last": (safetensors_file({"w": W}, bytes(9)), DamagedFile),
    "bytes missing": (safetensors_file({"w": W}, bytes(7)), DamagedFile),
    "a length that the shape denies": (safetensors_file({"w": entry("F32", [3], 0, 8)}, bytes(8)),
                                       DamagedFile),
    "an end before the begin": (safetensors_file({"w": entry("F32", [2], 8, 0)}, bytes(8)),
                                DamagedFile),
    "a negative begin": (safetensors_file({"w": entry("F32", [2], -8, 0)}, bytes(8)), DamagedFile),
    "a negative shape": (safetensors_file({"w": entry("F32", [-1, -2], 0, 8)}, bytes(8)),
                         DamagedFile),
    "a float shape": (safetensors_file({"w": entry("F32", [2.0], 0, 8)}, bytes(8)), DamagedFile),
    "a bool shape": (safetensors_file({"w": entry("F32", [True, 2], 0, 8)}, bytes(8)),
                     DamagedFile),
    "a huge shape": (safetensors_file({"w": entry("F32", [1 << 60] * 8, 0, 8)}, bytes(8)),
                     DamagedFile),
    "a huge side of an empty tensor": (safetensors_file({"w": entry("F32", [0, 1 << 70], 0, 0)}),
                                       DamagedFile),
    "huge sides before a side of 0": (
        safetensors_file({"w": entry("F32", [1 << 40, 1 << 40, 0], 0, 0)}), DamagedFile),
    "huge sides after a side of 0": (
        safetensors_file({"w": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}), DamagedFile),
    "too many sides": (safetensors_file({"w": entry("F32", [1] * 9, 0, 4)}, bytes(4)),
                       UnsupportedFormat),
    "an unknown type": (safetensors_file({"w": entry("F8_E4M3", [8], 0, 8)}, bytes(8)),
                        UnsupportedFormat),
    "a type that is a list": (safetensors_file({"w": {**W, "dtype": ["F32"]}}, bytes(8)),
                              UnsupportedFormat),
    "a shape that is a string": (safetensors_file({"w": {**W, "shape": ""}}, bytes(8)),
                                 DamagedFile),
    "a scalar whose shape is an object": (
        safetensors_file({"w": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, bytes(4)),
        DamagedFile),
    "three offsets": (safetensors_file({"w": {**W, "data_offsets": [0, 4, 8]}}, bytes(8)),
                      DamagedFile),
    "no offsets": (safetensors_file({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), DamagedFile),
    "an entry that is a list": (safetensors_file({"w": [1]}, bytes(8)), DamagedFile),
    "an entry that is null": (safetensors_file({"w": None}, bytes(8)), DamagedFile),
    "one name twice": (safetensors_file(TWICE + TWICE[1:-1] + b"}", bytes(8)), DamagedFile),
    "one field twice": (
        safetensors_file(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
                         bytes(8)), DamagedFile),
    "a field too many": (safetensors_file({"w": {**W, "offset": 0}}, bytes(8)), DamagedFile),
    "minus zero": (
        safetensors_file(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8)),
        DamagedFile),
    "a million lists": (safetensors_file(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), DamagedFile),
    "a text of quotes": (safetensors_file(b'{"' + b'\\"' * 1_000_000), DamagedFile),
    "a name with a NUL": (safetensors_file({"w\0": W}, bytes(8)), UnsupportedFormat),
    "a name of half a pair": (safetensors_file({"w\ud800": W}, bytes(8)), UnsupportedFormat),
    "a name that turns the writing": (safetensors_file({"\u202ew": W}, bytes(8)),
                                      UnsupportedFormat),
    "a name of a thousand letters": (safetensors_file({"w" * 1000: W}, bytes(8)),
                                     UnsupportedFormat),
    "metadata of half a pair": (
        safetensors_file({"__metadata__": {"a": "\ud800"}, "w": W}, bytes(8)), DamagedFile),
    "no JSON": (safetensors_file(b"{" + bytes(20)), DamagedFile),
    "half a JSON": (safetensors_file(TWICE, bytes(8)), DamagedFile),
    "deep JSON": (safetensors_file(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), DamagedFile),
    "deep lists": (safetensors_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
                   DamagedFile),
    "a number of a million digits": (
        safetensors_file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000
                         + b'],"data_offsets":[0,8]}}', bytes(8)), DamagedFile),
    "NaN for a number": (
        safetensors_file(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
        DamagedFile),
    "a header in UTF-16": (safetensors_file(json.dumps({"w": W}).encode("utf-16-le"), bytes(8)),
                           DamagedFile),
    "a header that is not UTF-8": (safetensors_file(b'{"\xff":1}'), DamagedFile),
    "too many tensors": (
        safetensors_file({f"{n:x}": entry("U8", [0], 0, 0) for n in range(MAX_TENSORS + 1)}),
        UnsupportedFormat),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    """No number or name in the header is taken on trust."""
    content, problem = LIES[lie]
    with pytest.raises(Problem) as caught:
        inspect_model(written(content, tmp_path))
    assert type(caught.value) is problem


def test_truncated_file_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    """A file that is cut anywhere behind its first bytes is damaged."""
    whole = saved(small_net().state_dict(), tmp_path / "m").read_bytes()
    for length in [*range(9, len(whole), 53), len(whole) - 1]:
        with pytest.raises(DamagedFile):
            inspect_model(written(whole[:length], tmp_path))


@pytest.mark.parametrize("length", range(1, 9))
def test_file_shorter_than_its_length_field(tmp_path: Path, length: int) -> None:
    """A file of a few bytes is of no known format."""
    with pytest.raises(UnsupportedFormat):
        inspect_model(written(struct.pack("<Q", 2)[:length], tmp_path))


def test_noise_never_raises_anything_but_a_refusal(tmp_path: Path) -> None:
    """Flips and cuts at random end in a ``Refused`` or in an honest reading."""
    random_ = random.Random(21)
    honest = saved({"w": torch.ones(3, 2), "b": torch.zeros(2)}, tmp_path / "m").read_bytes()
    for _ in range(1000):
        content = bytearray(honest)
        for _ in range(random_.choice([1, 1, 2, 6])):
            place = random_.randrange(len(content))
            if random_.random() < 0.8:
                content[place] = random_.randrange(256)
            else:
                del content[place : place + random_.randrange(1, 10)]
        with suppress(Refused):
            inspected(written(bytes(content), tmp_path))
