"""The uploaded container comes back with the changes, or not at all."""

from pathlib import Path

import pytest
import torch

from common.errors import InternalError
from common.formats.model import ModelFormat
from tests.support.inputs import saved
from worker.interchange import CHANGED
from worker.packing import pack, write_changes

STATE = {"weight": torch.arange(6.0), "bias": torch.ones(2, dtype=torch.float16)}


def _packed(folder: Path, changes: dict[str, torch.Tensor], state: object = STATE) -> object:
    (folder / "model").write_bytes(saved({"epoch": 3, "net": state, "best": float("nan")}))
    write_changes(folder, changes, [])
    assert pack(folder / "model", ModelFormat.TORCH, folder, folder / "output") == []
    return torch.load(folder / "output", weights_only=True)


def test_only_what_changed_differs(tmp_path: Path) -> None:
    """Plain values, order and untouched tensors are the upload's."""
    found = _packed(tmp_path, {"bias": torch.zeros(2, dtype=torch.float16)})
    assert isinstance(found, dict)
    assert list(found) == ["epoch", "net", "best"]
    assert list(found["net"]) == ["weight", "bias"]
    assert torch.equal(found["net"]["weight"], STATE["weight"])
    assert torch.equal(found["net"]["bias"], torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize(
    "changes",
    [
        {"another": torch.zeros(2)},
        {"weight": torch.zeros(2)},
        {"weight": torch.zeros(6, dtype=torch.float64)},
        {"weight": torch.full((6,), torch.inf)},
    ],
    ids=["key", "shape", "dtype", "infinite"],
)
def test_changes_of_another_model_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor]
) -> None:
    """What the purification left must fit the upload, tensor by tensor."""
    with pytest.raises(InternalError):
        _packed(tmp_path, changes)


def test_changes_that_are_none_are_refused(tmp_path: Path) -> None:
    """Bytes that are no safetensors end the job as our fault."""
    (tmp_path / "model").write_bytes(saved(STATE))
    (tmp_path / CHANGED).write_bytes(b"\x80\x02}")
    with pytest.raises(InternalError):
        pack(tmp_path / "model", ModelFormat.TORCH, tmp_path, tmp_path / "output")


def test_tensors_that_lie_in_each_other_are_not_mixed_up(tmp_path: Path) -> None:
    """Where one change would undo another one, nothing is offered."""
    whole = torch.arange(6.0)
    overlapping = {"whole": whole, "part": whole[:3]}
    with pytest.raises(InternalError, match="overlap"):
        _packed(tmp_path, {"whole": torch.zeros(6), "part": torch.ones(3)}, overlapping)
