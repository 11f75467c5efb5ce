"""What ``torch.save`` writes is read exactly; whatever else calls itself so is refused."""

import io
import math
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import (
    DamagedFile,
    EmptyFile,
    NoStateDict,
    PickledModule,
    Problem,
    Refused,
    UnsafeZip,
    UnsupportedFormat,
    WeightsNotFinite,
)
from common.formats.model import WRAPPERS, ModelFile, ModelFormat, check_finite, inspect_model
from tests import hostile_files as hostile

REEXPORT = 'torch.save(model.state_dict(), "model.pt")'
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


def small_net() -> nn.Sequential:
    """Return a small network with a counter, a bias and no bias."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )


def saved(root: object, path: Path, **options: Any) -> Path:
    """Write *root* as a client would."""
    torch.save(root, path, **options)
    return path


def written(content: bytes, path: Path) -> Path:
    """Write the bytes of an upload."""
    path.write_bytes(content)
    return path


def assert_describes(model: ModelFile, state: dict[str, torch.Tensor]) -> None:
    """Check every key, shape, type and place against the tensors themselves."""
    assert list(model.tensors) == list(state)
    for key, tensor in state.items():
        found = model.tensors[key]
        assert found.shape == tuple(tensor.shape)
        assert found.dtype == str(tensor.dtype).removeprefix("torch.")
        assert found.offset == tensor.storage_offset()
        assert found.stride == tuple(tensor.stride())
    assert model.shapes == {key: tuple(tensor.shape) for key, tensor in state.items()}


def inspected(path: Path) -> ModelFile:
    """Inspect a file and read every weight of it."""
    model = inspect_model(path)
    check_finite(path, model)
    return model


# Honest files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [*WRAPPERS, None])
@pytest.mark.parametrize("parallel", [False, True])
def test_state_dict_is_found_where_scripts_put_it(
    tmp_path: Path, wrapper: str | None, *, parallel: bool
) -> None:
    """Bare or under each wrapper, with and without the prefix, the same tensors are found."""
    net = small_net()
    stored = nn.DataParallel(net).state_dict() if parallel else net.state_dict()
    root = stored if wrapper is None else {"epoch": 3, "best": 0.5, wrapper: stored, "arch": "x"}
    model = inspected(saved(root, tmp_path / "model.pt"))
    assert model.format is ModelFormat.TORCH
    assert model.wrapper == wrapper
    assert model.prefix == ("module." if parallel else "")
    assert_describes(model, net.state_dict())


def test_first_wrapper_wins(tmp_path: Path) -> None:
    """Where several keys could hold the state dict, the order of ``WRAPPERS`` decides."""
    root = {name: {f"{name}.weight": torch.ones(1)} for name in reversed(WRAPPERS)}
    model = inspected(saved(root, tmp_path / "model.pt"))
    assert model.wrapper == WRAPPERS[0]
    assert list(model.tensors) == [f"{WRAPPERS[0]}.weight"]


def test_wrapper_without_tensors_is_passed_over(tmp_path: Path) -> None:
    """A dict under a wrapper's name that holds no tensor is no state dict."""
    root = {"model": {"name": "resnet"}, "model_state_dict": {"w": torch.ones(2)}}
    assert inspected(saved(root, tmp_path / "model.pt")).wrapper == "model_state_dict"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizer_state_may_lie_beside(tmp_path: Path, name: str) -> None:
    """A training checkpoint with optimizer, scheduler, history and device tags passes."""
    net = small_net()
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.1, **options)
    net(torch.zeros(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    root = {
        "epoch": 12,
        "seed": 2**80,
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "history": [0.1, None, True, ("a", 2)],
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }
    assert_describes(inspected(saved(root, tmp_path / "model.pt")), net.state_dict())


def test_plain_values_beside_tensors_in_the_state_dict_are_left_out(tmp_path: Path) -> None:
    """A number among the tensors is no tensor; the tensors are all found."""
    model = inspected(saved({"w": torch.ones(2), "version": 3}, tmp_path / "model.pt"))
    assert list(model.tensors) == ["w"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocol_is_read_where_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    """The gate takes a pickle protocol if and only if torch's loader of weights does."""
    state = small_net().state_dict()
    path = saved({"net": state, "n": 70000}, tmp_path / "m.pt", pickle_protocol=protocol)
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        with pytest.raises(UnsupportedFormat) as caught:
            inspect_model(path)
        assert 'torch.save(model.state_dict(), "model.pt")' in caught.value.hint
    else:
        assert_describes(inspected(path), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type_is_described(tmp_path: Path, dtype: torch.dtype) -> None:
    """Each type that a state dict may hold is named."""
    state = {"w": torch.ones(2, 3).to(dtype), "empty": torch.ones(0, 3).to(dtype)}
    assert_describes(inspected(saved(state, tmp_path / "model.pt")), state)


def test_odd_tensors_are_described(tmp_path: Path) -> None:
    """Views, shared storages, parameters, scalars, empty and five-dimensional tensors pass."""
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        transposed=base.t(),
        column=base[:, 2],
        every_other=base[::2, ::3],
        tail=base[1:],
        whole=base,
        tied=base,
        parameter=nn.Parameter(torch.ones(3)),
        frozen=nn.Parameter(torch.ones(3), requires_grad=False),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0),
        empty_rows=torch.zeros(3, 0, 2),
        volume=torch.ones(2, 1, 3, 1, 2),
        channels_last=torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        counter=torch.tensor(2**62, dtype=torch.int64),
    )
    model = inspected(saved(state, tmp_path / "model.pt"))
    assert_describes(model, state)
    assert model.tensors["tied"].storage == model.tensors["transposed"].storage


@pytest.mark.parametrize("key", ["a\0b", "line\n", "\u202eevil", "w" * 1000, "\x1b[2J"])
def test_key_that_cannot_be_shown_is_refused(tmp_path: Path, key: str) -> None:
    """A key that a log, a page or a database could not hold as it is goes no further."""
    with pytest.raises(UnsupportedFormat) as caught:
        inspect_model(saved({key: torch.ones(1)}, tmp_path / "model.pt"))
    assert caught.value.detail.isprintable()


def test_keys_of_any_language_pass(tmp_path: Path) -> None:
    """A key may hold any printable characters, and be long."""
    state = {"größe.重み": torch.ones(1), "k" * 300: torch.ones(1), "": torch.ones(1)}
    assert_describes(inspected(saved(state, tmp_path / "model.pt")), state)


def test_zip_of_any_root_name_passes(tmp_path: Path) -> None:
    """The folder in the zip is named after the file, which may be called anything."""
    state = {"w": torch.ones(2)}
    for name in ("archive.pt", "a model (1).pth", "data.pt", "code.pt"):
        assert_describes(inspected(saved(state, tmp_path / name)), state)


_SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=12),
        st.tuples(_SHAPES, st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    wrapper=st.sampled_from([*WRAPPERS, None]),
)
def test_any_state_dict_is_described_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[list[int], torch.dtype, bool]],
    wrapper: str | None,
) -> None:
    """``inspect_model(torch.save(state)) == state``, for keys, shapes, types and strides."""
    state = {}
    for key, (shape, dtype, transposed) in shapes.items():
        tensor = torch.zeros(shape, dtype=dtype)
        state[key] = tensor.transpose(0, -1) if transposed and shape else tensor
    path = tmp_path_factory.mktemp("any") / "model.pt"
    model = inspected(saved(state if wrapper is None else {wrapper: state}, path))
    assert model.wrapper == wrapper
    if model.prefix:
        state = {key.removeprefix(model.prefix): tensor for key, tensor in state.items()}
    assert_describes(model, state)


