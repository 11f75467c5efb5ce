"""
Measure how far a model can be driven to each class by any image at all.

A backdoor makes a network so sure of its target that no image of an innocent class gets it there: the
largest margin of a class's logit over the others' stands out, whatever the trigger looks like (Wang,
Xiang, Miller and Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, https://arxiv.org/abs/2205.06900).
No sample is needed.

What differs: the image is a sigmoid that Adam moves, instead of one that is projected on its box; a
class is held against the median of all by the logarithm of their ratio, as the norms of triggers are;
only the best start of each class goes on after a glance, and beyond a hundred classes only the leading
ones and as many in the middle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from worker.purify.errors import NotFinite
from worker.purify.workpiece import laid_out

Forward = Callable[[Tensor], Tensor]

GLANCE_STEPS, STEPS, RATE = 60, 140, 0.1
AT_ONCE = 120  # images; ten classes have twelve starts each
MANY = 100  # classes, from which on not all are measured in full
AFTER_GLANCE = 50  # of the first classes, and of those in the middle


@dataclass(frozen=True, kw_only=True)
class Margins:
    """
    Hold the largest margin that was reached for each class, by class.

    Attributes:
        middle: Classes whose median is what an ordinary class reaches.
    """

    largest: Sequence[float]
    middle: Sequence[int]

    @property
    def ordinary(self) -> float:
        """What an ordinary class reaches, in logits."""
        return median(self.largest[cls] for cls in self.middle)


def ticks(classes: int) -> int:
    """Return how often ``largest_margins`` ticks."""
    return GLANCE_STEPS * math.ceil(classes / AT_ONCE) + STEPS


def largest_margins(
    forward: Forward,
    image: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Margins:
    """
    Return how far each of *classes* can get ahead of all others.

    Args:
        forward: Maps images to logits.
        image: ``(C, H, W)``, of the shape, type and device that *forward* takes.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step.

    Raises:
        NotFinite: The logits are not.
    """
    best = torch.zeros(classes, *image.shape).to(image)
    largest = [-math.inf] * classes
    for first in range(0, classes, AT_ONCE):
        part = range(first, min(classes, first + AT_ONCE))
        target = torch.tensor(part).repeat_interleave(max(1, AT_ONCE // classes))
        random = torch.rand(len(target), *image.shape, generator=generator)
        images = random.clamp(0.02, 0.98).logit().to(image)
        reached, images = _climb(forward, target.to(image.device), images, GLANCE_STEPS, tick)
        for row, (cls, value) in enumerate(zip(target.tolist(), reached, strict=True)):
            if value > largest[cls]:
                largest[cls], best[cls] = value, images[row]
    ranked = sorted(range(classes), key=lambda cls: -largest[cls])
    going_on = middle = list(range(classes))
    if classes > MANY:
        low = (classes - AFTER_GLANCE) // 2
        middle = ranked[low : low + AFTER_GLANCE]
        going_on = sorted({*ranked[:AFTER_GLANCE], *middle})
    target = torch.tensor(going_on, device=image.device)
    reached, _ = _climb(forward, target, best[target], STEPS, tick)
    for cls, value in zip(going_on, reached, strict=True):
        largest[cls] = value
    return Margins(largest=largest, middle=middle)


def _climb(
    forward: Forward, target: Tensor, images: Tensor, steps: int, tick: Callable[[], None]
) -> tuple[list[float], Tensor]:
    """Return the margins of each and the images, as logits, after *steps* towards larger ones."""
    leaf = images.detach().clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=RATE)
    for _ in range(steps):
        gradient = torch.autograd.grad(-_margins(forward, leaf, target).sum(), leaf)[0]
        leaf.grad = gradient
        adam.step()
        tick()
    with torch.no_grad():
        reached = _margins(forward, leaf, target)
    if not bool(reached.isfinite().all()):
        raise NotFinite
    return reached.tolist(), leaf.detach()


def _margins(forward: Forward, images: Tensor, target: Tensor) -> Tensor:
    logits = forward(laid_out(images.sigmoid()))
    own = logits.gather(1, target[:, None])[:, 0]
    others = logits.scatter(1, target[:, None], -math.inf)
    return own - others.amax(1)
