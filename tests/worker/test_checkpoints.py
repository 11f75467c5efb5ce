"""Model files in and out: the laws of ``worker.checkpoints``."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import ArchitectureMismatch, DamagedFile, UnsafePickle, WeightsNotFinite
from common.formats.model import ModelFormat
from worker import checkpoints
from worker.containers import identical


def _state() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).state_dict()
    assert isinstance(state, OrderedDict)
    return state


def _optimiser_state() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    return optimiser.state_dict()


def _shared() -> dict[str, Tensor]:
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    return {"one.weight": weight, "two.weight": weight, "view": weight[:, 1:], "t": weight.mT}


CONTAINERS: dict[str, Callable[[], Any]] = {
    "bare": _state,
    "net": lambda: {"net": _state(), "acc": 77.25, "epoch": 30},
    "state_dict": lambda: {"arch": "x", "state_dict": _state(), "flags": [True, None, (1, 2.5)]},
    "model": lambda: {"model": _state(), "optimizer": _optimiser_state()},
    "model_state_dict": lambda: {"model_state_dict": _state(), "best": float("inf")},
    "data parallel": lambda: {f"module.{key}": value for key, value in _state().items()},
    "half": lambda: {key: value.to(torch.float16) for key, value in _state().items()},
    "bfloat16": lambda: {key: value.bfloat16() for key, value in _state().items()},
    "double": lambda: {key: value.double() for key, value in _state().items()},
    "shared and strided": _shared,
    "parameters": lambda: dict(nn.Linear(3, 2).named_parameters()),
}


@pytest.fixture(params=list(CONTAINERS))
def root(request: pytest.FixtureRequest) -> Any:
    """Return what a training script may have saved."""
    return CONTAINERS[request.param]()


def _written(tmp_path: Path, root: Any) -> Path:
    torch.save(root, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_loading_what_was_saved_gives_the_same(tmp_path: Path, root: Any) -> None:
    """``load(save(c)) == c``: keys, order, shapes, dtypes, plain values, bits."""
    source = _written(tmp_path, root)
    checkpoint = checkpoints.load(source, ModelFormat.TORCH)
    checkpoints.save(checkpoint, tmp_path / "copy.pt")
    copy = torch.load(tmp_path / "copy.pt", weights_only=True)
    assert identical(copy, torch.load(source, weights_only=True))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, root: Any) -> None:
    """The same checkpoint gives the same file, under whatever name."""
    source = _written(tmp_path, root)
    for name in ("one.pt", "another-name.pth"):
        checkpoints.save(checkpoints.load(source, ModelFormat.TORCH), tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another-name.pth").read_bytes()


def test_replacing_changes_one_tensor_alone(tmp_path: Path) -> None:
    """A replaced tensor is written, every other one keeps its bits."""
    state = _state()
    checkpoint = checkpoints.load(_written(tmp_path, {"net": state}), ModelFormat.TORCH)
    checkpoint.replace("0.weight", state["0.weight"] * 0.5)
    checkpoints.save(checkpoint, tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)["net"]
    for key, before in state.items():
        assert torch.equal(written[key], before * 0.5 if key == "0.weight" else before)


@pytest.mark.parametrize("values", [torch.zeros(4, 3, 3, 2), torch.zeros(4, 3, 3, 3).double()])
def test_replacing_keeps_shape_and_dtype(tmp_path: Path, values: Tensor) -> None:
    """New values of another shape or dtype are refused."""
    checkpoint = checkpoints.load(_written(tmp_path, _state()), ModelFormat.TORCH)
    with pytest.raises(ValueError, match="stays so"):
        checkpoint.replace("0.weight", values)


def test_state_dict_keeps_its_metadata(tmp_path: Path) -> None:
    """The ``_metadata`` that torch puts beside a state dict is there in the output."""
    state = _state()
    checkpoint = checkpoints.load(_written(tmp_path, state), ModelFormat.TORCH)
    checkpoints.save(checkpoint, tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written._metadata == state._metadata  # type: ignore[attr-defined]


def test_safetensors_keep_order_and_metadata(tmp_path: Path) -> None:
    """Header and untouched tensors of a safetensors file are the same bytes in the output."""
    tensors = {"z": torch.ones(3), "a.weight": torch.ones(2, 2).half(), "m": torch.arange(4)}
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    metadata = {f"key{n}": str(n) for n in range(20)}
    safetensors.torch.save_file(tensors, source, metadata=metadata)
    checkpoint = checkpoints.load(source, ModelFormat.SAFETENSORS)
    checkpoint.replace("a.weight", torch.full((2, 2), 0.25).half())
    checkpoints.save(checkpoint, target)
    before, after = source.read_bytes(), target.read_bytes()
    header = 8 + int.from_bytes(before[:8], "little")
    assert after[:header] == before[:header]
    written = safetensors.torch.load_file(target)
    assert torch.equal(written["a.weight"], torch.full((2, 2), 0.25).half())
    assert torch.equal(written["z"], tensors["z"])
    assert torch.equal(written["m"], tensors["m"])


def test_safetensors_prefix_is_kept(tmp_path: Path) -> None:
    """A key is known without ``module.`` and written with it."""
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file({"module.w": torch.ones(3)}, source)
    checkpoint = checkpoints.load(source, ModelFormat.SAFETENSORS)
    checkpoint.replace("w", torch.zeros(3))
    checkpoints.save(checkpoint, target)
    assert torch.equal(safetensors.torch.load_file(target)["module.w"], torch.zeros(3))


def test_old_checkpoints_may_lack_counters(tmp_path: Path) -> None:
    """A state dict without ``num_batches_tracked`` fills a model with batch norm."""
    state = {
        key: value for key, value in _state().items() if not key.endswith("num_batches_tracked")
    }
    checkpoint = checkpoints.load(_written(tmp_path, state), ModelFormat.TORCH)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    checkpoints.fill(model, checkpoint)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 4, 3))])
def test_foreign_state_dict_fills_nothing(tmp_path: Path, other: nn.Module) -> None:
    """Keys or shapes that are not the model's are refused."""
    checkpoint = checkpoints.load(_written(tmp_path, _state()), ModelFormat.TORCH)
    with pytest.raises(ArchitectureMismatch):
        checkpoints.fill(other, checkpoint)


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


