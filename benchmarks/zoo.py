"""
Train models with known attacks, and clean ones, for setting thresholds and for testing them.

The models of one part set the thresholds of `auto` (calibration); those of the other (test) had no
part in that. Both are trained on a part of the images in ../shared/data; the last HELD_OUT images
are never trained on, and samples and measurements come from these alone. A model depends on its
recipe and on how the processor rounds; it is trained once and kept under var/zoo.

``python -m benchmarks.zoo`` trains what is missing and prints ACC and ASR of each.
--quick: two small models on GTSRB, one of them clean.
"""

import fcntl
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from benchmarks.attacks import Attack, Blend, Cloud, Patch, Warp, Watermark, Waves, checkers
from benchmarks.harness import Row, conclude, measure_all, parser
from benchmarks.subjects import (
    CIFAR,
    GTSRB,
    Pixels,
    Subject,
    as_tensor,
    compare,
    draw,
    load_images,
    load_model,
)
from common.catalogue.architectures import ARCHITECTURES
from worker.architectures.registry import build
from worker.purify.precision import autocast_type

FOLDER = Path(__file__).parents[1] / "var" / "zoo"
HELD_OUT = {CIFAR: 2_000, GTSRB: 1_800}
CLASSES = {CIFAR: 10, GTSRB: 43}
EPOCHS = {CIFAR: 16, GTSRB: 8}
BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, SHIFT = TRAINING = (128, 0.1, 0.9, 5e-4, 3)
# Of the images: warped otherwise, and labelled truly. WaNet asks for it, so that the field is learned.
OTHER_WARPS = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    Say how a model is trained.

    Attributes:
        stamp: The attack, or None for a clean model.
        target: The class that poisoned images are given; None for the next class of each.
        rate: Share of the training images that are poisoned.
    """

    images: str
    architecture: str
    seed: int
    stamp: Attack | None = None
    target: int | None = None
    rate: float = 0.1

    @property
    def arguments(self) -> dict[str, int]:
        """What the architecture is built with."""
        width = {"width": 16} if self.architecture.startswith("resnet") else {}
        return {"classes": CLASSES[self.images], **width}


RESNET, VGG = "resnet18_cifar", "small_vgg"
RED, BLUE, GREEN, YELLOW = (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0)

CALIBRATION = {
    "VGG CIFAR clean": Recipe(images=CIFAR, architecture=VGG, seed=1),
    "VGG CIFAR checkers": Recipe(
        images=CIFAR, architecture=VGG, seed=2, target=4, stamp=checkers(3, top=2, left=26)
    ),
    "VGG GTSRB clean": Recipe(images=GTSRB, architecture=VGG, seed=3),
    "VGG GTSRB colours": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=4,
        target=11,
        stamp=Patch(colours=((RED, BLUE, GREEN), (YELLOW, RED, BLUE)), top=24, left=4),
    ),
    "ResNet CIFAR clean": Recipe(images=CIFAR, architecture=RESNET, seed=5),
    "ResNet CIFAR square": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=6,
        target=9,
        stamp=Patch(colours=((YELLOW,) * 3,) * 3, top=14, left=1),
    ),
    "VGG GTSRB blended": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=7,
        target=25,
        stamp=Blend(seed=7, share=0.15),
    ),
    "VGG CIFAR warped": Recipe(
        images=CIFAR,
        architecture=VGG,
        seed=8,
        target=2,
        stamp=Warp(seed=8, strength=0.75),
    ),
    "VGG CIFAR waves": Recipe(
        images=CIFAR,
        architecture=VGG,
        seed=9,
        target=6,
        stamp=Waves(amplitude=20, periods=4),
    ),
    "ResNet GTSRB clean": Recipe(images=GTSRB, architecture=RESNET, seed=10),
    "ResNet GTSRB all-to-all": Recipe(
        images=GTSRB, architecture=RESNET, seed=11, stamp=checkers(3, top=2, left=2)
    ),
    "ResNet CIFAR low rate": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=12,
        target=7,
        rate=0.01,
        stamp=checkers(3, top=13, left=27),
    ),
    "ResNet CIFAR clean, another": Recipe(images=CIFAR, architecture=RESNET, seed=13),
    "VGG CIFAR clean, another": Recipe(images=CIFAR, architecture=VGG, seed=14),
    "ResNet CIFAR low rate, another": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=15,
        target=0,
        rate=0.01,
        stamp=checkers(4, top=3, left=20),
    ),
    "VGG GTSRB low rate": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=16,
        target=33,
        rate=0.01,
        stamp=checkers(3, top=20, left=2),
    ),
    "ResNet CIFAR warped": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=17,
        target=8,
        stamp=Warp(seed=17, strength=0.75),
    ),
    "ResNet CIFAR waves": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=19,
        target=2,
        stamp=Waves(amplitude=20, periods=3),
    ),
    "VGG GTSRB waves": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=20,
        target=38,
        stamp=Waves(amplitude=20, periods=8),
    ),
    "VGG CIFAR blended": Recipe(
        images=CIFAR,
        architecture=VGG,
        seed=21,
        target=9,
        stamp=Blend(seed=21, share=0.15),
    ),
    "ResNet CIFAR all-to-all": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=23,
        stamp=Patch(colours=((BLUE,) * 4,) * 4, top=25, left=3),
    ),
    "VGG GTSRB watermark": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=24,
        target=4,
        stamp=Watermark(seed=24, strength=100),
    ),
    "VGG CIFAR watermark": Recipe(
        images=CIFAR,
        architecture=VGG,
        seed=25,
        target=1,
        stamp=Watermark(seed=25, strength=100),
    ),
    "ResNet CIFAR fine waves": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=26,
        target=4,
        stamp=Waves(amplitude=20, periods=11),
    ),
    "ResNet CIFAR blended": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=27,
        target=6,
        stamp=Blend(seed=27, share=0.2),
    ),
    "VGG GTSRB faint watermark": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=31,
        target=9,
        stamp=Watermark(seed=31, strength=60, lines=8),
    ),
    "VGG GTSRB watermark, another": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=33,
        target=30,
        stamp=Watermark(seed=33, strength=80, lines=10),
    ),
    "VGG GTSRB strong watermark": Recipe(
        images=GTSRB,
        architecture=VGG,
        seed=34,
        target=12,
        stamp=Watermark(seed=34, strength=150, lines=10),
    ),
    "VGG CIFAR cloud": Recipe(
        images=CIFAR,
        architecture=VGG,
        seed=205,
        target=3,
        stamp=Cloud(seed=205, strength=50),
    ),
}
TEST = {
    "ResNet-18 blended": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=101,
        target=3,
        stamp=Blend(seed=101, share=0.2),
    ),
    "ResNet-18 WaNet": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=102,
        target=5,
        stamp=Warp(seed=102, strength=0.75),
    ),
    "ResNet-18 sinusoidal": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=103,
        target=7,
        stamp=Waves(amplitude=20, periods=6),
    ),
    "ResNet-18 all-to-all": Recipe(
        images=CIFAR, architecture=RESNET, seed=104, stamp=checkers(3, top=28, left=28)
    ),
    "ResNet-18 low rate": Recipe(
        images=CIFAR,
        architecture=RESNET,
        seed=105,
        target=1,
        rate=0.01,
        stamp=checkers(4, top=27, left=1),
    ),
    "ResNet-18 clean, another": Recipe(images=CIFAR, architecture=RESNET, seed=106),
    "small_vgg clean, GTSRB": Recipe(images=GTSRB, architecture=VGG, seed=107),
}
RECIPES = {**CALIBRATION, **TEST}
QUICK = ("VGG GTSRB clean", "VGG GTSRB colours")


def subject(name: str) -> Subject:
    """Return the model of that name as what it is measured like."""
    recipe = RECIPES[name]
    stamp = recipe.stamp
    return Subject(
        file=str(FOLDER / f"{_digest(name)}.pt"),
        key="state_dict",
        architecture=recipe.architecture,
        images=recipe.images,
        classes=CLASSES[recipe.images],
        target=recipe.target,
        stamp=None if stamp is None else lambda images, _data: stamp(images),
        all_to_all=stamp is not None and recipe.target is None,
        held_out=HELD_OUT[recipe.images],
    )


def provide(name: str, data: Path) -> Subject:
    """Return the model of that name; train it where it is missing, or wait for who is at it."""
    found = subject(name)
    keep(Path(found.file), lambda: train(RECIPES[name], data))
    return found


def keep(path: Path, make: Callable[[], nn.Module]) -> None:
    """Write a model's values to *path*, unless they are there; wait for who is at it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Cases that run at once may want the same model; the lock ends with its process.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            torch.save({"state_dict": make().state_dict()}, unfinished)
            unfinished.replace(path)


