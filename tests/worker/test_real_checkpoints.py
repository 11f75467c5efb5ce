"""
What people save with torch passes the gate and the loader, or is refused with the line that re-saves it.

Every structure is written by ``torch.save`` itself. One that is accepted comes back, after a round
through gate, loader and ``save``, with the same keys, dtypes, bits and plain values.
"""

import argparse
import copy
import functools
import importlib.util
import io
import random
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from common.errors import Refused
from common.formats.model import check_finite, inspect_model
from tests.worker.architectures.test_families import FAMILIES, Family, fresh
from worker import checkpoints
from worker.containers import identical

RESAVE = 'torch.save(model.state_dict(), "model.pt")'
STEPS = 3
Build = Callable[[], Any]

BUILT_IN = [family for family in FAMILIES if family.name != "ladder"]


def net() -> nn.Sequential:
    """Return a small network with every kind of state that a state dict has."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def trained(
    make: Callable[[Any], optim.Optimizer],
    schedule: Callable[[optim.Optimizer], Any] | None = None,
) -> dict[str, Any]:
    """Return what a training script saves after a few steps, with optimiser and schedule."""
    model = net()
    optimiser = make(model.parameters())
    scheduler = schedule(optimiser) if schedule else None
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(torch.randn(4, 1, 3, 3)).square().sum().backward()
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
    saved = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "epoch": STEPS}
    return saved if scheduler is None else {**saved, "scheduler": scheduler.state_dict()}


def beside(**values: Any) -> dict[str, Any]:
    """Return a state dict with other values beside it."""
    return {"state_dict": net().state_dict(), **values}


def _sgd(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


def _channels_last() -> dict[str, Any]:
    return {k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v
            for k, v in net().state_dict().items()}  # fmt: skip


def _tied() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model.state_dict()


def _transposed() -> dict[str, Any]:
    return {"weight": torch.randn(3, 4).T, "bias": torch.randn(8)[::2]}


def _views_of_a_larger_storage() -> dict[str, Any]:
    flat = torch.randn(100)
    return {"weight": flat[10:22].view(3, 4), "bias": flat[50:53]}


def _scaler() -> dict[str, Any]:
    return torch.amp.GradScaler("cpu").state_dict()


def _random_states() -> dict[str, Any]:
    return beside(torch_rng=torch.get_rng_state(), python_rng=random.Random(0).getstate())


def _averaged() -> dict[str, Any]:
    averaged = optim.swa_utils.AveragedModel(net())
    return {"model": net().state_dict(), "ema": averaged.state_dict(), "updates": 7}


ACCEPTED: dict[str, Build] = {
    "bare": lambda: net().state_dict(),
    "bare, as a plain dict": lambda: dict(net().state_dict()),
    "under state_dict": lambda: {"state_dict": net().state_dict()},
    "under net": lambda: {"net": net().state_dict(), "acc": 93.1, "epoch": 12},
    "under model": lambda: {"model": net().state_dict()},
    "under model_state_dict": lambda: {"model_state_dict": net().state_dict(), "loss": 0.25},
    "under the wrapper with module.": lambda: {"state_dict": nn.DataParallel(net()).state_dict()},
    "of DataParallel": lambda: nn.DataParallel(net()).state_dict(),
    "of a frozen network": lambda: net().requires_grad_(requires_grad=False).state_dict(),
    "with gradients kept": lambda: net().state_dict(keep_vars=True),
    "of named parameters": lambda: dict(net().named_parameters()),
    "parameters in an OrderedDict": lambda: OrderedDict(net().named_parameters()),
    "copied without metadata": lambda: OrderedDict(net().state_dict().items()),
    "deep-copied": lambda: copy.deepcopy(net().state_dict()),
    "in half precision": lambda: net().half().state_dict(),
    "in bfloat16": lambda: net().bfloat16().state_dict(),
    "in double precision": lambda: net().double().state_dict(),
    "halved with its counters": lambda: {k: v.half() for k, v in net().state_dict().items()},
    "in channels-last": _channels_last,
    "transposed and strided": _transposed,
    "views of a larger storage": _views_of_a_larger_storage,
    "tied weights": _tied,
    "with SGD": lambda: trained(lambda p: optim.SGD(p, lr=0.1)),
    "with SGD and momentum": lambda: trained(_sgd),
    "with Adam": lambda: trained(optim.Adam),
    "with Adam and amsgrad": lambda: trained(lambda p: optim.Adam(p, amsgrad=True)),
    "with AdamW": lambda: trained(optim.AdamW),
    "with RMSprop": lambda: trained(optim.RMSprop),
    "with Adagrad": lambda: trained(optim.Adagrad),
    "with Adadelta": lambda: trained(optim.Adadelta),
    "with NAdam": lambda: trained(optim.NAdam),
    "with RAdam": lambda: trained(optim.RAdam),
    "with StepLR": lambda: trained(_sgd, lambda o: lr_scheduler.StepLR(o, 2)),
    "with MultiStepLR": lambda: trained(_sgd, lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2])),
    "with CosineAnnealingLR": lambda: trained(_sgd, lambda o: lr_scheduler.CosineAnnealingLR(o, 9)),
    "with ExponentialLR": lambda: trained(_sgd, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "with an average beside it": _averaged,
    "with a GradScaler": lambda: beside(scaler=_scaler()),
    "with a GradScaler in use": lambda: beside(
        scaler={
            "scale": 65536.0,
            "growth_factor": 2.0,
            "growth_interval": 2000,
            "_growth_tracker": 5,
        }
    ),
    "with random states": _random_states,
    "with epoch and accuracy": lambda: beside(epoch=3, best_acc=91.25, best=True, note=None),
    "with accuracy as a tensor": lambda: beside(acc=torch.tensor(91.25), seen=torch.tensor(7)),
    "with infinity for the best loss": lambda: beside(best=float("inf")),
    "with NaN for the last loss": lambda: beside(loss=float("nan")),
    "with a history": lambda: beside(history={"loss": [0.5, 0.25], "lr": [(0, 0.1), (9, 0.01)]}),
    "with class names": lambda: beside(classes=["cat", "Stra\u00dfe", "\u732b"]),
    "with numbers for keys": lambda: beside(index={0: "cat", 1: "dog", None: "?", 0.5: "half"}),
    "with large numbers": lambda: beside(seed=2**63 + 11, negative=-(2**70)),
    "with its arguments as a dict": lambda: beside(args=vars(argparse.Namespace(lr=0.1, arch="x"))),
    "with torch.Size": lambda: beside(shape=torch.Size([3, 32, 32])),
    "with torch.dtype": lambda: beside(dtype=torch.float16),
    "with torch.device": lambda: beside(device=torch.device("cuda:0")),
    "with an OrderedDict of plain values": lambda: beside(config=OrderedDict(a=1, b=[2])),
    "with integer buffers": lambda: {**net().state_dict(), "index": torch.arange(9).view(3, 3)},
    "with a boolean mask": lambda: {**net().state_dict(), "mask": torch.ones(3, dtype=torch.bool)},
    "with an empty tensor": lambda: {**net().state_dict(), "none": torch.empty(0, 4)},
}
"""What passes, as it is saved with torch's defaults."""

