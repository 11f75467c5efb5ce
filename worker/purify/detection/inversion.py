"""
Recover triggers: for each class, the smallest one of a family that sends clean images there.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P
2019, https://ieeexplore.ieee.org/document/8835365: a mask and a pattern per class, by Adam on the
cross-entropy and the mask's L1 norm, whose weight goes up while the patch succeeds and down while not.
Here the same search serves other families as well (``families``).

What differs, and why:

- All classes share a batch, so that a handful of images is a matter of seconds.
- What counts is the smallest trigger seen that succeeded, not the last.
- An image of the class itself has no part in that class's search.
- Where images are not small the rate starts high and falls geometrically, and half as many steps suffice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from worker.purify.detection.families import Family
from worker.purify.detection.trigger import SUCCESS, Found, Trigger
from worker.purify.errors import NotFinite
from worker.purify.workpiece import at_once, laid_out

Forward = Callable[[Tensor], Tensor]

BETAS = (0.5, 0.9)  # the reference's
DEARER, CHEAPER = 1.05, 1 / 1.1
PRICES = (1e-5, 100.0)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """
    Say how fast a search moves.

    Attributes:
        first: What the optimiser's rate is multiplied by at first.
        last: And at last; it falls geometrically.
        haste: How many times in a step the price moves.
    """

    first: float
    last: float
    haste: float

    def rate(self, done: float) -> float:
        """Return what the rate is multiplied by when a share of the steps is *done*."""
        return self.first * math.pow(self.last / self.first, done)

    def between(self, start: float, end: float) -> "Pace":
        """Return the pace of a part of the steps, from one share of them to another."""
        return replace(self, first=self.rate(start), last=self.rate(end))


STEADY = Pace(first=1.0, last=1.0, haste=1.0)
# Large steps find the way, and small ones do not shake what is found.
COOLING = Pace(first=3.0, last=0.3, haste=2.0)
VALUES = 3 * 32 * 32  # of an image; smaller ones are soon searched, and missed in haste


def pace_for(image: Tensor) -> Pace:
    """Return how fast to search patches on images like *image* ``(C, H, W)``."""
    return COOLING if image.numel() >= VALUES else STEADY


class Inversion:
    """
    One search per row, each for a class of its own; a class may have several.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        targets: The class of each row.
        family: Where they start, one row each.
        generator: A CPU generator, the only source of randomness.
        success: The share of the images that a trigger must lead to count as one.
    """

    def __init__(
        self,
        forward: Forward,
        images: Tensor,
        labels: Tensor,
        targets: Sequence[int],
        *,
        family: Family,
        generator: torch.Generator,
        success: float = SUCCESS,
    ) -> None:
        self._forward, self._images, self._labels = forward, images, labels
        self._generator, self._family, self._enough = generator, family, success
        self.targets = list(targets)
        self._adam = self._optimiser()
        self._price = images.new_full((len(self.targets),), family.price)
        self._best = _Best(
            family.shapes, images.new_full((len(self.targets),), -1.0), enough=success
        )

    def run(
        self, steps: int, *, per_row: int, tick: Callable[[], None], pace: Pace = STEADY
    ) -> None:
        """
        Go on for *steps*.

        Args:
            per_row: Images of every step; another random choice each time if there are more.
            tick: Called after each step.
            pace: At which the optimiser's rate and the price move.

        Raises:
            NotFinite: The logits are not.
        """
        images, labels = self._images, self._labels.cpu()
        targets = torch.tensor(self.targets)
        target = targets.to(images.device)
        size = min(per_row, len(images))
        for step in range(steps):
            self._adam.param_groups[0]["lr"] = self._family.rate * pace.rate(step / steps)
            rows = [
                torch.randperm(len(images), generator=self._generator)[:size] for _ in self.targets
            ]
            chosen = torch.stack(rows)  # (K, n)
            is_foreign = labels[chosen] != targets[:, None]
            # Found out on the CPU, since a GPU would have to be waited for.
            at = is_foreign.flatten().nonzero()[:, 0].to(images.device)
            stamped = self._family.stamp(images[chosen.to(images.device)])
            norm = self._family.norms()
            foreign = is_foreign.to(images)
            weights = foreign / foreign.sum(1, keepdim=True).clamp_min(1)
            gradient, hits = _gradient(self._forward, stamped, target, weights, at)
            success = (hits * weights).sum(1)
            self._best.keep(self._family.shapes, success, norm.detach())
            self._adam.zero_grad()
            torch.autograd.backward([stamped, (self._price * norm).sum()], [gradient, None])
            self._adam.step()
            dearer = success >= self._enough
            dearer_by, cheaper_by = DEARER**pace.haste, CHEAPER**pace.haste
            self._price = torch.where(dearer, self._price * dearer_by, self._price * cheaper_by)
            self._price = self._price.clamp(*PRICES)
            tick()
        if not all(bool(leaf.isfinite().all()) for leaf in self._family.leaves):
            raise NotFinite

    def narrow(self, rows: Sequence[int]) -> None:
        """Go on with *rows* only, as if the others had never been there."""
        at = torch.tensor(list(rows), device=self._images.device)
        moments = [self._adam.state.get(leaf, {}) for leaf in self._family.leaves]
        self.targets = [self.targets[row] for row in rows]
        self._family = self._family.narrow(at)
        self._adam = self._optimiser()
        for leaf, state in zip(self._family.leaves, moments, strict=True):
            # Adam counts its steps in a tensor without rows.
            self._adam.state[leaf] = {
                name: value[at] if value.dim() else value for name, value in state.items()
            }
        self._price = self._price[at]
        self._best.narrow(at)

    def found(self) -> list[Found]:
        """Return the smallest trigger that each row has found."""
        return self._best.found(self.targets)

    def triggers(self) -> list[Trigger]:
        """Return the same as patches, of a family of these."""
        return [
            Trigger(
                target=found.target,
                mask=found.shapes[0],
                pattern=found.shapes[1],
                success=found.success,
            )
            for found in self.found()
        ]

    def _optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._family.leaves, lr=self._family.rate, betas=BETAS)


def _gradient(
    forward: Forward, stamped: Tensor, target: Tensor, weights: Tensor, weighty: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Return the loss's gradient by the images ``(K, n, C, H, W)``, and which were sent ``(K, n)``.

    Args:
        weights: ``(K, n)``.
        weighty: Which of all are not 0. The others have no part in the loss, and are not looked at.
    """
    flat = stamped.detach().flatten(0, 1)
    wanted, weight = target.repeat_interleave(stamped.shape[1]), weights.flatten()
    gradient, hits = torch.zeros_like(flat), torch.zeros_like(weight)
    for at in torch.split(weighty, at_once(flat)) if len(weighty) else ():
        leaf = laid_out(flat[at]).requires_grad_()
        logits = forward(leaf)
        loss = functional.cross_entropy(logits, wanted[at], reduction="none") * weight[at]
        gradient[at] = torch.autograd.grad(loss.sum(), leaf)[0]
        hits[at] = (logits.argmax(1) == wanted[at]).to(hits)
    return gradient.view_as(stamped), hits.view_as(weights)


