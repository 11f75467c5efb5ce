"""
The last stage of a job: the uploaded container again, with the purified weights in it.

The upload's plain values and the order of everything come from its own bytes, so that this runs in the
process that has parsed them already, and not in the one that purified.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.artefacts import MAX_CANDIDATES
from common.errors import InternalError
from common.formats.model import ModelFormat
from worker import candidates, checkpoints
from worker.checkpoints import Checkpoint
from worker.containers import identical
from worker.interchange import CHANGED, changed_name
from worker.purify.method import Purified

Values = Mapping[str, Tensor]


def write_changes(folder: Path, chosen: Values, others: Sequence[Values]) -> None:
    """Write what the chosen result and each candidate change, by the keys of the bare network."""
    named = {CHANGED: chosen} | {changed_name(n): values for n, values in enumerate(others)}
    for name, values in named.items():
        plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in values.items()}
        safetensors.torch.save_file(plain, folder / name)


def pack(
    model: Path, model_format: ModelFormat, folder: Path, output: Path
) -> list[dict[str, object]]:
    """
    Write the model and its candidates to *output* and beside it, from the upload and its changes.

    Return the digest and the size of each candidate.

    Args:
        model: The uploaded file.
        folder: Where the changes lie.

    Raises:
        InternalError: The changes are not those of this model, or were not written as they were meant.
    """
    checkpoint = checkpoints.load(model, model_format)
    chosen, others = _read_changes(folder, checkpoint)
    purified = Purified(values=chosen, candidates=others)
    before = candidates.originals(checkpoint, purified)
    for key, values in chosen.items():
        checkpoint.replace(key, values)
    # Tensors that lie in each other's bytes change each other; then this is not what was measured.
    if not all(identical(checkpoint.tensors[key], chosen[key]) for key in chosen):
        raise InternalError("Tensors of the model overlap, and one change undoes another one.")
    checkpoints.save(checkpoint, output)
    checkpoints.verify(checkpoint, output)
    return candidates.write_candidates(checkpoint, purified, before, output)


def _read_changes(folder: Path, checkpoint: Checkpoint) -> tuple[Values, tuple[Values, ...]]:
    try:
        chosen = safetensors.torch.load_file(folder / CHANGED)
        numbers = range(MAX_CANDIDATES)
        others = [
            safetensors.torch.load_file(folder / changed_name(number))
            for number in numbers
            if (folder / changed_name(number)).exists()
        ]
        for values in (chosen, *others):
            for key, tensor in values.items():
                _check(key, tensor, checkpoint.tensors[key])
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as exc:
        raise InternalError(f"The changes are not those of this model: {exc}"[:500]) from exc
    return chosen, tuple(others)


def _check(key: str, new: Tensor, old: Tensor) -> None:
    if new.dtype != old.dtype or new.shape != old.shape:
        raise ValueError(f"{key} is {old.dtype} {tuple(old.shape)} and stays so")
    if new.is_floating_point() and not bool(torch.isfinite(new).all()):
        raise ValueError(f"{key} is not finite")
