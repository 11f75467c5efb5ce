"""
Search the smallest trigger of every class without paying in full for classes that are out of question.

All classes start, each from two kinds of masks. What decides is the lower end of the field and its
middle, so after a while only the better start of the smaller classes goes on, and at last only the
few smallest and those in the middle (successive halving: Jamieson and Talwalkar, "Non-stochastic Best
Arm Identification and Hyperparameter Optimization", AISTATS 2016, https://arxiv.org/abs/1502.07943).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from worker.purify.detection.families import Patches, Warps
from worker.purify.detection.inversion import STEADY, VALUES, Forward, Inversion, Pace, pace_for
from worker.purify.detection.trigger import Field, Trigger, Warped

# Masks that start open find triggers that only work as a whole, and those that start nearly closed
# find the smallest ones.
OPENNESS = (0.0, -2.0)
PATCHES_PER_STEP = 96  # so that many classes cost no more per step than a few
MOST_PATCHES_PER_STEP = 192  # of small images, and where what is found the first time leaves doubt
MIN_PATCHES = 2  # per row and step
SHARES = (0.4, 0.3)  # of the steps, of the first two of three stages
SMALLEST, MIDDLE = 5, 5  # classes that stay to the end

# More classes than this get a glance first, in parts: one kind of start, and few steps.
AT_ONCE = 100
GLANCE_STEPS = 30
AFTER_GLANCE = 50

WARP_STEPS, FIRST_WARP_STEPS = 150, 40
WARPS_EACH, SMALLEST_WARPS = 2, 5  # per class at first, and in all after the first steps
FEW = 20  # classes, up to which warps to each are searched
SOME, ONE_CLASS_IN = 10, 20  # of more: of the smallest patches, at least, and in the middle
# Where it is doubtful, to classes that may be those of a backdoor: at most so many of them, so many
# warps to all of these together at first and after the first steps.
DOUBTFUL, WARPS_AGAIN, LEFT_AGAIN = 4, 8, 4
STEPS_AGAIN, FIRST_STEPS_AGAIN = 250, 100
IMAGES_PER_WARP = 8  # of fewer all may be led astray by chance, at any norm
# The attack itself fails on one image of four or so, and how much more it takes to lead the last of a
# few says little of it.
WARP_SUCCESS = 0.75


def ticks(steps: int, classes: int) -> int:
    """Return how often ``search`` ticks."""
    return steps + (GLANCE_STEPS * math.ceil(classes / AT_ONCE) if classes > AT_ONCE else 0)


def search(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Field:
    """
    Return the smallest trigger found for each of *classes*.

    The norm of a class that was given up on the way is larger than it need be.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        steps: At least 3; given in full to the classes that stay.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step.

    Raises:
        NotFinite: The logits are not.
    """
    found: dict[int, Trigger] = {}
    affordable = PATCHES_PER_STEP * VALUES // images[0].numel()
    per_step = max(PATCHES_PER_STEP, min(MOST_PATCHES_PER_STEP, affordable))
    whole = pace_for(images[0])

    def start(targets: Sequence[int], openness: Sequence[float]) -> Inversion:
        rows = [(cls, level) for cls in targets for level in openness]
        return Inversion(
            forward,
            images,
            labels,
            [cls for cls, _ in rows],
            family=Patches.start(images, [level for _, level in rows], generator),
            generator=generator,
        )

    def run(inversion: Inversion, count: int, pace: Pace = STEADY) -> dict[int, int]:
        """Note what is found, and return the better row of each class, of the smallest first."""
        rows = len(inversion.targets)
        inversion.run(count, per_row=max(MIN_PATCHES, per_step // rows), tick=tick, pace=pace)
        triggers = inversion.triggers()
        better: dict[int, int] = {}
        for row in sorted(range(rows), key=lambda row: _size(triggers[row])):
            better.setdefault(triggers[row].target, row)
        found.update({cls: triggers[row] for cls, row in better.items()})
        return better

    still, middle = list(range(classes)), list[int]()
    if classes > AT_ONCE:
        for part in range(0, classes, AT_ONCE):
            run(start(still[part : part + AT_ONCE], OPENNESS[:1]), GLANCE_STEPS)
        ranked = sorted(found, key=lambda cls: _size(found[cls]))
        middle = _middle(ranked)
        still = sorted({*ranked[:AFTER_GLANCE], *middle})
    inversion = start(still, OPENNESS)
    first, second = (max(1, round(share * steps)) for share in SHARES)
    rows = run(inversion, first, whole.between(0, SHARES[0]))
    middle = middle or _middle(list(rows))
    for smallest, count, pace in (
        (-(-len(still) // 2), second, whole.between(SHARES[0], sum(SHARES))),
        (SMALLEST, steps - first - second, whole.between(sum(SHARES), 1)),
    ):
        going_on = {*list(rows)[:smallest], *middle}
        inversion.narrow([row for cls, row in rows.items() if cls in going_on])
        rows = run(inversion, count, pace)
    return Field(triggers=[found[cls] for cls in range(classes)], middle=middle)


def search_again(
    field: Field,
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Field:
    """
    Return *field* after another search for its smallest classes and those in the middle.

    It starts afresh, and the smaller of two triggers counts; the other arguments are ``search``'s.
    """
    smallest = sorted(range(len(field.triggers)), key=lambda cls: _size(field.triggers[cls]))
    targets = sorted({*smallest[:SMALLEST], *field.middle})
    inversion = Inversion(
        forward,
        images,
        labels,
        [cls for cls in targets for _ in OPENNESS],
        family=Patches.start(images, OPENNESS * len(targets), generator),
        generator=generator,
    )
    per_row = max(MIN_PATCHES, MOST_PATCHES_PER_STEP // len(inversion.targets))
    inversion.run(steps, per_row=per_row, tick=tick, pace=pace_for(images[0]))
    found = list(field.triggers)
    for trigger in inversion.triggers():
        found[trigger.target] = min(found[trigger.target], trigger, key=_size)
    return Field(triggers=found, middle=field.middle)


def worst_warp(images: Tensor) -> float:
    """Return the norm, in pixels, beyond which a warp is no slight one any more."""
    return min(images.shape[2:]) / 16


def smallest_warps(
    field: Field,
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Warped:
    """
    Return the norm of the smallest warp that leads ``WARP_SUCCESS`` of the images to each class.

    It is ``worst_warp`` where none was found.

    Of many classes only those are searched that the smallest patches of *field* lead to, and some in the
    middle of it; the other arguments are ``search``'s.
    """
    chosen = ranked = sorted(range(len(field.triggers)), key=lambda cls: _size(field.triggers[cls]))
    each = WARPS_EACH
    if len(ranked) > FEW:
        low = (len(ranked) - SOME) // 2
        smallest = ranked[: max(SOME, len(ranked) // ONE_CLASS_IN)]
        chosen, each = [*{*smallest, *ranked[low : low + SOME]}], 1
    chosen = sorted(chosen)
    found = _bent(
        forward,
        images,
        labels,
        chosen * each,
        steps=(FIRST_WARP_STEPS, WARP_STEPS - FIRST_WARP_STEPS),
        left=SMALLEST_WARPS,
        generator=generator,
        tick=tick,
    )
    worst = worst_warp(images)
    norms = [min(worst, found.get(cls, worst)) for cls in range(len(field.triggers))]
    return Warped(norms=norms, searched=chosen)


def smaller_warps(
    warps: Warped,
    doubtful: Sequence[int],
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Warped:
    """
    Return *warps* after a more thorough search of warps to the first few *doubtful* classes alone.

    The smaller norm of a class counts; the other arguments are ``search``'s.
    """
    targets = list(doubtful)[:DOUBTFUL]
    found = _bent(
        forward,
        images,
        labels,
        targets * (WARPS_AGAIN // len(targets)),
        steps=(FIRST_STEPS_AGAIN, STEPS_AGAIN - FIRST_STEPS_AGAIN),
        left=LEFT_AGAIN,
        generator=generator,
        tick=tick,
    )
    norms = [min(norm, found.get(cls, norm)) for cls, norm in enumerate(warps.norms)]
    return replace(warps, norms=norms)


def _bent(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    *,
    steps: tuple[int, int],
    left: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> dict[int, float]:
    """Return the norms of the smallest warps to each of *targets*, of which the *left* best go on."""
    inversion = Inversion(
        forward,
        images,
        labels,
        targets,
        family=Warps.start(images, len(targets), generator),
        generator=generator,
        success=WARP_SUCCESS,
    )
    norms = dict[int, float]()

    def run(steps: int) -> list[int]:
        """Note what is found, and return the rows, the smallest first."""
        inversion.run(steps, per_row=IMAGES_PER_WARP, tick=tick)
        found = inversion.found()
        for each in found:
            norms[each.target] = min(norms.get(each.target, math.inf), each.norm)
        return sorted(range(len(found)), key=lambda row: (found[row].norm, -found[row].success))

    first, rest = steps
    inversion.narrow(run(first)[:left])
    run(rest)
    return norms


def _middle(ranked: list[int]) -> list[int]:
    """Return the classes in the middle of the field."""
    first = max(0, (len(ranked) - MIDDLE) // 2)
    return ranked[first : first + MIDDLE]


def _size(trigger: Trigger) -> tuple[float, float]:
    """Return what to sort by: the smallest first, of failures the most successful."""
    return trigger.norm, -trigger.success