class _Best:
    """Keep the smallest successful trigger of each row, or the most successful of none."""

    def __init__(self, shapes: tuple[Tensor, ...], success: Tensor, *, enough: float) -> None:
        self._shapes, self._success, self._enough = shapes, success, enough
        self._norm = torch.full_like(success, float("inf"))

    def keep(self, shapes: tuple[Tensor, ...], success: Tensor, norm: Tensor) -> None:
        both = (success >= self._enough) & (self._success >= self._enough)
        better = torch.where(both, norm < self._norm, success > self._success)
        where = better.view(-1, 1, 1, 1)
        self._shapes = tuple(
            torch.where(where, new, old) for new, old in zip(shapes, self._shapes, strict=True)
        )
        self._success = torch.where(better, success, self._success)
        self._norm = torch.where(better, norm, self._norm)

    def narrow(self, at: Tensor) -> None:
        self._shapes = tuple(shape[at] for shape in self._shapes)
        self._success, self._norm = self._success[at], self._norm[at]

    def found(self, targets: Sequence[int]) -> list[Found]:
        return [
            Found(
                target=target,
                success=max(0.0, success),
                norm=norm if success >= self._enough else float("inf"),
                shapes=tuple(shape[row] for shape in self._shapes),
            )
            for row, (target, success, norm) in enumerate(
                zip(targets, self._success.tolist(), self._norm.tolist(), strict=True)
            )
        ]