REFUSED: dict[str, Build] = {
    "with accuracy as np.float64": lambda: beside(acc=np.float64(91.25)),
    "with epoch as np.int64": lambda: beside(epoch=np.int64(3)),
    "with a numpy array": lambda: beside(confusion=np.eye(3)),
    "with numpy's random state": lambda: beside(numpy_rng=np.random.RandomState(0).get_state()),
    "with its arguments as a Namespace": lambda: beside(args=argparse.Namespace(lr=0.1)),
    "with a defaultdict": lambda: beside(meters=defaultdict(list, loss=[1.0])),
    "in a defaultdict": lambda: defaultdict(list, net().state_dict()),
    "with a set": lambda: beside(seen={1, 2}),
    "with bytes": lambda: beside(config=b"yaml"),
    "with a path": lambda: beside(path=Path("model.pt")),
    "with a complex number": lambda: beside(root=1j),
    "the whole module": net,
    "the whole module beside its state": lambda: beside(model=net()),
    "the optimiser itself": lambda: beside(optimizer=_sgd(net().parameters())),
    "a sparse weight": lambda: {**net().state_dict(), "adjacency": torch.eye(3).to_sparse()},
    "a quantised weight": lambda: {
        **net().state_dict(), "q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "a complex weight": lambda: {**net().state_dict(), "fft": torch.zeros(3, dtype=torch.cfloat)},
    "a weight in eight bits": lambda: {
        **net().state_dict(), "f8": torch.ones(3).to(torch.float8_e4m3fn)},
}  # fmt: skip
"""What torch's own loader of weights refuses as well, or what is no dense weight."""


@functools.cache
def state_of(family_name: str) -> dict[str, Any]:
    """Return the state dict of a network that is built once."""
    family = next(family for family in BUILT_IN if family.name == family_name)
    return fresh(family, shapes=None).state_dict()


def saved(folder: Path, root: Any, **options: Any) -> Path:
    """Return the file that ``torch.save`` writes."""
    torch.save(root, folder / "model.pt", **options)
    return folder / "model.pt"


def assert_comes_back(path: Path, folder: Path) -> None:
    """Send a file through gate, loader and ``save``; compare with what it held."""
    described = inspect_model(path)
    check_finite(path, described)
    checkpoint = checkpoints.load(path, described.format)
    assert {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()} == (
        described.shapes
    )
    checkpoints.save(checkpoint, folder / "out.pt")
    checkpoints.verify(checkpoint, folder / "out.pt")
    before = torch.load(path, map_location="cpu", weights_only=True)
    assert identical(torch.load(folder / "out.pt", weights_only=True), before)


def assert_refused_with_the_line(path: Path) -> None:
    """Check that the gate refuses the file and says how to save it again."""
    with pytest.raises(Refused) as caught:
        inspect_model(path)
    assert RESAVE in caught.value.hint
    assert "weights_only" not in str(caught.value.as_dict())


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path: Path, name: str) -> None:
    """An ordinary checkpoint passes and comes back whole."""
    assert_comes_back(saved(tmp_path, ACCEPTED[name]()), tmp_path)


