"""
Model files in and out.

Laws, for every checkpoint ``c`` that the gate lets through:

- ``load(save(c)) == c``: the same keys in the same order, shapes, dtypes, plain values and bits;
- a tensor that nobody changed is bit-identical in the file that ``save`` writes;
- the same checkpoint gives the same bytes.

The loaders run no code: ``weights_only=True`` and safetensors, with no way around them. What they throw
leaves this module as ``DamagedFile``.
"""

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
    UnsupportedFormat,
    WeightsNotFinite,
)
from common.formats.model import PREFIX, WRAPPERS, ModelFormat
from common.formats.safetensors import tensor_positions

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
        tensor.copy_(values)
        self._replaced.add(key)


def load(path: Path, model_format: ModelFormat) -> Checkpoint:
    """
    Load a checkpoint on the CPU.

    Raises:
        DamagedFile: The loader refuses it.
        UnsupportedFormat: A tensor in the state dict is sparse, quantised or of an odd type.
        WeightsNotFinite: A weight is NaN or infinite.
    """
    match model_format:
        case ModelFormat.TORCH:
            root = _load_torch(path)
        case ModelFormat.SAFETENSORS:
            root = _load_safetensors(path)
    prefix, tensors = _find_tensors(root)
    for key, tensor in tensors.items():
        _check_tensor(key, tensor)
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
    Copy the state dict into *model*, which keeps its own dtype and device.

    Raises:
        ArchitectureMismatch: Keys or shapes are not the model's.
    """
    try:
        missing, unexpected = model.load_state_dict(dict(checkpoint.tensors), strict=False)
    except RuntimeError as exc:  # shapes
        raise ArchitectureMismatch(str(exc)[:500]) from exc
    missing = [key for key in missing if not key.endswith(OPTIONAL_SUFFIX)]
    if missing or unexpected:
        raise ArchitectureMismatch(f"missing: {missing[:3]}; unexpected: {unexpected[:3]}")


def identical(one: Any, other: Any) -> bool:
    """Return whether two loaded containers hold the same keys, values, dtypes and bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(_bits(one), _bits(other))
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))  # noqa: PLR0124 - NaN


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
            raise MemoryError(_first_line(exc)) from exc
        raise DamagedFile(f"torch refuses the file: {_first_line(exc)}") from exc


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError) as exc:
        raise DamagedFile(f"safetensors refuses the file: {_first_line(exc)}") from exc
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
            file.write(_bits(checkpoint.tensors[key]).numpy().tobytes())


def _first_line(exc: Exception) -> str:
    """Return what a loader says, without the advice that follows in its later lines."""
    return (str(exc) or type(exc).__name__).splitlines()[0][:200]


def _find_tensors(root: Any) -> tuple[str, dict[str, Tensor]]:
    """Find the state dict as ``common.formats.model.find_state_dict`` does."""
    for found in _candidates(root):
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            prefix = PREFIX if all(key.startswith(PREFIX) for key in tensors) else ""
            return prefix, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    raise NoStateDict


def _candidates(root: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(root, dict):
        yield from (root[key] for key in WRAPPERS if isinstance(root.get(key), dict))
        yield root


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise UnsupportedFormat(f"{key!r} is not a dense tensor of real numbers.")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WeightsNotFinite(f"{key!r} holds a value that is NaN or infinite.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
