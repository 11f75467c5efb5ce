"""
Model files in and out.

Laws, for every checkpoint ``c`` that the gate lets through:

- ``load(save(c)) == c``: the same keys in the same order, shapes, dtypes, plain values and bits;
- a tensor that nobody changed is bit-identical in the file that ``save`` writes;
- the same checkpoint gives the same bytes.

The loaders run no code: ``weights_only=True`` and safetensors, with no way around them. What they throw
leaves this module as ``DamagedFile``, or as ``UnsafePickle`` where it names what they do not load; what
they build is checked before anything asks it a question (``worker.containers``).
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import (
    ArchitectureMismatch,
    DamagedFile,
    InternalError,
    NoStateDict,
    Refused,
    UnsafePickle,
    WeightsNotFinite,
)
from common.formats.model import PREFIX, WRAPPERS, ModelFormat, check_names
from common.formats.safetensors import tensor_positions
from worker.containers import bits, check, identical

_UNKNOWN_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""How torch says that a pickle names what its loader does not know."""

OPTIONAL_SUFFIX = ".num_batches_tracked"
"""Batch norm's counter, which checkpoints from before torch 0.4.1 lack and evaluation never reads."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """
    A state dict and the container around it.

    ``tensors`` are the container's own tensors under the keys of the bare network; change one in place
    with ``replace``, which is what ``save`` then writes.
    """

    format: ModelFormat
    source: Path
    root: Any
    prefix: str
    tensors: Mapping[str, Tensor]
    _replaced: set[str] = field(default_factory=set)

    def replace(self, key: str, values: Tensor) -> None:
        """
        Give the tensor *key* new values of its own shape and dtype.

        Raises:
            ValueError: The new values would change shape or dtype.
        """
        tensor = self.tensors[key]
        if values.shape != tensor.shape or values.dtype != tensor.dtype:
            raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)} and stays so")
        with torch.no_grad():  # a parameter's values are its owner's to train, not ours to track
            tensor.copy_(values)
        self._replaced.add(key)


def load(path: Path, model_format: ModelFormat) -> Checkpoint:
    """
    Load a checkpoint on the CPU.

    Raises:
        DamagedFile: The loader refuses it.
        UnsafePickle: It names code, or a class that the loader does not know.
        UnsupportedFormat: It holds other than plain values and dense tensors with plain names.
        WeightsNotFinite: A weight is NaN or infinite.
    """
    match model_format:
        case ModelFormat.TORCH:
            root = _load_torch(path)
        case ModelFormat.SAFETENSORS:
            root = _load_safetensors(path)
    check(root)
    prefix, tensors = _find_tensors(root)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsNotFinite(f"{key!r} holds a value that is NaN or infinite.")
    return Checkpoint(format=model_format, source=path, root=root, prefix=prefix, tensors=tensors)


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint to *path*, in its own format and container."""
    match checkpoint.format:
        case ModelFormat.TORCH:
            # Through an open file: a path would be written into the archive as its folder's name.
            with path.open("xb") as file:
                torch.save(checkpoint.root, file)
        case ModelFormat.SAFETENSORS:
            _save_safetensors(checkpoint, path)


def verify(checkpoint: Checkpoint, path: Path) -> None:
    """
    Load what was saved to *path*, from the bytes, and compare it with the checkpoint.

    Raises:
        InternalError: It is not what was meant.
    """
    try:
        written = load(path, checkpoint.format)
    except Refused as exc:
        raise InternalError(f"The written model cannot be loaded: {exc}") from exc
    container_is_whole = checkpoint.format is ModelFormat.SAFETENSORS or identical(
        written.root, checkpoint.root
    )
    if not container_is_whole or not identical(dict(written.tensors), dict(checkpoint.tensors)):
        raise InternalError("The written model differs from the one that was meant.")


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """
    Copy the state dict into *model*, which keeps its own dtype, device and contiguous layout.

    Raises:
        ArchitectureMismatch: Keys, shapes or kinds of numbers are not the model's.
    """
    _check_forms(model, checkpoint)
    try:
        missing, unexpected = model.load_state_dict(dict(checkpoint.tensors), strict=False)
    except RuntimeError as exc:  # shapes
        raise ArchitectureMismatch(str(exc)[:500]) from exc
    missing = [key for key in missing if not key.endswith(OPTIONAL_SUFFIX)]
    if missing or unexpected:
        raise ArchitectureMismatch(f"missing: {missing[:3]}; unexpected: {unexpected[:3]}")


def _check_forms(model: nn.Module, checkpoint: Checkpoint) -> None:
    """
    Compare what torch would take silently: it makes whole numbers of floats, and a vector a scalar.

    Floats may be of another width: the model computes in its own.
    """
    for key, meant in model.state_dict().items():
        found = checkpoint.tensors.get(key)
        if found is None:
            continue
        if key.endswith(OPTIONAL_SUFFIX):  # of old, or halved with everything else
            fits = found.numel() == 1
        else:
            fits = (
                found.shape == meant.shape
                and found.is_floating_point() == meant.is_floating_point()
            )
        if not fits:
            raise ArchitectureMismatch(
                f"{key!r} is {found.dtype} {tuple(found.shape)}, not {meant.dtype} "
                f"{tuple(meant.shape)}."[:500]
            )


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
    ) as exc:
        if "can't allocate memory" in str(exc):  # the machine's fault, not the file's
            raise MemoryError(_reason(exc)) from exc
        if names_code := _UNKNOWN_GLOBAL.search(str(exc)):
            raise UnsafePickle(f"The pickle names {names_code[1][:200]}.") from exc
        raise DamagedFile(f"torch refuses the file: {_reason(exc)}") from exc


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError) as exc:
        raise DamagedFile(f"safetensors refuses the file: {_reason(exc)}") from exc
    return {key: loaded[key] for key in tensor_positions(path)}


def _save_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    """
    Copy the file and write the changed tensors over their old bytes.

    The library would sort the tensors and write the metadata in a new order at every run.
    """
    shutil.copyfile(checkpoint.source, path)
    positions = tensor_positions(checkpoint.source)
    with path.open("r+b") as file:
        for key in sorted(checkpoint._replaced):
            file.seek(positions[checkpoint.prefix + key])
            file.write(bits(checkpoint.tensors[key]).numpy().tobytes())


def _reason(exc: Exception) -> str:
    """Return what a loader says, without its advice on how to load a file without a check."""
    _, found, rest = str(exc).partition("WeightsUnpickler error: ")
    said = rest if found else str(exc)
    lines = said.splitlines()
    advises = not lines or "weights_only" in lines[0] or "Weights only" in lines[0]
    return type(exc).__name__ if advises else lines[0][:200]


def _find_tensors(root: Any) -> tuple[str, dict[str, Tensor]]:
    """Find the state dict as ``common.formats.model.find_state_dict`` does."""
    for found in _candidates(root):
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            check_names(tensors)
            prefix = PREFIX if all(key.startswith(PREFIX) for key in tensors) else ""
            return prefix, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    raise NoStateDict


def _candidates(root: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(root, dict):
        yield from (root[key] for key in WRAPPERS if isinstance(root.get(key), dict))
        yield root