@pytest.mark.parametrize("wrapped", ["bare", "wrapped", "data parallel"])
@pytest.mark.parametrize("family", BUILT_IN, ids=lambda family: family.name)
def test_every_family_is_accepted(tmp_path: Path, family: Family, wrapped: str) -> None:
    """The state dict of every architecture passes, bare, wrapped and from ``DataParallel``."""
    library, _, _ = family.name.rpartition("/")
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"the extra {library} is not installed")
    state = state_of(family.name)
    roots: dict[str, Any] = {
        "bare": state,
        "wrapped": {"net": state, "acc": 90.5, "epoch": 200},
        "data parallel": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    }
    assert_comes_back(saved(tmp_path, roots[wrapped]), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_line_that_saves_it_again(tmp_path: Path, name: str) -> None:
    """What is not taken is refused at the gate, and its owner reads the exact line that helps."""
    assert_refused_with_the_line(saved(tmp_path, REFUSED[name]()))


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith(("with", "in a d"))])
def test_no_refusal_is_stricter_than_torch_by_accident(tmp_path: Path, name: str) -> None:
    """Of plain values, the gate refuses what torch's own loader refuses, and three rare types."""
    path = saved(tmp_path, REFUSED[name]())
    if name in {"with a set", "with bytes", "with a complex number"}:
        torch.load(path, weights_only=True)
    else:
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(path, weights_only=True)


def test_legacy_format_is_refused_with_the_line(tmp_path: Path) -> None:
    """What torch wrote before 1.6 is refused with the line."""
    path = saved(tmp_path, net().state_dict(), _use_new_zipfile_serialization=False)
    assert_refused_with_the_line(path)


@pytest.mark.parametrize("location", ["cuda:0", "cuda:7", "mps", "xla:1"])
def test_file_of_another_device_is_accepted(tmp_path: Path, location: str) -> None:
    """A checkpoint saved on a GPU passes where there is none, whatever its number."""
    path = saved(tmp_path, net().state_dict())
    tagged = b"X" + len(location).to_bytes(4, "little") + location.encode()
    _rewrite(path, lambda name, content: content.replace(b"X\x03\x00\x00\x00cpu", tagged)
             if name.endswith("data.pkl") else content)  # fmt: skip
    with zipfile.ZipFile(path) as archive:
        assert tagged in archive.read("model/data.pkl")
    assert_comes_back(path, tmp_path)


@pytest.mark.parametrize(
    "left_out", ["byteorder", ".format_version|.storage_alignment", "serialization_id"]
)
def test_zip_of_older_torch_is_accepted(tmp_path: Path, left_out: str) -> None:
    """A zip without the members that later releases of torch added passes."""
    path = saved(tmp_path, net().state_dict())
    _rewrite(path, lambda name, content: None if re.search(left_out, name) else content)
    assert_comes_back(path, tmp_path)


def test_file_written_to_a_stream_is_accepted(tmp_path: Path) -> None:
    """A checkpoint saved to a buffer, whose folder in the zip is called archive, passes."""
    buffer = io.BytesIO()
    torch.save(net().state_dict(), buffer)
    (tmp_path / "stream.pt").write_bytes(buffer.getvalue())
    assert_comes_back(tmp_path / "stream.pt", tmp_path)


def test_there_are_enough_structures() -> None:
    """The tables hold at least fifty structures."""
    assert len(ACCEPTED) >= 50
    assert len(REFUSED) >= 15


def _rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a torch zip anew with its members changed, or left out."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(zipfile.ZipInfo(name), changed)
