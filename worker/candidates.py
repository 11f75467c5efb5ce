"""
Write every candidate of a run beside the model, each as its differences from it.

A candidate is written whole first, in the model's own container, and verified from its bytes like the
model; docs/decisions/0006-candidates-as-differences.md says why the whole file does not stay.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common import differences
from common.artefacts import candidate_name
from worker import checkpoints
from worker.checkpoints import Checkpoint
from worker.purify.method import Purified


def originals(checkpoint: Checkpoint, purified: Purified | None) -> dict[str, Tensor]:
    """Return a copy of each tensor that a candidate changes; take it before the model is changed."""
    if purified is None or not purified.candidates:
        return {}
    changed = {key for values in (purified.values, *purified.candidates) for key in values}
    return {key: checkpoint.tensors[key].clone() for key in sorted(changed)}


def write_candidates(
    checkpoint: Checkpoint, purified: Purified | None, before: Mapping[str, Tensor], model: Path
) -> list[dict[str, object]]:
    """
    Write each candidate beside *model*, the purified model's file; return its digest and size.

    The checkpoint is the last candidate's afterwards.

    Args:
        before: What ``originals`` returned.

    Raises:
        InternalError: A candidate that was written is not the one that was meant.
    """
    described: list[dict[str, object]] = []
    if purified is None:
        return described
    for number, values in enumerate(purified.candidates):
        target = model.with_name(candidate_name(number))
        if _same(values, purified.values):
            target.touch(exist_ok=False)
            described.append(_described(model))
            continue
        whole = target.with_suffix(".whole")
        _put(checkpoint, before, values)
        checkpoints.save(checkpoint, whole)
        checkpoints.verify(checkpoint, whole)
        differences.write(model, whole, target)
        described.append(_described(whole))
        whole.unlink()
    return described


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _put(
    checkpoint: Checkpoint, before: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Bring the checkpoint back to where it was before, then to *values*."""
    for key, tensor in before.items():
        checkpoint.replace(key, tensor)
    after = Purified(values=values).apply(checkpoint.tensors)
    for key in values:
        checkpoint.replace(key, after[key])


def _described(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}