# What is no state dict -----------------------------------------------------------------------------


class Home(nn.Module):
    """A module of the uploader's own, with nothing of ``torch.nn`` inside but a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("root", [small_net(), {"model": small_net()}, {"net": [small_net()]}])
def test_pickled_module_is_refused_with_the_reexport_line(tmp_path: Path, root: object) -> None:
    """A whole module, at the top or inside, is refused, and the hint says what to run."""
    with pytest.raises(PickledModule) as caught:
        inspect_model(saved(root, tmp_path / "model.pt"))
    assert REEXPORT in caught.value.hint


def test_module_of_a_class_of_ones_own_is_refused_with_the_reexport_line(tmp_path: Path) -> None:
    """A module whose class nobody knows is refused with the same line."""
    with pytest.raises(Refused) as caught:
        inspect_model(saved(Home(), tmp_path / "model.pt"))
    assert REEXPORT in caught.value.hint
    assert caught.value.code in {"pickled-module", "unsafe-pickle"}


@pytest.mark.parametrize(
    "root",
    [
        {},
        {"epoch": 3},
        [torch.ones(2)],
        torch.ones(2),
        "weights",
        None,
        {1: torch.ones(2)},
        {"state_dict": {}},
        {"state_dict": [torch.ones(2)]},
        {"somewhere": {"else": torch.ones(2)}},
    ],
)
def test_file_without_a_state_dict_says_so(tmp_path: Path, root: object) -> None:
    """A torch file with no dict of named tensors where one is looked for is refused."""
    with pytest.raises(NoStateDict):
        inspect_model(saved(root, tmp_path / "model.pt"))


def _torchscript() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version"):
            archive.writestr(name, b"x")
    return buffer.getvalue()


def _legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", EmptyFile),
        (b"P", UnsupportedFormat),
        (b"PK", UnsupportedFormat),
        (b"PK\x03\x04", DamagedFile),
        (b"PK\x03\x04" + bytes(500), DamagedFile),
        (b"\x1f\x8b\x08" + bytes(60), UnsupportedFormat),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), UnsupportedFormat),
        (b"GGUF" + bytes(60), UnsupportedFormat),
        (b"import os\n", UnsupportedFormat),
        (bytes(100), UnsupportedFormat),
        (hostile.HONEST, PickledModule),
        (_legacy(), PickledModule),
        (_torchscript(), UnsupportedFormat),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value[:12]),
)
def test_other_formats_are_refused(tmp_path: Path, content: bytes, problem: type[Problem]) -> None:
    """Each foreign format is refused as what it is, with a hint."""
    with pytest.raises(problem) as caught:
        inspect_model(written(content, tmp_path / "model.pt"))
    assert type(caught.value) is problem
    assert caught.value.hint


@pytest.mark.parametrize("content", [hostile.HONEST, _legacy()])
def test_bare_pickle_gets_the_reexport_line(tmp_path: Path, content: bytes) -> None:
    """The owner of a pickle or of a legacy file reads the line that helps."""
    with pytest.raises(PickledModule) as caught:
        inspect_model(written(content, tmp_path / "model.pt"))
    assert REEXPORT in caught.value.hint


# Damaged and hostile zips --------------------------------------------------------------------------


def test_the_builders_honest_zip_is_honest(tmp_path: Path) -> None:
    """What the hostile files below are made from passes, here and in torch itself."""
    path = written(hostile.torch_zip(), tmp_path / "model.pt")
    assert inspected(path).shapes == {"weight": (4,)}
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.zeros(4))


def test_truncated_file_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    """A file that is cut anywhere is refused as damaged; past the first bytes by that name."""
    buffer = io.BytesIO()
    torch.save(small_net().state_dict(), buffer)
    whole = buffer.getvalue()
    path = tmp_path / "model.pt"
    for length in [4, 5, 30, 64, *range(100, len(whole), 97), len(whole) - 1]:
        with pytest.raises(DamagedFile):
            inspect_model(written(whole[:length], path))
    assert inspect_model(written(whole, path))


@pytest.mark.parametrize("inside", ["first", "last"])
def test_flipped_byte_of_a_weight_is_damage(tmp_path: Path, inside: str) -> None:
    """One flipped bit in a tensor's bytes is found by its checksum."""
    state = {"w": torch.full((300_000,), 1.0), "v": torch.full((5,), 2.0)}
    path = saved(state, tmp_path / "model.pt")
    content = bytearray(path.read_bytes())
    pattern = torch.tensor([1.0] * 4 if inside == "first" else [2.0] * 4).numpy().tobytes()
    content[content.index(pattern) + 1] ^= 1
    written(bytes(content), path)
    model = inspect_model(path)
    with pytest.raises(DamagedFile):
        check_finite(path, model)


