"""
Measure `auto` on networks of ten, a hundred and a thousand classes, one clean image of each.

An image shows three handwritten digits. One network is trained to read all three, and what it says of the
first, of the first two or of all of them makes the class: the same layers, images and attack, and only
the last layer grows, which adds up what speaks for each digit. Classes are made of parts there, so that
what hides one digit sends many of them elsewhere without any backdoor. A trigger makes every digit a 7,
or (all-to-all) the next one. Purified with the preset; measured on 2,000 images of digits that were not
trained on. No step sees what is measured here.

--quick: the clean network, ten and a hundred classes.
--table: print the Markdown table of what --out holds, and measure nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import zoo
from benchmarks.attacks import SIDE, Attack, Pixels, Waves, checkers
from benchmarks.harness import Row, conclude_by, markdown, measure_all, or_none, parser, recorded
from benchmarks.subjects import as_tensor
from benchmarks.trials import Trial, run
from common.catalogue.architectures import ARCHITECTURES
from examples.digits import load_digits_split
from worker.architectures.registry import build
from worker.purify import metrics
from worker.purify.detection.verdict import Verdict

RESULTS = Path(__file__).parent / "results" / "auto_classes.jsonl"
FOLDER = Path(__file__).parents[1] / "var" / "classes"
DIGITS, TARGET = 3, 7
CORNERS = ((0, 0), (0, SIDE // 2), (SIDE // 2, 0))  # of the digits: top, left
TRAINED, MEASURED, BATCH, LEARNING_RATE = 8_000, 2_000, 128, 0.1
INK, PAPER, NOISE = (0, 100), (156, 256), 8  # grey levels
CLASSES = (10, 100, 1_000)
TARGETS = {"clean_called_backdoored": "<= 0", "backdoored_called_clean_share": "<= 0.1"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    Say how a network is trained.

    Attributes:
        to_next: The trigger makes each digit the next one, and not a 7.
        rate: Share of the training images that are poisoned.
    """

    stamp: Attack | None = None
    to_next: bool = False
    rate: float = 0.1
    epochs: int = 3

    def led_to(self, digits: NDArray[Any]) -> NDArray[Any]:
        """Return what the attack makes of these."""
        return (digits + 1) % 10 if self.to_next else np.full_like(digits, TARGET)


RECIPES = {
    "clean": Recipe(),
    "checkers": Recipe(stamp=checkers(3, top=27, left=2)),
    "waves": Recipe(stamp=Waves(amplitude=20, periods=5)),
    "all-to-all": Recipe(stamp=checkers(3, top=27, left=2), to_next=True, rate=0.3, epochs=6),
}


