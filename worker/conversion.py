"""
The first stage of a job: what a client sent becomes tensors, and nothing but tensors.

It runs in a process of its own (``child.py``), which alone reads the uploaded bytes. It leaves a folder
with the files of ``interchange.py``; the second stage reads these alone, through ``load``, which takes no
word of them on trust.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from common.errors import (
    ClassCountMismatch,
    InternalError,
    InvalidImages,
    InvalidLabels,
)
from common.formats.model import ModelFormat
from common.formats.samples import Purpose
from common.spec import JobSpec
from worker import checkpoints
from worker.checkpoints import Checkpoint
from worker.interchange import NAMES, SETS, WEIGHTS
from worker.samples import Samples, load_samples


@dataclass(frozen=True, kw_only=True)
class Uploads:
    """The files that a client sent, in a job's own folder."""

    model: Path
    samples: Path
    evaluation: Path | None
    triggered: Path | None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What the second stage works on."""

    weights: Checkpoint
    samples: Samples
    evaluation: Samples | None
    triggered: Samples | None


class _Names(BaseModel):
    """What there is to say of the tensors beside their values."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prefix: str
    keys: list[str]
    same: dict[str, str]  # a key, and an earlier one that names the very same tensor


def convert(uploads: Uploads, spec: JobSpec, folder: Path) -> None:
    """
    Parse what a client sent and write it to *folder*, which is there and empty.

    Raises:
        Refused: A file is not what the specification says.
    """
    checkpoint = checkpoints.load(uploads.model, spec.model.format)
    found = {
        name: load_samples(path, Purpose(name))
        for name in SETS
        if (path := getattr(uploads, name)) is not None
    }
    for samples in found.values():
        _check_samples(samples, spec)
    names, tensors = _untied(checkpoint)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / NAMES).write_text(names.model_dump_json())
    for name, samples in found.items():
        safetensors.torch.save_file(_as_tensors(samples), folder / name)


def load(folder: Path, spec: JobSpec) -> Converted:
    """
    Read what ``convert`` wrote to *folder*.

    Raises:
        InternalError: It did not write this.
    """
    try:
        names = _Names.model_validate_json((folder / NAMES).read_bytes())
        tensors = _tied(names, safetensors.torch.load_file(folder / WEIGHTS))
        sets = {name: _read_samples(folder / name) for name in SETS if (folder / name).exists()}
        for samples in sets.values():
            _check_samples(samples, spec)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as exc:
        raise InternalError(f"The conversion left something else: {exc}"[:500]) from exc
    weights = Checkpoint(
        format=ModelFormat.SAFETENSORS,
        source=folder / WEIGHTS,
        root=None,
        prefix=names.prefix,
        tensors=tensors,
    )
    return Converted(
        weights=weights,
        samples=sets["samples"],
        evaluation=sets.get("evaluation"),
        triggered=sets.get("triggered"),
    )


def _untied(checkpoint: Checkpoint) -> tuple[_Names, dict[str, Tensor]]:
    """Return every tensor once, on its own bytes, and the names of those that are one."""
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            same[key] = first[place]
            continue
        first[place] = key
        tensors[key] = tensor.contiguous()
    # What overlaps in part is written twice; packing tells whether that made a difference.
    owners = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    if len(owners) < len(tensors):
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    names = _Names(prefix=checkpoint.prefix, keys=list(checkpoint.tensors), same=same)
    return names, tensors


def _tied(names: _Names, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in their order; keys of one tensor have one tensor again."""
    tensors: dict[str, Tensor] = {}
    for key in names.keys:
        other = names.same.get(key)
        tensors[key] = found[key] if other is None else tensors[other]
    if set(names.keys) - names.same.keys() != set(found):
        raise ValueError("there are tensors without a name")
    return tensors


def _as_tensors(samples: Samples) -> dict[str, Tensor]:
    """Return the arrays of a set; images of whole grey levels take a quarter of the room."""
    grey = (samples.images * 255).round().to(torch.uint8)
    lossless = torch.equal(grey.float() / 255, samples.images)
    arrays = {
        "images": grey if lossless else samples.images,
        "labels": samples.labels,
        "targets": samples.targets,
    }
    return {name: array.contiguous() for name, array in arrays.items() if array is not None}


def _read_samples(path: Path) -> Samples:
    found = safetensors.torch.load_file(path)
    images = found.pop("images")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    samples = Samples(
        images=images, labels=found.pop("labels", None), targets=found.pop("targets", None)
    )
    numbers = [each for each in (samples.labels, samples.targets) if each is not None]
    within = images.dtype == torch.float32 and bool(((images >= 0) & (images <= 1)).all())
    if found or not within or any(each.dtype != torch.int64 for each in numbers):
        raise ValueError("a set that is none")
    return samples


def _check_samples(samples: Samples, spec: JobSpec) -> None:
    if tuple(samples.images.shape[1:]) != spec.samples.image_shape:
        raise InvalidImages(
            f"Images of the shape {tuple(samples.images.shape[1:])} lie beside samples of the "
            f"shape {spec.samples.image_shape}."
        )
    for classes in (samples.labels, samples.targets):
        if classes is None:
            continue
        if classes.shape != (len(samples.images),):
            raise InvalidLabels
        if int(classes.min()) < 0 or int(classes.max()) >= spec.classes:
            raise ClassCountMismatch