def test_flipped_byte_of_the_description_is_damage(tmp_path: Path) -> None:
    """One flipped bit in the description is found by its checksum."""
    content = hostile.torch_zip().replace(b"weight", b"weighs", 1)
    with pytest.raises(DamagedFile):
        inspect_model(written(content, tmp_path / "model.pt"))


HOSTILE_ZIPS: dict[str, tuple[bytes, type[Problem]]] = {
    "compressed": (hostile.torch_zip(compression=zipfile.ZIP_DEFLATED), UnsupportedFormat),
    "compressed with bzip2": (hostile.torch_zip(compression=zipfile.ZIP_BZIP2), UnsupportedFormat),
    "compressed with lzma": (hostile.torch_zip(compression=zipfile.ZIP_LZMA), UnsupportedFormat),
    "one name twice": (hostile.zip_with_one_name_twice(), UnsafeZip),
    "another name where it lies": (hostile.zip_with_lying_names(), UnsafeZip),
    "encrypted": (hostile.zip_that_says_encrypted(), UnsafeZip),
    "a size of four gigabytes": (hostile.zip_with_a_lying_size(), UnsafeZip),
    "a huge directory": (hostile.zip_with_a_huge_directory(150_000), UnsafeZip),
    "no data.pkl": (hostile.torch_zip(root="x").replace(b"data.pkl", b"data.pkm"),
                    UnsupportedFormat),
    "two data.pkl": (hostile.torch_zip(extra={"other/data.pkl": b"."}), UnsupportedFormat),
    "data.pkl too deep": (hostile.torch_zip(root="a/b"), UnsupportedFormat),
    "code inside": (hostile.torch_zip(extra={"archive/code/x.py": b"1"}), UnsupportedFormat),
    "constants inside": (hostile.torch_zip(extra={"archive/constants.pkl": b"1"}),
                         UnsupportedFormat),
    "big endian": (hostile.torch_zip(extra={"archive/byteorder": b"big"}), UnsupportedFormat),
    "a long byte order": (hostile.torch_zip(extra={"archive/byteorder": b"little" * 9}),
                          UnsupportedFormat),
    "a storage too short": (hostile.torch_zip(storages={"0": bytes(12)}), DamagedFile),
    "a storage too long": (hostile.torch_zip(storages={"0": bytes(20)}), DamagedFile),
    "no storage": (hostile.torch_zip(storages={}), DamagedFile),
    "an empty description": (hostile.torch_zip(b""), DamagedFile),
    "a description of noise": (hostile.torch_zip(random.Random(1).randbytes(300)), DamagedFile),
    "bytes after the pickle": (hostile.torch_zip(hostile.HONEST + b"."), DamagedFile),
    "a pickle without an end": (hostile.torch_zip(hostile.HONEST[:-1]), DamagedFile),
}  # fmt: skip


