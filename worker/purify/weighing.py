"""
Try a result on held-out images: what it answers otherwise, and what still leads to the suspects.

Both are estimates of what nobody can measure without the attack and many labelled images, the accuracy
that is lost and the success that is left, and a candidate is chosen by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.workpiece import in_parts

Forward = Callable[[Tensor], Tensor]
Unlearned = Literal["nothing", "patches", "everything"]

# Of the answers that change first the original was right about few: the loss grows with their square.
# docs/auto-measurements.md has the models that this number was read off.
LOSS_BY_FLIPS = 5.0

# A trigger is trained to work, and shifts the answer further than the least that suffices.
TRIGGER_TO_LEAST = 2.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """
    Hold one result and what speaks for it.

    Attributes:
        strength: Weight of the stamped images against the clean ones; 0 is the model as it came.
        overshoot: By how many standard deviations of the logits the targets were aimed lower.
        unlearned: What they were stamped with.
        agreement: Share of images like the samples that are expected to get the original's class.
        lost: Estimate of the accuracy that is lost, in [0, 1].
        residual: What triggers still achieve, in [0, 1].
        values: Its tensors that differ from the original's.
        searched: Whether patches were searched on it afresh, and count in the residual.
    """

    strength: float
    overshoot: float
    unlearned: Unlearned
    agreement: float
    lost: float
    residual: float
    values: dict[str, Tensor]
    searched: bool = False

    @property
    def score(self) -> float:
        """Fidelity, as far as it can be seen without the attack."""
        return (1 - self.lost) * (1 - self.residual)


UNCHANGED = Candidate(
    strength=0.0,
    overshoot=0.0,
    unlearned="nothing",
    agreement=1.0,
    lost=0.0,
    residual=1.0,
    values={},
)


@dataclass(frozen=True, kw_only=True)
class Stamped:
    """
    Hold held-out images under one thing that leads to a class.

    Attributes:
        target: That class; ``ELSEWHERE`` where it leads to any other one.
        bare: The images without it, ``(n, C, H, W)``.
        images: Under it.
        control: The same images under something random of the same kind and size.
        stronger: Whether what is stamped is stronger than a trigger would be.
    """

    target: int
    bare: Tensor
    images: Tensor
    control: Tensor
    stronger: bool


@dataclass(frozen=True, kw_only=True)
class Trials:
    """
    Hold what every candidate is tried on: images, or what the part of a network that they share gives.

    Attributes:
        images: ``(N, …)``, clean, and near the borders between classes, where a change shows first.
        before: The original's logits on these, ``(N, classes)``.
        leads: By how many logits its first class leads on images that are like the samples, ``(M,)``.
        suspects: The classes that are made harder to reach.
        stamped: Held-out images, a part for everything that leads to one of these.
    """

    images: Tensor
    before: Tensor
    leads: Tensor
    suspects: Sequence[int]
    stamped: Sequence[Stamped]

    def agreement_and_loss(self, forward: Forward) -> tuple[float, float]:
        """
        Return the share of images like the samples that are expected to keep their class, and the loss.

        There are too few of these to count on; so their leads are held against how much the first class
        loses on each of ``images``. The loss is an estimate of the accuracy's. Where a suspect is made
        harder to reach than any other class it is its own images that are lost, and these are hardly
        ever wrong.
        """
        first = self.before.argmax(dim=1)
        fallen = lead(self.before, first) - lead(logits(forward, self.images), first)
        flips = (self.leads[:, None] < fallen).to(fallen.dtype).mean(dim=0)
        share = float(flips.mean())
        own = torch.isin(first, torch.tensor(self.suspects, device=first.device))
        of_suspects = float(flips[own].mean()) if bool(own.any()) else share
        among = len(self.suspects) / self.before.shape[1]
        return 1 - share, min(1.0, LOSS_BY_FLIPS * share**2 + among * of_suspects)

    def residual(self, forward: Forward) -> float:
        """
        Return what still leads to a suspect achieves, in [0, 1].

        It is the largest share of images that it takes there, less what its control does. A perturbation
        or a warp that was found is the least that sufficed, so it counts as if it moved the answer
        ``TRIGGER_TO_LEAST`` times as far; patches in their variants are stronger than a trigger, so their
        share is squared.
        """
        return max((_left(forward, each) for each in self.stamped), default=0.0)


def logits(forward: Forward, images: Tensor) -> Tensor:
    """Return the answers to *images*, ``(N, classes)``."""
    with torch.no_grad():
        return torch.cat([forward(part) for part in in_parts(images)])


def lead(answers: Tensor, classes: Tensor) -> Tensor:
    """Return by how many logits each of *classes* leads in its row, below 0 where it lags."""
    own = answers.gather(1, classes[:, None])[:, 0]
    return own - answers.scatter(1, classes[:, None], -torch.inf).amax(1)


def _left(forward: Forward, stamped: Stamped) -> float:
    clean = logits(forward, stamped.bare)
    times = 1.0 if stamped.stronger else TRIGGER_TO_LEAST
    if stamped.target == ELSEWHERE:
        target, towards = clean.argmax(1), -1.0
        behind = lead(clean, target)
    else:
        target, towards = torch.full((len(clean),), stamped.target, device=clean.device), 1.0
        behind = -lead(clean, target)
    foreign = behind > 0

    def share(images: Tensor) -> float:
        gained = towards * lead(logits(forward, images), target) + behind
        return float((foreign & (times * gained > behind)).to(clean.dtype).mean())

    excess = max(0.0, share(stamped.images) - share(stamped.control))
    return excess**2 if stamped.stronger else excess