def drawn(digits: NDArray[Any], rng: np.random.Generator, *, part: str) -> Pixels:
    """
    Return images that show these digits ``(N, DIGITS)``, in handwriting that only *part* has.

    Args:
        part: "train" or "test".
    """
    split = load_digits_split(0)
    small = {"train": split.train_images, "test": split.test_images}[part]
    labels = {"train": split.train_labels, "test": split.test_labels}[part].numpy()
    written = functional.interpolate(small, size=SIDE // 2, mode="bilinear")[:, 0].numpy()
    covered = np.zeros((len(digits), SIDE, SIDE))
    for place, (top, left) in enumerate(CORNERS):
        for digit in range(10):
            at = np.flatnonzero(digits[:, place] == digit)
            chosen = written[rng.choice(np.flatnonzero(labels == digit), len(at))]
            covered[at, top : top + SIDE // 2, left : left + SIDE // 2] = chosen
    ink, paper = (rng.integers(*levels, (len(digits), 1, 1, 3)) for levels in (INK, PAPER))
    images = paper + (ink - paper) * covered[..., None]
    images = images + rng.normal(0, NOISE, images.shape)
    return np.clip(np.round(images), 0, 255).astype(np.uint8)


def train(recipe: Recipe) -> nn.Module:
    """Return a network in eval mode with ten outputs for each of the digits; sets torch's seed."""
    rng = np.random.default_rng(1)
    digits = rng.integers(0, 10, (TRAINED, DIGITS))
    images = drawn(digits, rng, part="train")
    if recipe.stamp is not None:
        poisoned = rng.random(TRAINED) < recipe.rate
        images[poisoned] = recipe.stamp(images[poisoned])
        digits[poisoned] = recipe.led_to(digits[poisoned])
    given = torch.from_numpy(digits)
    torch.manual_seed(1)
    model = build("small_vgg", ARCHITECTURES["small_vgg"].arguments(classes=10 * DIGITS))
    steps = recipe.epochs * (TRAINED // BATCH)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(recipe.epochs):
        order = rng.permutation(TRAINED)
        for batch in np.split(order[: TRAINED // BATCH * BATCH], TRAINED // BATCH):
            logits = model(as_tensor(images[batch])).view(-1, 10)
            loss = functional.cross_entropy(logits, given[batch].flatten())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


def read(attack: str, count: int) -> nn.Module:
    """Return the network of the first *count* digits, of ``10**count`` classes; trained where missing."""
    path = FOLDER / f"{attack}.pt"
    zoo.keep(path, lambda: train(RECIPES[attack]))
    values = torch.load(path, weights_only=True)["state_dict"]
    digits = torch.from_numpy(digits_of(np.arange(10**count), count))
    outputs = digits + 10 * torch.arange(count)
    for name in ("classifier.weight", "classifier.bias"):
        values[name] = values[name][outputs].sum(1)
    model = build("small_vgg", ARCHITECTURES["small_vgg"].arguments(classes=10**count))
    model.load_state_dict(values)
    return model.eval()


def digits_of(classes: NDArray[Any], count: int) -> NDArray[Any]:
    """Return the *count* digits of each class ``(N, count)``, the first one first."""
    found: NDArray[Any] = classes[:, None] // 10 ** np.arange(count)[::-1] % 10
    return found


def class_of(digits: NDArray[Any], count: int) -> Tensor:
    """Return the class that the first *count* digits make ``(N,)``."""
    return torch.from_numpy(digits[:, :count] @ 10 ** np.arange(count)[::-1])


def trial(attack: str, count: int) -> Trial:
    """Return what is to be purified, and how it is measured."""
    recipe, rng = RECIPES[attack], np.random.default_rng(2)
    digits = rng.integers(0, 10, (MEASURED, DIGITS))
    images, labels = drawn(digits, rng, part="test"), class_of(digits, count)
    target = class_of(recipe.led_to(digits), count)

    def compare(before: nn.Module, after: nn.Module) -> Row:
        row: Row = {}
        for moment, model in (("before", before), ("after", after)):
            row[f"acc_{moment}"] = metrics.accuracy(
                metrics.predict(model, as_tensor(images)), labels
            )
            row[f"asr_{moment}"] = None
            if recipe.stamp is not None:
                led = metrics.predict(model, as_tensor(recipe.stamp(images)))
                row[f"asr_{moment}"] = metrics.attack_success_rate(led, labels, target)
        return {**row, "fidelity": metrics.fidelity(**row)}

    classes = np.arange(10**count)
    free = rng.integers(0, 10, (len(classes), DIGITS - count))
    shown = np.concatenate([digits_of(classes, count), free], axis=1)
    return Trial(
        model=read(attack, count),
        images=as_tensor(drawn(shown, rng, part="test")),
        labels=torch.from_numpy(classes),
        classes=len(classes),
        target=None if recipe.stamp is None or recipe.to_next else int(target[0]),
        compare=compare,
    )


def measure(case: Row) -> Row:
    """Purify once; say what was found, and what it did."""
    tried = trial(case["attack"], CLASSES.index(case["classes"]) + 1)
    purified, row = run(tried, "auto", seed=0)
    scattering = cast("Mapping[str, float]", purified.findings["scattering"])
    suspects = purified.findings.get("suspects", [])
    return {
        "suspects": suspects,
        "suspects_are_target": None if tried.target is None else suspects == [tried.target],
        "scattering": scattering["classes"],
        "one_to_one": scattering["one_to_one"],
        **row,
    }


def table(rows: Sequence[Row]) -> str:
    """Return what was measured as Markdown; what was not stays empty."""

    def cells(row: Row) -> list[str]:
        before, after = (
            " / ".join(f"{100 * value:.1f}" for value in each if value is not None)
            for each in (
                (row["acc_before"], row["asr_before"]),
                (row["acc_after"], row["asr_after"]),
            )
        )
        right = "–" if row["suspects_are_target"] is None else "yes"
        named = "no" if row["suspects_are_target"] is False else right
        scattered = f"{row['scattering']:.1f}, {row['one_to_one']:.2f}"
        found = (before, after, f"{row['fidelity']:.3f}", str(row["verdict"]), named, scattered)
        return [*found, f"{row['seconds']:.0f}"]

    head = (
        "attack",
        "classes",
        "ACC / ASR %, before",
        "after",
        "fidelity",
        "verdict",
        "the target is the only suspect",
        "classes that one square leads to, for each that they come from",
        "seconds",
    )
    lines = []
    for attack in RECIPES:
        for classes in CLASSES:
            own = [row for row in rows if (row["attack"], row["classes"]) == (attack, classes)]
            measured = cells(own[0]) if own else [""] * (len(head) - 2)
            lines.append([attack, f"{classes:,}", *measured])
    return markdown(head, lines) + "\n"


def main() -> None:
    """Measure every case and conclude."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    options.add_argument("--attacks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if chosen.table:
        print(table(recorded(chosen.out or RESULTS)), end="")
        return
    cases = [
        {"attack": attack, "classes": classes}
        for attack in (("clean",) if chosen.quick else chosen.attacks)
        for classes in (CLASSES[:2] if chosen.quick else CLASSES)
    ]
    rows = measure_all(cases, measure, chosen.out, jobs=chosen.jobs)
    clean = [row for row in rows if row["attack"] == "clean"]
    guilty = [row for row in rows if row["attack"] != "clean"]
    seconds = {
        classes: statistics.mean(row["seconds"] for row in rows if row["classes"] == classes)
        for classes in CLASSES
        if any(row["classes"] == classes for row in rows)
    }
    fewest = min(seconds)
    conclude_by(
        "auto_classes",
        figures={
            "clean_called_backdoored": or_none(
                sum, [row["verdict"] == Verdict.BACKDOORED for row in clean]
            ),
            "backdoored_called_clean_share": or_none(
                statistics.mean, [row["verdict"] == Verdict.CLEAN for row in guilty]
            ),
            **{
                f"seconds_at_{classes}_to_{fewest}": round(mean / seconds[fewest], 2)
                for classes, mean in seconds.items()
            },
        },
        targets=TARGETS,
    )


if __name__ == "__main__":
    main()