@pytest.mark.parametrize("trick", HOSTILE_ZIPS)
def test_hostile_zip_is_refused(tmp_path: Path, trick: str) -> None:
    """Each trick with the container is refused by its class."""
    content, problem = HOSTILE_ZIPS[trick]
    with pytest.raises(problem) as caught:
        inspected(written(content, tmp_path / "model.pt"))
    assert type(caught.value) is problem


def test_huge_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A directory of millions of entries costs no memory: its size is looked at first."""
    path = written(hostile.zip_with_a_huge_directory(400_000), tmp_path / "model.pt")
    tracemalloc.start()
    with pytest.raises(UnsupportedFormat):
        inspect_model(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


def test_noise_never_raises_anything_but_a_refusal(tmp_path: Path) -> None:
    """Flips, cuts, swaps and insertions at random end in a ``Refused`` or in an honest reading."""
    random_ = random.Random(20)
    buffer = io.BytesIO()
    torch.save({"net": {"w": torch.ones(3, 2), "b": torch.zeros(2)}, "epoch": 1}, buffer)
    honest = buffer.getvalue()
    path = tmp_path / "model.pt"
    for _ in range(1500):
        content = bytearray(honest)
        for _ in range(random_.choice([1, 1, 2, 8])):
            place = random_.randrange(len(content))
            match random_.randrange(4):
                case 0 | 1:
                    content[place] = random_.randrange(256)
                case 2:
                    del content[place : place + random_.randrange(1, 40)]
                case 3:
                    content[place:place] = random_.randbytes(random_.randrange(1, 8))
        written(bytes(content), path)
        with suppress(Refused):
            inspected(path)


# Finite weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 499_999, 700_000])
def test_not_finite_weight_is_found(
    tmp_path: Path, value: float, dtype: torch.dtype, place: int
) -> None:
    """NaN and both infinities are found in every float type, anywhere, with the key named."""
    bad = torch.ones(700_001).to(dtype)
    bad[place] = value
    path = saved({"good": torch.ones(3), "bad.weight": bad}, tmp_path / "model.pt")
    with pytest.raises(WeightsNotFinite, match=r"bad\.weight"):
        check_finite(path, inspect_model(path))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_always_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    """All bits set is a NaN in a float and a number elsewhere."""
    state = {"n": torch.full((64,), -1, dtype=torch.int64).to(dtype)}
    inspected(saved(state, tmp_path / "model.pt"))


def _views() -> dict[str, torch.Tensor]:
    base = torch.arange(120.0).reshape(4, 5, 6)
    return {
        "transposed": base.transpose(0, 2),
        "slice": base[1:3, 2:4, 1:5],
        "steps": base[::2, ::2, ::3],
        "column": base[:, 3, 1],
        "plane": base[2],
        "scalar": base[1, 1, 1],
        "empty": base[:0],
        "diagonal": base[:, :4, 0].diagonal(),
    }


@pytest.mark.parametrize("view", _views())
def test_exactly_the_elements_of_a_view_count(tmp_path: Path, view: str) -> None:
    """A NaN in the storage is found where it belongs to the view, and only there."""
    tensor = _views()[view]
    storage = torch.as_strided(tensor, (120,), (1,), 0)
    inside = torch.as_strided(torch.arange(120), tensor.shape, tensor.stride(),
                              tensor.storage_offset()).flatten().tolist()  # fmt: skip
    path = tmp_path / "model.pt"
    for place in range(0, 120, 7):
        before = storage[place].item()
        storage[place] = math.nan
        saved({"view": tensor, "other": torch.ones(1)}, path)
        model = inspect_model(path)
        if place in inside:
            with pytest.raises(WeightsNotFinite):
                check_finite(path, model)
        else:
            check_finite(path, model)
        storage[place] = before


def test_not_finite_value_beside_the_state_dict_is_no_weight(tmp_path: Path) -> None:
    """An optimizer that diverged, or a NaN that no tensor shows, does not refuse the weights."""
    base = torch.tensor([math.nan, 1.0, math.nan, 2.0, math.nan])
    root = {"net": {"w": base[1::2]}, "optimizer": {"m": torch.tensor([math.inf])}}
    inspected(saved(root, tmp_path / "model.pt"))


def test_view_of_a_large_storage_is_checked_in_bounded_memory(tmp_path: Path) -> None:
    """Looking for a NaN inside a strided view allocates nothing of the storage's size."""
    base = torch.ones(2_000_000, 2)
    base[1_999_999, 1] = math.nan
    path = saved({"w": base[:, 0]}, tmp_path / "model.pt")
    model = inspect_model(path)
    tracemalloc.start()
    check_finite(path, model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
