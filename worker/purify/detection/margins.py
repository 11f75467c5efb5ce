"""
Measure how far a model can be driven to each class by any image at all.

A backdoor makes a network so sure of its target that no image of an innocent class gets it there: the
largest margin of a class's logit over the others' stands out, whatever the trigger looks like (Wang,
Xiang, Miller and Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, https://arxiv.org/abs/2205.06900).
No sample is needed.

What differs: the image is a sigmoid that Adam moves, instead of one that is projected on its box; a
class is held against the median of all by the logarithm of their ratio, as the norms of triggers are;
of several starts of each class the best third goes on after a first glance, and one after a second; of
many classes only the leading ones go on then, and as many in the middle.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from worker.purify.errors import NotFinite
from worker.purify.workpiece import laid_out

Forward = Callable[[Tensor], Tensor]

GLANCE_STEPS, STEPS, RATE = 30, 70, 0.2
ONE_IN = 3  # of these steps are taken with all starts, and of the starts of a class so many with the rest
AT_ONCE = 120  # images; ten classes have twelve starts each
TRIED = 2_500  # images that are taken a step, about
MANY = 20  # classes, from which on not all are measured in full
AFTER_GLANCE, ONE_CLASS_IN = 10, 20  # of the first classes, and of those in the middle: at least


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
    starts, first_steps = max(1, AT_ONCE // classes), GLANCE_STEPS // ONE_IN
    for first in range(0, classes, AT_ONCE):
        part = range(first, min(classes, first + AT_ONCE))
        target = torch.tensor(part).repeat_interleave(starts)
        random = torch.rand(len(target), *image.shape, generator=generator)
        images = random.clamp(0.02, 0.98).logit().to(image)
        reached, images = _climb(forward, target.to(image.device), images, first_steps, tick)
        rows = _best_of_each(target.tolist(), reached, -(-starts // ONE_IN))
        target, images = target[rows], images[rows]
        reached, images = _climb(
            forward, target.to(image.device), images, GLANCE_STEPS - first_steps, tick
        )
        for row in _best_of_each(target.tolist(), reached, 1):
            largest[int(target[row])], best[target[row]] = reached[row], images[row]
    ranked = sorted(range(classes), key=lambda cls: -largest[cls])
    going_on = middle = list(range(classes))
    if classes > MANY:
        some = max(AFTER_GLANCE, classes // ONE_CLASS_IN)
        low = (classes - some) // 2
        middle = ranked[low : low + some]
        going_on = sorted({*ranked[:some], *middle})
    target = torch.tensor(going_on, device=image.device)
    reached, _ = _climb(forward, target, best[target], STEPS, tick)
    for cls, value in zip(going_on, reached, strict=True):
        largest[cls] = value
    return Margins(largest=largest, middle=middle)


def _best_of_each(targets: Sequence[int], reached: Sequence[float], count: int) -> list[int]:
    """Return the rows of the *count* images of each class that reached furthest."""
    taken = Counter[int]()
    rows = list[int]()
    for row in sorted(range(len(targets)), key=lambda row: -reached[row]):
        if taken[targets[row]] < count:
            taken[targets[row]] += 1
            rows.append(row)
    return sorted(rows)


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
