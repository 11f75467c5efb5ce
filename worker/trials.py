"""
Try the recovered triggers on the uploader's own samples: on the model as it came, and as it goes.

What is tried and kept is bounded (``trial_files.py``): the first sixteen triggers, on up to 64 samples,
the first of every class before the second of any.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.artefacts import MAX_TRIGGERS
from worker import trial_files
from worker.purify.detection.recovered import Recovered
from worker.purify.detection.trigger import ELSEWHERE
from worker.trial_files import MAX_SAMPLES, MAX_VALUES, NO_TARGET, Array, Counts, layout
from worker.yardstick import Network


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The classes that a network gives the samples: clean ``(M,)``, and under each trigger ``(T, M)``."""

    clean: Tensor
    stamped: Tensor


@dataclass(frozen=True, kw_only=True)
class Trial:
    """
    Triggers and samples to try them on.

    Attributes:
        sample: ``(M,)``, the samples' places in the uploader's file.
        images: ``(M, C, H, W)`` in [0, 1].
        labels: ``(M,)``.
        shown: How many of the samples are kept as images, clean and under each trigger.
    """

    triggers: tuple[Recovered, ...]
    sample: Tensor
    images: Tensor
    labels: Tensor
    shown: int

    @classmethod
    def of(cls, triggers: Sequence[Recovered], images: Tensor, labels: Tensor) -> "Trial":
        """Choose what is tried of *triggers* and of the samples, as far as there is room."""
        channels, height, width = images.shape[1:]
        # Mask and pattern, what is added, and the shift along two sides.
        of_each = (1 + channels + channels + 2) * height * width
        kept = tuple(triggers[: min(MAX_TRIGGERS, MAX_VALUES // of_each)])
        values = channels * height * width
        order = _in_turns(labels)[: min(MAX_SAMPLES, MAX_VALUES // values)]
        sample = torch.tensor(order, dtype=torch.int64)
        return cls(
            triggers=kept,
            sample=sample,
            images=images[sample],
            labels=labels[sample],
            shown=min(len(order), MAX_VALUES // (values * max(1, len(kept)))),
        )

    @property
    def counts(self) -> Counts:
        """How much of everything there is."""
        return Counts(triggers=len(self.triggers), samples=len(self.sample), shown=self.shown)

    def answers(self, network: Network) -> Answers:
        """Return what *network* says; without triggers it is not asked."""
        if not self.triggers:
            none = torch.zeros(0, dtype=torch.int64)
            return Answers(clean=none, stamped=none)
        stamped = [network.predict(each.stamp(self.images), _ignore) for each in self.triggers]
        return Answers(clean=network.predict(self.images, _ignore), stamped=torch.stack(stamped))


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a trial came to on the model as it came (``before``) and as it goes (``after``)."""

    trial: Trial
    before: Answers
    after: Answers

    def success(self, number: int) -> dict[str, float | None]:
        """Return what a trigger achieves before and after; ``None`` where that was not tried."""
        return {
            "success_before": self._success(self.before, number),
            "success_after": self._success(self.after, number),
        }

    def arrays(self) -> dict[str, Array]:
        """Return everything as arrays, laid out as ``trial_files`` has them."""
        trial, triggers = self.trial, self.trial.triggers
        shown = trial.images[: trial.shown]
        found = {
            "target": torch.tensor(
                [NO_TARGET if each.target == ELSEWHERE else each.target for each in triggers]
            ),
            "mask": torch.stack([trigger.mask for trigger in triggers]),
            "pattern": torch.stack([trigger.pattern for trigger in triggers]),
            "added": torch.stack([trigger.added for trigger in triggers]),
            "shift": torch.stack([trigger.shift for trigger in triggers]),
            "sample": trial.sample,
            "label": trial.labels,
            "clean_before": self.before.clean,
            "clean_after": self.after.clean,
            "stamped_before": self.before.stamped,
            "stamped_after": self.after.stamped,
            "clean": shown,
            "stamped": torch.stack([trigger.stamp(shown) for trigger in triggers]),
        }
        channels, height, width = trial.images.shape[1:]
        return {
            name: found[name].numpy().astype(dtype, copy=False)
            for name, (dtype, _) in layout(trial.counts, (channels, height, width)).items()
        }

    def write(self, path: Path) -> None:
        """Write the arrays to the new file *path*; without triggers there is none."""
        if self.trial.triggers:
            trial_files.write(self.arrays(), path)

    def _success(self, answers: Answers, number: int) -> float | None:
        """Return the share of other classes' samples that a trigger leads to its class, if any."""
        if number >= len(self.trial.triggers):
            return None
        target = self.trial.triggers[number].target
        if target == ELSEWHERE:
            led_away = answers.stamped[number] != answers.clean
            return round(float(led_away.float().mean()), 4)
        led = answers.stamped[number][self.trial.labels != target] == target
        return round(float(led.float().mean()), 4) if led.numel() else None


def _in_turns(labels: Tensor) -> list[int]:
    """Return the samples' places: the first of every class, then the second of every class."""
    seen = Counter[int]()
    turns = []
    for place, label in enumerate(labels.tolist()):
        turns.append((seen[label], place))
        seen[label] += 1
    return [place for _, place in sorted(turns)]


def _ignore(_: int) -> None:
    """Hear of progress: a trial is short."""
