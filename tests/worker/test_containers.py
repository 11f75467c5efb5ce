"""A loaded file holds plain values and dense tensors, whatever the loader can build beside them."""

import io
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UnsupportedFormat
from common.formats.model import ModelFormat
from common.formats.nesting import MAX_DEPTH
from tests import hostile_files as hostile
from tests.support.inputs import cnn_state
from worker import checkpoints
from worker.containers import check, identical, overlaps


def reloaded(root: Any) -> Any:
    """Return *root* as it comes back from a file, checked by nobody."""
    file = io.BytesIO()
    torch.save(root, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _attributed() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(3))
    parameter.isfinite = torch.Size  # type: ignore[assignment,method-assign]
    return parameter


ODD_TENSORS: dict[str, Callable[[], Tensor]] = {
    "sparse, by coordinates": lambda: torch.eye(3).to_sparse(),
    "sparse, by rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "without memory": lambda: torch.empty(1 << 40, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "the negative of its storage": lambda: torch.imag(torch.ones(3, dtype=torch.cfloat).conj()),
    "of eight-bit floats": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "of unsigned words": lambda: torch.ones(3, dtype=torch.uint16),
    "expanded": lambda: torch.ones(1).expand(1 << 40),
    "expanded along one side": lambda: torch.ones(3, 1).expand(3, 1 << 40),
    "of overlapping windows": lambda: torch.ones(9).as_strided((3, 3), (1, 1)),
    "interleaved": lambda: torch.ones(9).as_strided((2, 3), (3, 2)),
    "with attributes": _attributed,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("odd", ODD_TENSORS)
def test_odd_tensor_is_refused(tmp_path: Path, odd: str, *, beside: bool) -> None:
    """What is no dense tensor of plain numbers is refused, as a weight and beside the weights."""
    tensor = ODD_TENSORS[odd]()
    root = {"net": cnn_state(), "exp_avg": [tensor]} if beside else {**cnn_state(), "w": tensor}
    torch.save(root, tmp_path / "model.pt")
    with pytest.raises(UnsupportedFormat) as caught:
        checkpoints.load(tmp_path / "model.pt", ModelFormat.TORCH)
    assert 'torch.save(model.state_dict(), "model.pt")' in caught.value.hint


def test_subclass_is_refused() -> None:
    """A tensor whose class could answer for itself is refused before it is asked anything."""

    class Liar(Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("asked")

    with pytest.raises(UnsupportedFormat, match="class of its own"):
        check({"w": torch.ones(3).as_subclass(Liar)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, requires_grad=True),
        nn.Parameter(torch.ones(3)),
        torch.ones(4, 6).T,
        torch.ones(4, 6)[1:, ::2],
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(1, 1).expand(1, 1),
        torch.ones(()),
        torch.ones(0, 7),
        torch.ones(0, 7).expand(5, 0, 7),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_honest_tensor_passes(tensor: Tensor) -> None:
    """Parameters, views and every order of the sides are dense."""
    check(reloaded({"w": tensor}))


@pytest.mark.parametrize("seed", range(20))
def test_overlap_is_what_writing_shows(seed: int) -> None:
    """A layout that is called free of overlaps keeps as many different values as it has elements."""
    torch.manual_seed(seed)
    for _ in range(50):
        shape, stride = torch.randint(1, 4, (3,)).tolist(), torch.randint(0, 9, (3,)).tolist()
        places = torch.arange(100).as_strided(shape, stride)
        if not overlaps(places):
            assert len(set(places.flatten().tolist())) == places.numel()


# Values ---------------------------------------------------------------------------------------------


def doubled(depth: int) -> Any:
    """Return lists whose elements are *depth* times doubled, in as many lists."""
    value: Any = [0]
    for _ in range(depth):
        value = [value, value]
    return value


def nested(depth: int) -> Any:
    """Return a list in a list …"""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def test_plain_values_pass() -> None:
    """What training scripts keep beside the weights passes, shared parts and all."""
    shared = torch.ones(3)
    root = {
        "net": cnn_state(),
        "plain": [None, True, 1, 0.5, "x", (1, (2, {3: 4, 0.5: None}))],
        "torch": (torch.Size([1]), torch.float32, torch.device("cpu")),
        "milestones": Counter({3: 1}),
        "twice": [shared, shared, {"again": shared}],
    }
    check(root)
    check(reloaded(root))


def test_doubled_lists_are_walked_once() -> None:
    """A value with more ways through it than atoms is checked and compared in its own size."""
    depth = MAX_DEPTH - 2
    check(doubled(depth))
    assert identical(doubled(depth), doubled(depth))
    assert not identical(doubled(depth), doubled(depth - 1))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    """Values are nested so deep and no deeper: writing them again recurses."""
    check(nested(MAX_DEPTH))
    with pytest.raises(UnsupportedFormat, match="deep"):
        check(nested(depth))


def test_depth_is_that_of_the_longest_way() -> None:
    """A part that was seen near the top is no shallower where it hangs far down."""
    part = nested(MAX_DEPTH // 2 + 1)
    deep: Any = part
    for _ in range(MAX_DEPTH // 2):
        deep = [deep]
    with pytest.raises(UnsupportedFormat, match="deep"):
        check([part, deep])


def test_cycle_is_refused() -> None:
    """A value that holds itself is refused."""
    cycle: list[Any] = []
    cycle.append({"self": cycle})
    with pytest.raises(UnsupportedFormat, match="holds itself"):
        check(cycle)


@pytest.mark.parametrize(
    "value",
    [b"x", {1, 2}, bytearray(b"x"), 1j, object(), torch.ones(3).untyped_storage()],
    ids=repr,
)
def test_other_value_is_refused(value: object) -> None:
    """A value of any other type is refused."""
    with pytest.raises(UnsupportedFormat, match="of the type"):
        check({"w": torch.ones(1), "x": [value]})


def test_key_that_is_no_plain_value_is_refused() -> None:
    """A key is a text, a number or nothing."""
    with pytest.raises(UnsupportedFormat, match="key"):
        check({(1, 2): 3})


def test_dict_cannot_answer_for_itself(tmp_path: Path) -> None:
    """An ``OrderedDict`` whose attributes hide its methods is refused before a method is called."""
    ordered = hostile.call(hostile.named("collections", "OrderedDict"))
    items = b"(" + hostile.text("w") + hostile.tensor((4,), (1,)) + b"u"
    shadow = hostile.mapping({"items": hostile.named("torch", "Size")}) + b"b"
    content = hostile.torch_zip(hostile.pickled(ordered + items + shadow))
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UnsupportedFormat, match="attributes"):
        checkpoints.load(tmp_path / "model.pt", ModelFormat.TORCH)


def test_many_views_of_one_storage_are_refused() -> None:
    """A small file cannot hold a thousand full-size tensors that are all the same bytes."""
    storage = torch.zeros(1 << 20)
    check({str(n): storage.view(-1) for n in range(20)})
    with pytest.raises(UnsupportedFormat, match="of which the file holds 4194304"):
        check({str(n): storage.view(-1) for n in range(1000)})


# Comparison -----------------------------------------------------------------------------------------


def test_identical_sees_every_difference() -> None:
    """The comparison that verifies a written model tells order, type, dtype and bits apart."""
    state = cnn_state()
    assert identical(state, {**state})
    assert identical({"x": float("nan")}, {"x": float("nan")})
    assert not identical(state, dict(reversed(state.items())))
    assert not identical({"x": 1}, {"x": 1.0})
    assert not identical({"x": True}, {"x": 1})
    assert not identical({1: "x"}, {True: "x"})
    assert not identical({"x": 0.0}, {"x": -0.0})
    assert not identical({"x": torch.ones(1)}, {"x": torch.ones(1).double()})
    assert not identical({"x": torch.zeros(1)}, {"x": -torch.zeros(1)})
    assert not identical([1, 2], [1, 2, 3])
    assert not identical([1, 2], (1, 2))
    assert not identical([[1], [1]], [[1], [2]])
    assert not identical(OrderedDict(x=1), {"x": 1})


def test_identical_sees_attributes() -> None:
    """Metadata beside a state dict is part of it."""
    one, other = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    for key in one:
        other[key] = one[key]
    assert identical(one, other)
    other._metadata[""]["version"] = 7  # type: ignore[attr-defined]
    assert not identical(one, other)
