"""
Measure a network on the sets that only measure: ACC and agreement on one, ASR and RA on the other.

Purification never sees them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from worker.purify import metrics
from worker.samples import Samples

_PREDICT_BATCH = 256

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network on its device, with what happens to an image before it."""

    model: nn.Module
    preprocess: metrics.Preprocess | None

    def predict(self, images: Tensor, tick: Callable[[int], None]) -> Tensor:
        """Return the class of each image; *tick* hears how many were done."""
        found = [torch.zeros(0, dtype=torch.int64)]
        for batch in torch.split(images, _PREDICT_BATCH):
            found.append(metrics.predict(self.model, batch, preprocess=self.preprocess))
            tick(len(batch))
        return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """The sets that only measure; purification never sees them."""

    evaluation: Samples | None
    triggered: Samples | None

    @property
    def sets(self) -> dict[str, Samples]:
        """The sets that are there."""
        sets = {"evaluation": self.evaluation, "triggered": self.triggered}
        return {name: samples for name, samples in sets.items() if samples is not None}

    @property
    def size(self) -> int:
        """How many images there are."""
        return sum(len(samples.images) for samples in self.sets.values())

    def answers(self, network: Network, tick: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the network's answers on each set."""
        return {name: network.predict(samples.images, tick) for name, samples in self.sets.items()}

    def measure(self, answers: dict[str, Tensor]) -> dict[str, float | None]:
        """Return ACC, ASR and RA; what cannot be measured is ``None``."""
        accuracy = success = robust = None
        if self.evaluation is not None:
            labels = _present(self.evaluation.labels)
            accuracy = metrics.accuracy(answers["evaluation"], labels)
        if self.triggered is not None:
            labels, targets = _present(self.triggered.labels), _present(self.triggered.targets)
            if bool((labels != targets).any()):
                success = metrics.attack_success_rate(answers["triggered"], labels, targets)
                robust = metrics.robust_accuracy(answers["triggered"], labels, targets)
        return {
            "accuracy": accuracy,
            "attack_success_rate": success,
            "robust_accuracy": robust,
        }


def compare(
    yardstick: Yardstick, before: dict[str, Tensor], after: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the report's ``metrics`` from the answers on each set, before and after."""
    measured_before, measured_after = yardstick.measure(before), yardstick.measure(after)
    agreement = fidelity = None
    if "evaluation" in before:
        agreement = metrics.agreement(before["evaluation"], after["evaluation"])
    # Without a measured attack nobody knows whether there was one: fidelity stays unmeasured.
    if "evaluation" in before and measured_before["attack_success_rate"] is not None:
        fidelity = metrics.fidelity(
            _present(measured_before["accuracy"]),
            _present(measured_after["accuracy"]),
            measured_before["attack_success_rate"],
            measured_after["attack_success_rate"],
        )
    return {
        "before": measured_before,
        "after": {**measured_after, "agreement": agreement, "fidelity": fidelity},
    }


def _present(value: T | None) -> T:
    """Return a value that the gate has made sure of."""
    assert value is not None
    return value
