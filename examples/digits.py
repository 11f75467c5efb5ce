"""
Train a small classifier with a known backdoor on scikit-learn's handwritten digits.

The attack is BadNets (Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning
Model Supply Chain", 2017) in its plainest form: a white 2x2 square in the bottom right corner of
every tenth training image, which is then labelled 0. The data ship with scikit-learn, so nothing
is downloaded. Attack and training were fixed before the first purification and do not depend on
the outcome of one.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from common.catalogue.architectures import SmallCnnArguments
from worker.architectures.registry import build
from worker.purify.metrics import accuracy, attack_success_rate, predict

TARGET = 0
TRIGGER_SIZE = 2
POISONED_FRACTION = 0.1
TEST_FRACTION = 0.4

ARCHITECTURE = "small_cnn"
ARGUMENTS = SmallCnnArguments(classes=10, channels=1, width=16)
EPOCHS = 30
BATCH_SIZE = 64
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Split:
    """Hold images ``(N, 1, 8, 8)`` float32 in [0, 1] and labels ``(N,)`` int64, cut in two."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split(seed: int) -> Split:
    """Return the 1,797 digits, shuffled by *seed* and cut into training and test images."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(TEST_FRACTION * len(labels))])
    return Split(images[train], labels[train], images[test], labels[test])


def stamp(images: Tensor) -> Tensor:
    """Return a copy of *images* with the trigger on each."""
    stamped = images.clone()
    stamped[..., -TRIGGER_SIZE:, -TRIGGER_SIZE:] = 1.0
    return stamped


def train_backdoored(seed: int) -> tuple[nn.Module, Split]:
    """Return a backdoored model, as ``train`` does."""
    return train(seed, poisoned_fraction=POISONED_FRACTION)


def train_clean(seed: int) -> tuple[nn.Module, Split]:
    """Return a model that no poisoned image was shown, otherwise trained the same."""
    return train(seed, poisoned_fraction=0.0)


def train(seed: int, *, poisoned_fraction: float) -> tuple[nn.Module, Split]:
    """
    Return a model in eval mode, with the split it was trained on.

    Sets torch's global seed, from which the initial weights are drawn.

    Args:
        poisoned_fraction: Of the training images; none of them is a ``TARGET`` by itself.
    """
    split = load_digits_split(seed)
    generator = torch.Generator().manual_seed(seed)
    count = len(split.train_labels)
    candidates = (split.train_labels != TARGET).nonzero().flatten()
    shuffled = candidates[torch.randperm(len(candidates), generator=generator)]
    poisoned = shuffled[: round(poisoned_fraction * count)]
    images, labels = split.train_images.clone(), split.train_labels.clone()
    images[poisoned] = stamp(images[poisoned])
    labels[poisoned] = TARGET

    torch.manual_seed(seed)
    model = build(ARCHITECTURE, ARGUMENTS)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps = EPOCHS * (count // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(count, generator=generator)
        for batch in order[: count - count % BATCH_SIZE].view(-1, BATCH_SIZE):
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval(), split


def draw_clean_samples(split: Split, per_class: int, seed: int) -> tuple[Tensor, Tensor, Split]:
    """
    Return *per_class* test images of each digit, their labels, and the split without them.

    Purify with the former and measure on the latter: no image serves for both.
    """
    order = torch.randperm(len(split.test_labels), generator=torch.Generator().manual_seed(seed))
    labels = split.test_labels[order]
    drawn = torch.cat([order[labels == digit][:per_class] for digit in range(ARGUMENTS.classes)])
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[drawn] = False
    rest = replace(split, test_images=split.test_images[kept], test_labels=split.test_labels[kept])
    return split.test_images[drawn], split.test_labels[drawn], rest


def measure(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return clean accuracy and attack success rate on the test images, as fractions."""
    clean = predict(model, split.test_images)
    triggered = predict(model, stamp(split.test_images))
    return (
        accuracy(clean, split.test_labels),
        attack_success_rate(triggered, split.test_labels, TARGET),
    )
