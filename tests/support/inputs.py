"""Honest inputs, made small: checkpoints of tiny networks and the samples that fit them."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.catalogue.architectures import ResNetArguments, SmallCnnArguments
from common.formats.model import ModelFormat
from common.spec import JobSpec, ModelInput, SamplesInput
from worker.architectures.registry import build

SIDE = 8
CLASSES = 4

SPEC = JobSpec(
    model=ModelInput(name="m.pt", sha256="0" * 64, bytes=1, format=ModelFormat.TORCH),
    samples=SamplesInput(
        sha256="0" * 64, bytes=1, count=20, classes=CLASSES, image_shape=(3, SIDE, SIDE)
    ),
    architecture="small_cnn",
    architecture_args={},
    classes=CLASSES,
    method="none",
    params={},
    seed=0,
)
"""A job on these, of which no digest and no size is looked at."""


def resnet_state(*, classes: int = CLASSES, seed: int = 0) -> dict[str, Tensor]:
    """Return the state dict of a narrow ``resnet18_cifar`` for colour images."""
    torch.manual_seed(seed)
    model = build("resnet18_cifar", ResNetArguments(classes=classes, channels=3, width=4))
    return dict(model.state_dict())


def cnn_state(*, classes: int = CLASSES, seed: int = 0) -> dict[str, Tensor]:
    """Return the state dict of a narrow ``small_cnn`` for colour images."""
    torch.manual_seed(seed)
    model = build("small_cnn", SmallCnnArguments(classes=classes, channels=3, width=4))
    return dict(model.state_dict())


def saved(root: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(root, file)
    return file.getvalue()


def samples(
    *, per_class: int = 5, classes: int = CLASSES, side: int = SIDE, seed: int = 0, **extra: Any
) -> bytes:
    """Return a sample file with *per_class* random uint8 images of each class."""
    labels = np.repeat(np.arange(classes), per_class)
    shape = (len(labels), side, side, 3)
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return npz(images=images, labels=labels, **extra)


def npz(**arrays: Any) -> bytes:
    """Return what ``numpy.savez`` writes."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