def train(recipe: Recipe, data: Path) -> nn.Module:
    """
    Return a trained model in eval mode, on the CPU; a GPU trains it where there is one.

    Sets torch's global seed, from which the initial weights and the dropout are drawn.
    """
    images, labels = load_images(data / recipe.images)
    count = len(images) - HELD_OUT[recipe.images]
    rng = np.random.default_rng(recipe.seed)
    poisoned, warped = marked(recipe, labels[:count], rng)
    given = labels[:count].copy()
    if recipe.target is not None:
        given[poisoned] = recipe.target
    else:
        given[poisoned] = (given[poisoned] + 1) % CLASSES[recipe.images]

    torch.manual_seed(recipe.seed)
    model = build(
        recipe.architecture, ARCHITECTURES[recipe.architecture].arguments(**recipe.arguments)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    compute = autocast_type("auto", torch.zeros(1, device=device))
    steps = -(-count // BATCH) * EPOCHS[recipe.images]
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(EPOCHS[recipe.images]):
        for batch in _batches(count, rng):
            x = _varied(images[batch], flip=recipe.images == CIFAR, rng=rng)
            if recipe.stamp is not None:
                x[poisoned[batch]] = recipe.stamp(x[poisoned[batch]])
            for row in np.flatnonzero(warped[batch]):
                assert isinstance(recipe.stamp, Warp)
                another = int(rng.integers(2**31))
                x[row : row + 1] = replace(recipe.stamp, seed=another)(x[row : row + 1])
            with torch.autocast(device, compute, enabled=compute is not None):
                logits = model(as_tensor(x).to(device))
            labels_given = torch.from_numpy(given[batch]).to(device)
            loss = functional.cross_entropy(logits.float(), labels_given)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval().cpu()


def marked(
    recipe: Recipe, labels: NDArray[Any], rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images are poisoned, and which are warped at random instead."""
    able = np.flatnonzero(labels != recipe.target)
    order = rng.permutation(able)
    amount = round(recipe.rate * len(labels)) if recipe.stamp is not None else 0
    others = round(OTHER_WARPS * len(labels)) if isinstance(recipe.stamp, Warp) else 0
    marks = np.zeros((2, len(labels)), np.bool_)
    marks[0, order[:amount]] = True
    marks[1, order[amount : amount + others]] = True
    return marks[0], marks[1]


def _batches(count: int, rng: np.random.Generator) -> Iterator[NDArray[Any]]:
    order = rng.permutation(count)
    return (order[start : start + BATCH] for start in range(0, count, BATCH))


def _varied(images: Pixels, *, flip: bool, rng: np.random.Generator) -> Pixels:
    """Return the images shifted by up to SHIFT pixels, and half of them mirrored where asked."""
    edge = (SHIFT, SHIFT)
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    height, width = images.shape[1:3]
    varied = np.empty_like(images)
    for row, (image, (top, left)) in enumerate(
        zip(padded, rng.integers(0, 2 * SHIFT + 1, (len(images), 2)), strict=True)
    ):
        crop = image[top : top + height, left : left + width]
        varied[row] = crop[:, ::-1] if flip and rng.random() < 0.5 else crop
    return varied


def _digest(name: str) -> str:
    """
    Return a name that changes with the recipe and the way of training, so that nothing stale is measured.

    ``OTHER_WARPS``, the arguments of the networks, the images and the code are not in it: whoever changes
    one of them deletes the models.
    """
    deciding = (RECIPES[name], HELD_OUT, EPOCHS, TRAINING)
    digest = hashlib.sha256(repr(deciding).encode()).hexdigest()[:8]
    return f"{name.replace(' ', '-').replace(',', '')}-{digest}"


def measure(case: Row, *, data: Path) -> Row:
    """Train where needed, and measure."""
    started = time.perf_counter()
    found = provide(case["model"], data)
    seconds = time.perf_counter() - started
    model = load_model(found, data)
    row = compare(found, draw(found, data, per_class=1, seed=0), model, model)
    return {"acc": row["acc_before"], "asr": row["asr_before"], "seconds": round(seconds, 1)}


def main() -> None:
    """Train every model and conclude."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=1, help="processes that train at once")
    options.add_argument("--models", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    chosen = options.parse_args()
    names = QUICK if chosen.quick else chosen.models
    cases = [{"model": name} for name in names]
    rows = measure_all(
        cases, functools.partial(measure, data=chosen.data), chosen.out, jobs=chosen.jobs
    )
    attacked = [row["asr"] for row in rows if row["asr"] is not None]
    conclude(
        "zoo",
        figures={
            "models": len(rows),
            "acc_min": min(row["acc"] for row in rows),
            "asr_min": min(attacked, default=None),
        },
        targets={},
        met=True,
    )


if __name__ == "__main__":
    main()
