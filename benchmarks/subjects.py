"""The public backdoored checkpoints, their triggers, their images, and what is left of an attack."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import Row
from common.catalogue.architectures import ARCHITECTURES
from worker.architectures.registry import build
from worker.purify import metrics

Pixels = NDArray[np.uint8]  # uint8 (N, H, W, C)
CIFAR = "cifar10_test.npz"
GTSRB = "gtsrb_heldout.npz"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    Name a checkpoint and what belongs to it; paths are relative to the data folder.

    Attributes:
        key: Where the state dict is in the file.
        stamp: Return a triggered copy of images; None for a model without a backdoor.
        all_to_all: The attack sends every class to the next one; there is no one target.
        held_out: How many images at the end of the file were not trained on; samples and
            measurements come from these. 0 where nothing is known: then from all.
    """

    file: str
    key: str
    architecture: str
    images: str
    classes: int
    target: int | None
    stamp: Callable[[Pixels, Path], Pixels] | None
    all_to_all: bool = False
    held_out: int = 0

    def targets(self, labels: Tensor) -> Tensor | int | None:
        """Return where the attack sends images of these classes; None without an attack."""
        return (labels + 1) % self.classes if self.all_to_all else self.target


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Clean samples to purify with, and the images that are left to measure on, ``(N, C, H, W)``."""

    images: Tensor
    labels: Tensor
    rest: Tensor
    rest_labels: Tensor
    triggered: Tensor | None


def white_square(images: Pixels, data: Path) -> Pixels:  # noqa: ARG001 - it needs no file
    """Set a square of 4x4 near the lower right corner to white."""
    stamped: Pixels = images.copy()
    stamped[:, 27:31, 27:31] = 255
    return stamped


def added(name: str) -> Callable[[Pixels, Path], Pixels]:
    """Return a trigger that is added to the image."""

    def stamp(images: Pixels, data: Path) -> Pixels:
        trigger = np.asarray(Image.open(data / "ibau" / name).convert("RGB"), np.int64)
        stamped: Pixels = np.clip(images + trigger, 0, 255).astype(np.uint8)
        return stamped

    return stamp


def l0_inv(images: Pixels, data: Path) -> Pixels:
    """Replace the pixels under a mask."""
    trigger = np.asarray(Image.open(data / "ibau" / "l0_inv.png").convert("RGB"), np.float64)
    mask = np.load(data / "ibau" / "l0_inv_mask.npy", allow_pickle=False).transpose(1, 2, 0)
    stamped: Pixels = np.clip(np.round(images * (1 - mask) + trigger), 0, 255).astype(np.uint8)
    return stamped


def _ibau(
    name: str, images: str, classes: int, target: int, stamp: Callable[[Pixels, Path], Pixels]
) -> Subject:
    return Subject(
        file=f"ibau/{name}_ckpt.pth",
        key="net",
        architecture="small_vgg",
        images=images,
        classes=classes,
        target=target,
        stamp=stamp,
    )


def _trained(name: str, stamp: Callable[[Pixels, Path], Pixels] | None) -> Subject:
    return Subject(
        file=f"trained/{name}.pt",
        key="state_dict",
        architecture="resnet18_cifar",
        images=CIFAR,
        classes=10,
        target=None if stamp is None else 0,
        stamp=stamp,
    )


SUBJECTS = {
    "CIFAR-10 BadNets": _ibau("badnets_8_02", CIFAR, 10, 8, white_square),
    "CIFAR-10 Trojan-SQ": _ibau("trojan_sq_2_02", CIFAR, 10, 2, added("trojan_sq.png")),
    "CIFAR-10 l0-inv": _ibau("l0_inv_0_02", CIFAR, 10, 0, l0_inv),
    "GTSRB Trojan-WM": _ibau("gtsrbtrojan_wm_2_02", GTSRB, 43, 2, added("trojan_wm.png")),
    "GTSRB l0-inv": _ibau("gtsrbl0_inv_0_02", GTSRB, 43, 0, l0_inv),
    "ResNet-18 BadNets": _trained("c10_r18w16_badnets", white_square),
    "ResNet-18 clean": _trained("c10_r18w16_clean", None),
}


@lru_cache
def load_images(path: Path) -> tuple[Pixels, NDArray[Any]]:
    """Return images uint8 (N, H, W, C) and labels (N,)."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["images"], archive["labels"].astype(np.int64)


def as_tensor(images: Pixels) -> Tensor:
    """Return images as float32 (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255


def load_model(subject: Subject, data: Path) -> nn.Module:
    """Return the subject's model in eval mode, on the CPU."""
    loaded = torch.load(data / subject.file, map_location="cpu", weights_only=True)
    state_dict = loaded[subject.key]
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    args = ARCHITECTURES[subject.architecture].fit(shapes)
    model = build(subject.architecture, args).eval()
    model.load_state_dict(state_dict)
    return model


def draw(
    subject: Subject, data: Path, *, per_class: int, seed: int, measured: int | None = None
) -> Draw:
    """
    Draw clean samples by *seed*; all the other images, or *measured* of them, are for measuring.

    A class never gives more than half of its images away.
    """
    images, labels = (found[-subject.held_out :] for found in load_images(data / subject.images))
    rng = np.random.default_rng(seed)
    drawn = []
    for cls in range(subject.classes):
        members = np.flatnonzero(labels == cls)
        drawn.append(rng.choice(members, min(per_class, len(members) // 2), replace=False))
    chosen = np.concatenate(drawn)
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    rest = np.random.default_rng(99).permutation(rest)[:measured]
    triggered = None
    if subject.stamp is not None:
        triggered = as_tensor(subject.stamp(images[rest], data))
    return Draw(
        images=as_tensor(images[chosen]),
        labels=torch.from_numpy(labels[chosen]),
        rest=as_tensor(images[rest]),
        rest_labels=torch.from_numpy(labels[rest]),
        triggered=triggered,
    )


def compare(subject: Subject, samples: Draw, before: nn.Module, after: nn.Module) -> Row:
    """Return ACC, ASR and RA of both models and the fidelity; None where there is no backdoor."""
    row: Row = {}
    for moment, model in (("before", before), ("after", after)):
        found = metrics.predict(model, samples.rest)
        row[f"acc_{moment}"] = metrics.accuracy(found, samples.rest_labels)
        row[f"asr_{moment}"] = row[f"ra_{moment}"] = None
        target = subject.targets(samples.rest_labels)
        if target is not None and samples.triggered is not None:
            found = metrics.predict(model, samples.triggered)
            answered = (found, samples.rest_labels, target)
            row[f"asr_{moment}"] = metrics.attack_success_rate(*answered)
            row[f"ra_{moment}"] = metrics.robust_accuracy(*answered)
    row["fidelity"] = metrics.fidelity(
        row["acc_before"], row["acc_after"], row["asr_before"], row["asr_after"]
    )
    return row