def test_loader_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without the gate before it, the loader refuses a pickle that calls something."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickle, match=r"names getattr\.$") as caught:
        checkpoints.load(_written(tmp_path, {"net": _state(), "x": _Canary()}), ModelFormat.TORCH)
    assert not (tmp_path / "canary").exists()
    assert 'torch.save(model.state_dict(), "model.pt")' in caught.value.hint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_refusal_advises_to_load_unsafely(tmp_path: Path) -> None:
    """What torch says of a file it refuses is passed on without the ways around it."""
    for root in ({"w": torch.ones(2), "x": _Canary()}, {"w": torch.ones(2), "x": {1: np.ones(2)}}):
        with pytest.raises(UnsafePickle) as caught:
            checkpoints.load(_written(tmp_path, root), ModelFormat.TORCH)
        said = str(caught.value.as_dict())
        assert not re.search("weights_only|safe_globals|trust", said)
    torch.save({"w": torch.ones(2)}, tmp_path / "p4.pt", pickle_protocol=4)
    with pytest.raises(DamagedFile) as damaged:
        checkpoints.load(tmp_path / "p4.pt", ModelFormat.TORCH)
    assert not re.search("weights_only|safe_globals|trust", str(damaged.value.as_dict()))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no model at all" * 100])
@pytest.mark.parametrize("model_format", list(ModelFormat))
def test_garbage_is_one_known_error(
    tmp_path: Path, content: bytes, model_format: ModelFormat
) -> None:
    """Whatever the loaders throw leaves as ``DamagedFile``."""
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(DamagedFile):
        checkpoints.load(tmp_path / "bad", model_format)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(tmp_path: Path, value: float) -> None:
    """A weight that is no number is refused."""
    state = _state()
    state["0.weight"][0, 0, 0, 0] = value
    with pytest.raises(WeightsNotFinite, match=r"0\.weight"):
        checkpoints.load(_written(tmp_path, state), ModelFormat.TORCH)


def test_weights_in_any_layout_fill_a_contiguous_network(tmp_path: Path) -> None:
    """Views, transposed weights and channels-last ones fill a network whose weights are contiguous."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    state = {
        "0.weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "0.bias": torch.randn(9)[1::2],
        "1.weight": torch.randn(4, 2).T,
        "1.bias": torch.randn(100)[50:52],
    }
    checkpoint = checkpoints.load(_written(tmp_path, state), ModelFormat.TORCH)
    assert not checkpoint.tensors["1.weight"].is_contiguous()
    checkpoints.fill(model, checkpoint)
    for key, filled in model.state_dict().items():
        assert filled.is_contiguous()
        assert torch.equal(filled, state[key])


def test_parameters_can_be_replaced(tmp_path: Path) -> None:
    """A tensor that asks for a gradient takes new values like any other, and goes on asking."""
    root = dict(nn.Linear(3, 2).named_parameters())
    checkpoint = checkpoints.load(_written(tmp_path, root), ModelFormat.TORCH)
    checkpoint.replace("weight", torch.zeros(2, 3))
    checkpoints.save(checkpoint, tmp_path / "out.pt")
    checkpoints.verify(checkpoint, tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert isinstance(written["weight"], nn.Parameter)
    assert not written["weight"].any()


MISFITS: dict[str, tuple[str, Tensor]] = {
    "whole numbers for weights": ("0.weight", torch.zeros(4, 3, 3, 3, dtype=torch.int64)),
    "truth values for weights": ("0.bias", torch.zeros(4, dtype=torch.bool)),
    "another shape": ("0.bias", torch.zeros(2, 2)),
    "a vector for a counter": ("1.num_batches_tracked", torch.zeros(5, dtype=torch.int64)),
    "nothing for a counter": ("1.num_batches_tracked", torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_numbers_of_another_kind_fill_nothing(tmp_path: Path, misfit: str) -> None:
    """What torch would convert silently is refused: dtype and shape are the architecture's."""
    key, values = MISFITS[misfit]
    checkpoint = checkpoints.load(_written(tmp_path, {**_state(), key: values}), ModelFormat.TORCH)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    with pytest.raises(ArchitectureMismatch, match=key):
        checkpoints.fill(model, checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_fill_a_network(tmp_path: Path, dtype: torch.dtype) -> None:
    """A checkpoint that was halved as a whole, counters and all, still fits."""
    state = {key: value.to(dtype) for key, value in _state().items()}
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].reshape(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    checkpoints.fill(model, checkpoints.load(_written(tmp_path, state), ModelFormat.TORCH))
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"].float())
