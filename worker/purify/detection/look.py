"""
Look for every sign of a backdoor, and again where the verdict is doubtful.

What is looked for is in the modules beside this one; here is in which order, and what is spared.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from worker.purify.augmentation import shifted
from worker.purify.detection import margins, search, squares
from worker.purify.detection.evidence import (
    CARRIED_FROM,
    CUTS,
    Evidence,
    Sign,
    has_told,
    judge,
)
from worker.purify.detection.inversion import Forward
from worker.purify.detection.verdict import Verdict
from worker.purify.workpiece import laid_out

SHIFTED, OF = 200, 20  # shifted samples, of so many at most, to see whether a patch carries over


def ticks(image: Tensor, classes: int, steps: int) -> int:
    """Return how often ``look`` ticks at most, at images like *image* ``(C, H, W)``."""
    patches = search.ticks(steps, classes) + steps
    others = squares.ticks(image, classes) + margins.ticks(classes)
    others += search.WARP_STEPS + search.STEPS_AGAIN
    return patches + others


def look(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Evidence:
    """
    Return what speaks for a backdoor; where that is doubtful, after a second look.

    No warp is searched where something else has told for certain. Where it is still doubtful they are
    searched again, to the classes that may be those of a backdoor.

    Args:
        forward: Maps images ``(B, C, H, W)`` to logits ``(B, classes)``.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        steps: Of the search for every class's patch.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step of a search.

    Raises:
        NotFinite: The logits are not.
    """
    given = (forward, images, labels)
    # What is drawn after the squares does not depend on them.
    found_squares = squares.best_squares(
        forward, images, classes, generator=generator.clone_state(), tick=tick
    )
    largest = margins.largest_margins(forward, images[0], classes, generator=generator, tick=tick)
    field = search.search(*given, classes, steps=steps, generator=generator, tick=tick)
    found = Evidence(
        squares=found_squares,
        field=field,
        margins=largest,
        warps=None,
        worst_warp=search.worst_warp(images),
    )
    if not has_told(found):
        warps = search.smallest_warps(field, *given, generator=generator, tick=tick)
        found = replace(found, warps=warps)
    found = replace(found, carried=_carried(found, forward, images, labels, generator))
    if judge(found) is Verdict.INCONCLUSIVE:
        again = search.search_again(field, *given, steps=steps, generator=generator, tick=tick)
        found = replace(found, field=again)
        found = replace(found, carried=_carried(found, forward, images, labels, generator))
    is_doubtful = judge(found) is Verdict.INCONCLUSIVE
    if found.warps is not None and is_doubtful and found.doubtful:
        smaller = search.smaller_warps(
            found.warps, found.doubtful, *given, generator=generator, tick=tick
        )
        found = replace(found, warps=smaller)
    return found


def _carried(
    found: Evidence, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator
) -> dict[int, float]:
    """
    Return the success on shifted samples of the patches whose index alone does not tell.

    Of more than a few samples that of an innocent class carries over as well.
    """
    if len(images) > OF:
        return {}
    doubtful = [
        cls
        for cls in range(found.classes)
        if CARRIED_FROM <= found.index(Sign.PATCH, cls) < CUTS[Sign.PATCH].backdoored_from
    ]
    if not doubtful:
        return {}
    moved, _ = shifted(
        images, labels, copies=SHIFTED // len(images), flip=False, generator=generator
    )

    def answers(images: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(laid_out(images)).argmax(1)

    own = answers(moved)
    carried = {}
    for cls in doubtful:
        led = answers(found.field.triggers[cls].stamp(moved[own != cls])) == cls
        carried[cls] = float(led.float().mean()) if len(led) else 0.0
    return carried
