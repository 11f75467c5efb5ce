"""Law: every candidate can be put together beside the model, in its container, tensor by tensor."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from common import differences
from common.errors import InternalError
from common.formats.model import ModelFormat
from worker import checkpoints
from worker.candidates import originals, write_candidates
from worker.checkpoints import Checkpoint
from worker.containers import identical
from worker.purify.method import Purified

Values = Mapping[str, Tensor]

STATE = {
    "features.weight": torch.arange(60_000, dtype=torch.float32),
    "head.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "head.bias": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}
MILD: Values = {"head.bias": torch.zeros(3)}
STRONG: Values = {"head.weight": torch.zeros(3, 4), "head.bias": torch.full((3,), 2.0)}
NOTHING: Values = {}


def uploaded(folder: Path, form: ModelFormat) -> Path:
    """Write the checkpoint as a client would."""
    path = folder / "model"
    if form is ModelFormat.TORCH:
        torch.save(
            {"net": {f"module.{key}": value for key, value in STATE.items()}, "acc": 1}, path
        )
    else:
        safetensors.torch.save_file(STATE, path, metadata={"format": "pt"})
    return path


def purify(folder: Path, form: ModelFormat, *, chosen: Values) -> tuple[Path, Checkpoint]:
    """Write model and candidates as the pipeline does; return the model and what is said of them."""
    checkpoint = checkpoints.load(uploaded(folder, form), form)
    purified = Purified(values=chosen, candidates=(NOTHING, MILD, STRONG))
    before = originals(checkpoint, purified)
    after = purified.apply(checkpoint.tensors)
    for key in chosen:
        checkpoint.replace(key, after[key])
    checkpoints.save(checkpoint, folder / "output")
    described = write_candidates(checkpoint, purified, before, folder / "output")
    for number, said in enumerate(described):
        content = put_together(folder, number)
        assert said == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return folder / "output", checkpoint


def put_together(folder: Path, number: int) -> bytes:
    """Return a candidate's file."""
    base, changed = (folder / "output").open("rb"), (folder / f"candidate-{number}").open("rb")
    with differences.whole(base, changed) as file:
        return file.read()


def loaded(folder: Path, number: int, form: ModelFormat) -> Checkpoint:
    """Load a candidate from its bytes."""
    path = folder / f"whole-{number}"
    path.write_bytes(put_together(folder, number))
    return checkpoints.load(path, form)


@pytest.mark.parametrize("form", ModelFormat)
@pytest.mark.parametrize("chosen", [NOTHING, MILD, STRONG], ids=["nothing", "mild", "strong"])
def test_candidate_has_its_own_values_and_all_else_of_the_upload(
    tmp_path: Path, form: ModelFormat, chosen: Values
) -> None:
    """Whichever was chosen, each has the upload's keys, order, dtypes and plain values."""
    model, _ = purify(tmp_path, form, chosen=chosen)
    original = checkpoints.load(tmp_path / "model", form)
    for number, values in enumerate((NOTHING, MILD, STRONG)):
        written = loaded(tmp_path, number, form)
        meant = {
            key: values[key].to(tensor.dtype) if key in values else tensor
            for key, tensor in STATE.items()
        }
        assert identical(dict(written.tensors), {k: meant[k] for k in original.tensors})
        if form is ModelFormat.TORCH:
            assert list(written.root) == ["net", "acc"]
            assert list(written.root["net"]) == list(original.root["net"])
        if values is chosen:
            assert put_together(tmp_path, number) == model.read_bytes()
            assert (tmp_path / f"candidate-{number}").stat().st_size == 0


def test_only_what_differs_is_kept(tmp_path: Path) -> None:
    """No whole file of a candidate stays, and a changed layer does not bring the others along."""
    model, _ = purify(tmp_path, ModelFormat.SAFETENSORS, chosen=MILD)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", "output", "candidate-0", "candidate-1", "candidate-2"}
    for number in range(3):
        assert (tmp_path / f"candidate-{number}").stat().st_size < model.stat().st_size / 2


def test_model_as_it_came_is_a_candidate_like_others(tmp_path: Path) -> None:
    """No changes give the upload itself where the container is copied byte for byte."""
    purify(tmp_path, ModelFormat.SAFETENSORS, chosen=STRONG)
    assert put_together(tmp_path, 0) == (tmp_path / "model").read_bytes()


def test_tensors_that_share_memory_are_brought_back(tmp_path: Path) -> None:
    """A weight of two names comes back under both before the next candidate is made."""
    tied = torch.arange(6, dtype=torch.float32)
    torch.save({"a": tied, "b": tied}, tmp_path / "model")
    checkpoint = checkpoints.load(tmp_path / "model", ModelFormat.TORCH)
    purified = Purified(values={"a": torch.zeros(6)}, candidates=({"a": torch.zeros(6)}, NOTHING))
    before = originals(checkpoint, purified)
    checkpoint.replace("a", torch.zeros(6))
    checkpoints.save(checkpoint, tmp_path / "output")
    write_candidates(checkpoint, purified, before, tmp_path / "output")
    written = loaded(tmp_path, 1, ModelFormat.TORCH).tensors
    assert torch.equal(written["a"], tied)
    assert torch.equal(written["b"], tied)


def test_written_candidate_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that was not written as it was meant is never offered."""
    honest = checkpoints.save

    def corrupt(checkpoint: Checkpoint, path: Path) -> None:
        honest(checkpoint, path)
        if path.name != "output":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(checkpoints, "save", corrupt)
    with pytest.raises(InternalError):
        purify(tmp_path, ModelFormat.TORCH, chosen=MILD)


def test_method_without_candidates_writes_none(tmp_path: Path) -> None:
    """Nothing lies beside the model of a method that has one result, or of a scan."""
    checkpoint = checkpoints.load(uploaded(tmp_path, ModelFormat.TORCH), ModelFormat.TORCH)
    for purified in (None, Purified(values=MILD)):
        assert originals(checkpoint, purified) == {}
        assert write_candidates(checkpoint, purified, {}, tmp_path / "output") == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
