"""
Measure models on images: accuracy, attack success, robust accuracy, agreement, fidelity.

All are fractions in [0, 1]. Triggered images whose true class is the target are left out, as in
BackdoorBench: a correct answer there would count as a success of the attack.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from worker.purify.errors import NotEnoughData

Preprocess = Callable[[Tensor], Tensor]


def predict(
    model: nn.Module,
    images: Tensor,
    batch_size: int = 256,
    preprocess: Preprocess | None = None,
) -> Tensor:
    """
    Return the class that *model* gives each image, ``(N,)`` int64 on the CPU.

    The model is used in the mode it is in, on the device it is on; callers put it in eval mode.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        preprocess: Applied to a batch right before the model.
    """
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    classes = [torch.zeros(0, dtype=torch.int64)]
    with torch.no_grad():
        for chunk in torch.split(images, batch_size):
            batch = chunk.to(device)
            logits = model(batch if preprocess is None else preprocess(batch))  # (B, classes)
            classes.append(logits.argmax(dim=1).cpu())
    return torch.cat(classes)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the fraction of *predictions* that equal *labels*."""
    return _fraction(predictions.cpu() == labels.cpu())


def attack_success_rate(predictions: Tensor, labels: Tensor, target: Tensor | int) -> float:
    """
    Return the fraction of triggered images that are sent to *target*.

    Args:
        predictions: Classes given to the triggered images, ``(N,)``.
        labels: Their true classes, ``(N,)``; those that are the target are left out.
        target: One class, or one per image ``(N,)``.
    """
    return _fraction((predictions.cpu() == _cpu(target))[labels.cpu() != _cpu(target)])


def robust_accuracy(predictions: Tensor, labels: Tensor, target: Tensor | int) -> float:
    """Return the fraction of triggered images sent to their true class, targets left out."""
    return _fraction((predictions.cpu() == labels.cpu())[labels.cpu() != _cpu(target)])


def agreement(predictions: Tensor, others: Tensor) -> float:
    """Return the fraction of images that two models give the same class."""
    return _fraction(predictions.cpu() == others.cpu())


def fidelity(
    acc_before: float,
    acc_after: float,
    asr_before: float | None,
    asr_after: float | None,
) -> float | None:
    """
    Return ``(1 - asr_after / asr_before) * (acc_after / acc_before)``.

    For a clean model (no ASR, or none before) it is ``acc_after / acc_before``. Unmeasured stays
    unmeasured: None if the ratio of accuracies does not exist, or only the first ASR was measured.
    """
    if acc_before == 0:
        return None
    kept = acc_after / acc_before
    if asr_before is None or asr_before == 0:
        return kept
    if asr_after is None:
        return None
    return (1 - asr_after / asr_before) * kept


def _cpu(target: Tensor | int) -> Tensor | int:
    return target.cpu() if isinstance(target, Tensor) else target


def _fraction(hits: Tensor) -> float:
    """
    Return the share of true values.

    Raises:
        NotEnoughData: Nothing is left to measure on.
    """
    if hits.numel() == 0:
        raise NotEnoughData("no image is left to measure on; all have the target as true class")
    return hits.sum().item() / hits.numel()
