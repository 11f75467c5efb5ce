"""
Try a small square of every plain colour at every place of the image.

A network may answer to a patch only where it was trained to, to the pixel: the square of a ResNet-18 that
sends 98 % of all images to its class sends 10 % there when it lies one pixel further, or is one pixel
wider. No gradient leads to it from anywhere else (``search`` misses it on most draws), but there are few
enough of them to try all: Gu et al. ("BadNets", 2017) and most who came after stamp a small plain or
chequered square. What is measured is how far a class gets ahead of the others, as in ``margins``; no
square of five pixels a side does that for an innocent class. A square may also lead every class to
another one (``scattering``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from worker.purify.detection import scattering
from worker.purify.detection.grid import NOTHING, Forward, Grid, margins
from worker.purify.detection.scattering import Scattering, leading_away, most_scattering
from worker.purify.detection.trigger import Trigger
from worker.purify.workpiece import in_parts

IMAGES_AT_FIRST = 40  # one of these for each
GOING_ON = 300  # groups that lead furthest to any class, whose squares are tried alone
LED_AWAY = 2_000  # squares that lead away furthest, the same share of those tried on each image
EACH = 6  # squares of each class that are tried on more than one image
REFINED = 5  # classes of which all squares around the best one are tried as well
NEARLY, ELSEWHERE_AT_MOST = 0.7, 4  # of the margin of the best one, and squares at other places
KEPT = 60  # squares of each class that are tried again on a result
IMAGES = 12  # these
MANY, ALL_OF = 100, 50  # of more classes, the first so many and as many in the middle are
LEAST_RISE = 1e-3  # in logits
PER_TICK = 256  # groups


@dataclass(frozen=True, kw_only=True)
class Squares:
    """
    Hold the square that leads best to each class, by class.

    Attributes:
        triggers: What they look like and how many images they send there.
        margins: How far the class gets ahead of all others, in logits, on average.
        rises: How much further than without a square.
        middle: Classes whose median is what an ordinary class rises.
        scattering: The square that leads to the most classes.
        grid: All squares.
        leading: Those that lead furthest to each class on one image, ``(KEPT, classes)``, numbers in
            ``grid``.
        elsewhere: Others at other places that lead nearly as far. A network that goes by steps of several
            pixels may answer to its trigger there as well.
    """

    triggers: Sequence[Trigger]
    margins: Sequence[float]
    rises: Sequence[float]
    middle: Sequence[int]
    scattering: Scattering
    grid: Grid
    leading: Tensor
    elsewhere: Mapping[int, Sequence[Trigger]]

    def leading_to(self, cls: int) -> list[Trigger]:
        """Return the best square, and those elsewhere."""
        return [self.triggers[cls], *self.elsewhere.get(cls, ())]

    def index(self, cls: int) -> float:
        """Return how often an ordinary rise must be doubled; 0 where no square leads to the class."""
        if self.margins[cls] <= 0:
            return 0.0
        ordinary = median(max(self.rises[each], LEAST_RISE) for each in self.middle)
        return math.log2(max(self.rises[cls], LEAST_RISE) / ordinary)


def ticks(image: Tensor, classes: int) -> int:
    """Return how often ``best_squares`` ticks for images like *image*."""
    return math.ceil(len(Grid.over(image).groups()) / PER_TICK) + scattering.TICKS + classes + 2


def best_squares(
    forward: Forward,
    images: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Squares:
    """
    Return for each of *classes* the square that leads there best.

    Every square is tried on one image, together with others; the best few of each class on more, and
    what lies around the best of all.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        generator: A CPU generator, the only source of randomness.
        tick: Called as often as ``ticks`` says.

    Raises:
        NotFinite: The logits are not, or there is no second class to get ahead of.
    """
    grid = Grid.over(images[0])
    with torch.no_grad():
        bare = torch.cat([margins(forward(part)) for part in in_parts(images)])
    own = bare.argmax(1)  # what an image is taken for already tells nothing of a square
    some = torch.randperm(len(images), generator=generator)[:IMAGES_AT_FIRST].to(images.device)
    given = (forward, images[some])
    first = _on_one_image(*given, grid, generator=generator, tick=tick)
    most = most_scattering(*given, grid, first.away, generator=generator, tick=tick)
    few = some[:IMAGES]
    seen = (forward, images[few], own[few], grid)
    chosen, middle = _chosen(first.best)
    tried = [_Tried(number=0, margin=-math.inf, success=0.0)] * classes
    for cls in range(classes):
        if cls in chosen:
            tried[cls] = _better(*seen, first.leading[:EACH, cls], cls)
        tick()
    ahead = [cls for cls in chosen if tried[cls].margin > 0]
    elsewhere = dict[int, list[Trigger]]()
    for cls in sorted(ahead, key=lambda cls: -tried[cls].margin)[:REFINED]:
        # Of those that overlap the true one, or lie where it is answered to as well, chance may have
        # chosen another.
        tried[cls] = _better(*seen, grid.steps_away(tried[cls].number), cls)
        tried[cls] = _better(*seen, grid.within(tried[cls].number), cls)
        elsewhere[cls] = _elsewhere(*seen, cls, best=tried[cls])
    tick()
    return Squares(
        triggers=[
            grid.trigger(each.number, cls, success=each.success) for cls, each in enumerate(tried)
        ],
        margins=[each.margin for each in tried],
        rises=[each.margin - _foreign_mean(bare, own, cls) for cls, each in enumerate(tried)],
        middle=middle,
        scattering=most,
        grid=grid,
        leading=first.leading,
        elsewhere=elsewhere,
    )


def still_leading(
    squares: Squares,
    forward: Forward,
    images: Tensor,
    target: int,
    *,
    generator: torch.Generator,
) -> Trigger | None:
    """
    Return the one of the leading *squares* that still puts *target* ahead on a result, if any does.

    What does on a result did so on the original. What it still leads to counts on images that the result
    gives to other classes.

    Args:
        squares: Those of the original.
        forward: Maps images to the result's logits.
        images: ``(N, C, H, W)`` in [0, 1].
        target: The class.
        generator: A CPU generator, the only source of randomness.

    Raises:
        NotFinite: The logits are not.
    """
    few = images[torch.randperm(len(images), generator=generator)[:IMAGES].to(images.device)]
    with torch.no_grad():
        own = forward(few).argmax(dim=1)
    grid = squares.grid
    tried = _better(forward, few, own, grid, squares.leading[:, target], target)
    return grid.trigger(tried.number, target, success=tried.success) if tried.margin > 0 else None


@dataclass(frozen=True, kw_only=True)
class _First:
    """
    Hold what one image under each square tells.

    Attributes:
        leading: The squares that lead furthest to each class, ``(KEPT, classes)``, numbers in the grid.
        best: The margin of the first of them, ``(classes,)``.
        away: Those that lead away furthest whatever is under them, ``(M,)``.
    """

    leading: Tensor
    best: Tensor
    away: Tensor


def _on_one_image(
    forward: Forward,
    images: Tensor,
    grid: Grid,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> _First:
    """
    Try all squares, several at once, and those of the groups that lead furthest once more, one by one.

    Ticks after each part of the groups, and once after the rest.
    """
    groups, kinds = grid.groups(), len(grid.kinds)
    with torch.no_grad():
        own = torch.cat([forward(part).argmax(1) for part in in_parts(images)])
    # One image for all kinds at the same places: what these have in common is what they hide.
    each = torch.randint(len(images), (len(groups) // kinds,), generator=generator)
    tried_on = each.to(images.device).repeat_interleave(kinds)

    def under(numbers: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margins of all other classes than the image's own, and of that one."""
        found = grid.margins_under(forward, images, on, numbers)
        mine = own[on][:, None]
        return found.scatter(1, mine, -math.inf), found.gather(1, mine)[:, 0]

    parts = []
    for at in torch.split(torch.arange(len(groups)), PER_TICK):
        parts.append(under(groups[at], tried_on[at]))
        tick()
    found, left = (torch.cat(each) for each in zip(*parts, strict=True))
    by_place = left.view(-1, kinds)
    ordinary = by_place.sort(dim=1).values[:, (kinds - 1) // 2, None]
    further = (by_place - ordinary).flatten()
    away = groups[leading_away(further, tried_on, LED_AWAY // groups.shape[1])]
    singles = groups[:, 0]
    if groups.shape[1] > 1:
        chosen, _ = _chosen(found.amax(0))
        share = min(len(found), max(EACH, GOING_ON // len(chosen)))
        rows = torch.unique(found[:, chosen].topk(share, dim=0).indices)
        there = groups[rows] != NOTHING
        singles, on = groups[rows][there], tried_on[rows][:, None].expand_as(there)[there]
        found, _ = under(singles, on)
    best, order = found.topk(min(KEPT, len(found)), dim=0)
    tick()
    return _First(leading=singles[order], best=best[0], away=torch.unique(away[away != NOTHING]))


def _chosen(best: Tensor) -> tuple[list[int], list[int]]:
    """Return the classes whose squares are tried on more images, and those in the middle."""
    classes = list(range(len(best)))
    if len(classes) <= MANY:
        return classes, classes
    ranked = best.argsort(descending=True).tolist()
    low = (len(classes) - ALL_OF) // 2
    middle = ranked[low : low + ALL_OF]
    return sorted({*ranked[:ALL_OF], *middle}), middle


@dataclass(frozen=True, kw_only=True)
class _Tried:
    number: int
    margin: float
    success: float


def _better(
    forward: Forward, images: Tensor, own: Tensor, grid: Grid, numbers: Tensor, cls: int
) -> _Tried:
    """Return which of the squares *numbers* leads furthest to *cls*, on the images of other classes."""
    foreign = images[own != cls]
    if not len(foreign):
        return _Tried(number=int(numbers[0]), margin=-math.inf, success=0.0)
    found = grid.margins_under_each(forward, foreign, numbers)[..., cls]
    return _tried(numbers, found, int(found.mean(1).argmax()))


def _elsewhere(
    forward: Forward,
    images: Tensor,
    own: Tensor,
    grid: Grid,
    cls: int,
    *,
    best: _Tried,
) -> list[Trigger]:
    """Return the squares whole strides away that lead nearly as far as the *best*, all apart."""
    numbers = grid.steps_away(best.number)
    found = grid.margins_under_each(forward, images[own != cls], numbers)[..., cls]
    taken, others = _around(grid, best.number), list[Trigger]()
    for row in found.mean(1).argsort(descending=True).tolist():
        each = _tried(numbers, found, row)
        if each.margin < NEARLY * best.margin or len(others) == ELSEWHERE_AT_MOST:
            break
        square = grid.trigger(each.number, cls, success=each.success)
        if not bool((taken * square.mask).any()):
            taken = taken + _around(grid, each.number)
            others.append(square)
    return others


def _around(grid: Grid, number: int) -> Tensor:
    """Return a square's mask with what touches it: in a larger trigger any square leads nearly as far."""
    mask = grid.masks(torch.tensor([number], device=grid.places.device)).to(grid.kinds.dtype)
    return functional.max_pool2d(mask, 2 * grid.step + 1, stride=1, padding=grid.step)[0]


def _tried(numbers: Tensor, found: Tensor, row: int) -> _Tried:
    return _Tried(
        number=int(numbers[row]),
        margin=float(found[row].mean()),
        success=float((found[row] > 0).float().mean()),
    )


def _foreign_mean(margins: Tensor, own: Tensor, cls: int) -> float:
    foreign = margins[own != cls, cls]
    return float(foreign.mean()) if len(foreign) else 0.0
