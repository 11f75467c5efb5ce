"""
Measure how near some classes are: how small a perturbation of the whole image leads there.

As with the other signs a class's index counts how often an ordinary class's value must be halved.
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite, log2
from statistics import median

import torch
from torch import Tensor

from worker.purify.detection.families import Perturbations
from worker.purify.detection.inversion import Forward, Inversion
from worker.purify.detection.trigger import Field

EACH, ORDINARY = 2, 9  # perturbations to each class, and ordinary classes, of one each


def nearness(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    field: Field,
    *,
    steps: int,
    per_row: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> dict[int, float]:
    """
    Return the index of each of *targets*, but for those that nothing led to.

    It is 0 where nothing led to an ordinary class, and there is none without other classes.

    Args:
        forward: Maps images ``(B, C, H, W)`` to logits.
        images: To search on, ``(N, C, H, W)``.
        labels: ``(N,)`` int64.
        targets: Classes.
        field: Of the smallest patches; those classes are ordinary that are in the middle of it.
        steps: Of the search.
        per_row: Images of each perturbation in a step.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step.

    Raises:
        NotFinite: The logits are not.
    """
    others = _ordinary(field, but=targets)
    if not others:
        return {}
    rows = [*list(targets) * EACH, *others]
    inversion = Inversion(
        forward,
        images,
        labels,
        rows,
        family=Perturbations.start(images, len(rows), generator),
        generator=generator,
    )
    inversion.run(steps, per_row=per_row, tick=tick)
    norms = dict.fromkeys(rows, inf)
    for each in inversion.found():
        norms[each.target] = min(norms[each.target], each.norm)
    ordinary = median([norms[cls] for cls in others])
    # Where nothing leads to an ordinary class there is nothing to compare with.
    return {
        target: log2(ordinary / norms[target]) if isfinite(ordinary) else 0.0
        for target in targets
        if isfinite(norms[target])
    }


def _ordinary(field: Field, *, but: Sequence[int]) -> list[int]:
    """Return the classes in the middle of the others, by the norm of their patches."""
    triggers = field.triggers
    others = sorted(set(range(len(triggers))) - set(but), key=lambda cls: triggers[cls].norm)
    low = max(0, (len(others) - ORDINARY) // 2)
    return others[low : low + ORDINARY]
