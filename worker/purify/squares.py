"""
Try a small square of every plain colour at every place of the image.

A network may answer to a patch only where it was trained to, to the pixel: the square of a ResNet-18 that
sends 98 % of all images to its class sends 10 % there when it lies one pixel further, or is one pixel
wider. No gradient leads to it from anywhere else (``search`` misses it on most draws), but there are few
enough of them to try all: Gu et al. ("BadNets", 2017) and most who came after stamp a small plain or
chequered square. What is measured is how far a class gets ahead of the others, as in ``margins``; no
square of five pixels a side does that for an innocent class. A square may also lead every class to
another one, an attack that makes none stand out. On a clean model one that hides the object may lead to
many as well, but then so do others of the same place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch
from torch import Tensor

from worker.purify.augmentation import shifted
from worker.purify.errors import NotFinite
from worker.purify.trigger import ELSEWHERE, Trigger
from worker.purify.workpiece import laid_out

Forward = Callable[[Tensor], Tensor]

SIDES, OF = (1, 2, 3, 4, 5), 32  # pixels, of an image of 32; in larger ones as much more
MAX_COLOURED = 3  # channels, of which all corners of the colour cube are tried; of more, two
CHUNK = 256  # images that go through the network at once
EACH = 6  # squares of each class that are tried on more than one image
KEPT = 60  # squares of each class that are tried again on a result
IMAGES = 12  # these
LED_AWAY = 1_000  # squares that lead one image away, the same share of those tried on each image
GLANCE = 10  # images that these are tried on
SCATTERING, SCATTERED = 20, 40  # squares that go on, and on how many other images, shifted ones
SCATTERING_TICKS = 3
SCATTERING_FROM = 2.0  # classes, from which on others beside the first are tried
ALIKE, NEARLY = 8, 0.8  # of these, at most so many, that lead to nearly as many as the best
SURE = 0.25  # of the lead of its own class, by which another one must lead
MANY, ALL_OF = 100, 50  # of more classes, the first so many and as many in the middle are
TRIED = 45_000  # about so many, of three channels
TRIED_AGAIN = 23_000  # images under those that may scatter, at most about
LEAST_RISE = 1e-3  # in logits


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Say which squares there are: each a place and a side, and one of the plain images."""

    places: Tensor  # (M, 3) int64: top, left, side
    kinds: Tensor  # (K, C, H, W)

    def __len__(self) -> int:
        return len(self.places) * len(self.kinds)

    def masks(self, numbers: Tensor) -> Tensor:
        """Return which pixels they cover, ``(B, 1, H, W)``."""
        top, left, side = self.places[numbers // len(self.kinds)].T[:, :, None].unbind()
        height, width = self.kinds.shape[2:]
        rows, columns = (torch.arange(n, device=numbers.device) for n in (height, width))
        down = (rows >= top) & (rows < top + side)
        across = (columns >= left) & (columns < left + side)
        covered: Tensor = (down[:, :, None] & across[:, None, :])[:, None]
        return covered

    def patterns(self, numbers: Tensor) -> Tensor:
        """Return what they are cut out of, ``(B, C, H, W)``."""
        found: Tensor = self.kinds[numbers % len(self.kinds)]
        return found

    def with_other_kinds(self, numbers: Tensor) -> Tensor:
        """Return all squares that lie where one of *numbers* does, those of one place together."""
        kinds = torch.arange(len(self.kinds), device=numbers.device)
        places: Tensor = torch.unique(numbers // len(self.kinds))
        return (places[:, None] * len(self.kinds) + kinds).flatten()

    def within(self, number: int) -> Tensor:
        """Return the squares of its kind within square *number*, itself too, or one step beyond."""
        place, kind = divmod(number, len(self.kinds))
        step = max(1, min(self.kinds.shape[2:]) // OF)
        first, side = self.places[:, :2], self.places[:, 2:]
        inside = (first >= first[place] - step) & (
            first + side <= first[place] + side[place] + step
        )
        found: Tensor = inside.all(1).nonzero()[:, 0] * len(self.kinds) + kind
        return found


@dataclass(frozen=True, kw_only=True)
class Scattering:
    """
    Hold the square that leads images to the most classes: an attack that sends each class to another.

    Attributes:
        trigger: What it looks like; it leads ``ELSEWHERE``.
        classes: To how many classes: the exponential of the entropy of where it leads, times how many
            of the images it leads away. One class that attracts all of them counts as one, and an
            image that half of the other squares lead away from the same place does not count.
        alike: Others of the same kind that lie within it, or hardly beyond, and lead to nearly as many:
            which of them is the true one does not show.
    """

    trigger: Trigger
    classes: float
    alike: Sequence[Trigger] = ()


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
    """

    triggers: Sequence[Trigger]
    margins: Sequence[float]
    rises: Sequence[float]
    middle: Sequence[int]
    scattering: Scattering
    grid: Grid
    leading: Tensor

    def index(self, cls: int) -> float:
        """Return how often an ordinary rise must be doubled; 0 where no square leads to the class."""
        if self.margins[cls] <= 0:
            return 0.0
        ordinary = median(max(self.rises[each], LEAST_RISE) for each in self.middle)
        return math.log2(max(self.rises[cls], LEAST_RISE) / ordinary)


def ticks(image: Tensor, classes: int) -> int:
    """Return how often ``best_squares`` ticks for images like *image*."""
    return math.ceil(len(_grid(image)) / CHUNK) + SCATTERING_TICKS + classes


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

    Every square is tried on one image; the best few of each class are tried on more.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        generator: A CPU generator, the only source of randomness.
        tick: Called after each chunk of squares, for each class, and thrice for what scatters.

    Raises:
        NotFinite: The logits are not, or there is no second class to get ahead of.
    """
    device = images.device
    grid = _grid(images[0])
    with torch.no_grad():
        bare = torch.cat([_margins(forward(part)) for part in torch.split(images, CHUNK)])
    own = bare.argmax(1)  # what an image is taken for already tells nothing of a square
    best = bare.new_full((KEPT, classes), -math.inf)
    which = torch.zeros(KEPT, classes, dtype=torch.int64, device=device)
    left = bare.new_zeros(len(grid))  # of an image's own lead
    tried_on = torch.zeros(len(grid), dtype=torch.int64, device=device)
    for numbers in torch.split(torch.arange(len(grid), device=device), CHUNK):
        chosen = torch.randint(len(images), (len(numbers),), generator=generator).to(device)
        margins = _stamped_margins(forward, images[chosen], grid, numbers)
        left[numbers] = margins.gather(1, own[chosen][:, None])[:, 0]
        tried_on[numbers] = chosen
        margins.scatter_(1, own[chosen][:, None], -math.inf)
        best, order = torch.cat([best, margins]).topk(KEPT, dim=0)
        rows = torch.cat([which, numbers[:, None].expand(-1, classes)])
        which = rows.gather(0, order)
        tick()
    ranked = best[0].argsort(descending=True).tolist()
    middle = chosen_classes = list(range(classes))
    if classes > MANY:
        low = (classes - ALL_OF) // 2
        middle = ranked[low : low + ALL_OF]
        chosen_classes = sorted({*ranked[:ALL_OF], *middle})
    some = torch.randperm(len(images), generator=generator)[:SCATTERED].to(device)
    few = some[:IMAGES]
    scattering = _most_scattering(
        forward,
        images[some],
        grid,
        _leading_away(left, tried_on),
        generator=generator,
        tick=tick,
    )
    tried = [_Tried(number=0, margin=-math.inf, success=0.0)] * classes
    for cls in range(classes):
        if cls in chosen_classes:
            tried[cls] = _better(forward, images[few], own[few], grid, which[:EACH, cls], cls)
        tick()
    return Squares(
        triggers=[_trigger(grid, each, cls) for cls, each in enumerate(tried)],
        margins=[each.margin for each in tried],
        rises=[each.margin - _foreign_mean(bare, own, cls) for cls, each in enumerate(tried)],
        middle=middle,
        scattering=scattering,
        grid=grid,
        leading=which,
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
    tried = _better(forward, few, own, squares.grid, squares.leading[:, target], target)
    return _trigger(squares.grid, tried, target) if tried.margin > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Tried:
    number: int
    margin: float
    success: float


def _grid(image: Tensor) -> Grid:
    channels, height, width = image.shape
    shortest = min(height, width)
    steps = [max(1, length // OF) for length in (height, width)]
    places = [
        (top, left, side)
        for side in sorted({max(1, round(side * shortest / OF)) for side in SIDES})
        for top in range(0, height - side + 1, steps[0])
        for left in range(0, width - side + 1, steps[1])
    ]
    corners = (
        list(product((1.0, 0.0), repeat=channels))
        if channels <= MAX_COLOURED
        else [(1.0,) * channels, (0.0,) * channels]
    )
    plain = torch.tensor(corners).to(image)[:, :, None, None].expand(-1, -1, height, width)
    rows, columns = (
        torch.arange(length, device=image.device) // step
        for length, step in zip((height, width), steps, strict=True)
    )
    board = ((rows[:, None] + columns) % 2).to(image).expand(channels, -1, -1)
    kinds = torch.cat([plain, torch.stack([board, 1 - board])])
    return Grid(places=torch.tensor(places, device=image.device), kinds=kinds)


def _stamped_margins(forward: Forward, images: Tensor, grid: Grid, numbers: Tensor) -> Tensor:
    stamped = torch.where(grid.masks(numbers), grid.patterns(numbers), images)
    with torch.no_grad():
        return _margins(forward(laid_out(stamped)))


def _margins(logits: Tensor) -> Tensor:
    """Return how far each class is ahead of the best other one, ``(B, classes)``."""
    if logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        raise NotFinite
    (first, second), (leader, _) = (each.unbind(1) for each in logits.topk(2, dim=1))
    ahead = logits - first[:, None]
    return ahead.scatter(1, leader[:, None], (first - second)[:, None])


def _better(
    forward: Forward, images: Tensor, own: Tensor, grid: Grid, numbers: Tensor, cls: int
) -> _Tried:
    """Return which of the squares *numbers* leads furthest to *cls*, on the images of other classes."""
    foreign = images[own != cls]
    if not len(foreign):
        return _Tried(number=int(numbers[0]), margin=-math.inf, success=0.0)
    margins = _on_each(forward, foreign, grid, numbers)[..., cls]
    row = int(margins.mean(1).argmax())
    return _Tried(
        number=int(numbers[row]),
        margin=float(margins[row].mean()),
        success=float((margins[row] > 0).float().mean()),
    )


def _leading_away(left: Tensor, tried_on: Tensor) -> Tensor:
    """
    Return the squares that lead away furthest what they were tried on.

    Args:
        left: By how much the image's own class still leads under each square.
        tried_on: Which image that was. Some are led away more easily than others, so each has its share.
    """
    which = sorted(set(tried_on.tolist()))
    furthest = []
    for image in which[:LED_AWAY]:
        own = (tried_on == image).nonzero()[:, 0]
        share = min(len(own), max(1, LED_AWAY // len(which)))
        furthest.append(own[left[own].topk(share, largest=False).indices])
    return torch.cat(furthest)


@dataclass(frozen=True, kw_only=True)
class _Led:
    """
    Hold where squares led a few images.

    Attributes:
        numbers: Of the squares, ``(M,)``, in the grid.
        to: The class that leads under each, ``(M, N)``.
        away: Whether that is another one than the image's own, and leads surely, ``(M, N)``.
        left: Which share of its lead the own class keeps on average, in [-1, 1], ``(M,)``.
        classes: How many there are.
    """

    numbers: Tensor
    to: Tensor
    away: Tensor
    left: Tensor
    classes: int

    def best(self, count: int) -> Tensor:
        """Return the numbers of those that lead to the most classes; of equal ones, furthest away."""
        by_distance = self.left.argsort(stable=True)
        led_to = _led_to(self.away, self.to, self.classes)[by_distance]
        return self.numbers[by_distance[led_to.argsort(descending=True, stable=True)[:count]]]


def _led(forward: Forward, images: Tensor, grid: Grid, numbers: Tensor) -> _Led:
    with torch.no_grad():
        lead, own = _margins(forward(images)).max(1)
    lead = lead.clamp_min(LEAST_RISE)
    margins = _on_each(forward, images, grid, numbers)
    ahead, to = margins.max(2)  # (M, N)
    still = margins.gather(2, own.expand(len(numbers), -1)[:, :, None])[..., 0]
    return _Led(
        numbers=numbers,
        to=to,
        away=(to != own) & (ahead >= SURE * lead),
        left=(still / lead).clamp(-1, 1).mean(1),
        classes=margins.shape[2],
    )


def _most_scattering(
    forward: Forward,
    images: Tensor,
    grid: Grid,
    numbers: Tensor,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Scattering:
    """
    Return which of the squares *numbers*, or of others where the best of them lie, scatters most.

    What is the best on a few images is so by chance as well, so others tell how far it scatters.
    """
    copies = -(-(GLANCE + SCATTERED) // len(images))
    labels = torch.zeros(len(images), device=images.device)  # nobody asks for these
    more, _ = shifted(images, labels, copies=copies, flip=False, generator=generator)
    glance = _led(forward, laid_out(more[:GLANCE]), grid, numbers)
    tick()
    again = grid.with_other_kinds(glance.best(SCATTERING))
    judging = laid_out(more[-SCATTERED:])
    others = _led(forward, judging, grid, again)
    tick()
    away = _not_hidden(others.away, len(grid.kinds))
    classes = _led_to(away, others.to, others.classes)
    row = int(classes.argmax())
    number = int(others.numbers[row])
    alike = list[Trigger]()
    if classes[row] >= SCATTERING_FROM:
        near = _led(forward, judging, grid, grid.within(number))
        alike = [
            _scattered(near, each, grid) for each in _alike(near) if near.numbers[each] != number
        ]
    tick()
    return Scattering(
        trigger=_scattered(others, row, grid), classes=float(classes[row]), alike=alike
    )


def _alike(led: _Led) -> list[int]:
    """Return the rows of those that lead to the most classes, and to nearly as many."""
    classes = _led_to(led.away, led.to, led.classes)
    most = classes.topk(min(ALIKE, len(classes)))
    found: list[int] = most.indices[most.values >= NEARLY * most.values[0]].tolist()
    return found


def _scattered(led: _Led, row: int, grid: Grid) -> Trigger:
    success = float(led.away[row].float().mean())
    tried = _Tried(number=int(led.numbers[row]), margin=0.0, success=success)
    return _trigger(grid, tried, ELSEWHERE)


def _led_to(away: Tensor, to: Tensor, classes: int) -> Tensor:
    """Return to how many classes each square leads, ``(M,)``, as ``Scattering`` says it."""
    weights = away.float()
    counts = weights.new_zeros(len(away), classes).scatter_add(1, to, weights)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    found: Tensor = weights.mean(1) * entropy.exp()
    return found


def _not_hidden(away: Tensor, kinds: int) -> Tensor:
    """
    Return *away* ``(M, N)`` without the images that half of the other kinds lead away from that place.

    There it is what is hidden that tells, and not what hides it.

    Args:
        away: By all kinds at some places.
    """
    by_place = away.view(-1, kinds, away.shape[1])
    others = by_place.sum(1, keepdim=True) - by_place.long()
    return (by_place & (2 * others < kinds - 1)).view_as(away)


def _on_each(forward: Forward, images: Tensor, grid: Grid, numbers: Tensor) -> Tensor:
    """Return the margins of every one of *images* under each square, ``(squares, N, classes)``."""
    each = torch.arange(len(images), device=images.device).repeat(len(numbers))
    parts = zip(
        torch.split(each, CHUNK),
        torch.split(numbers.repeat_interleave(len(images)), CHUNK),
        strict=True,
    )
    margins = torch.cat(
        [_stamped_margins(forward, images[rows], grid, which) for rows, which in parts]
    )
    return margins.view(len(numbers), len(images), -1)


def _trigger(grid: Grid, tried: _Tried, cls: int) -> Trigger:
    number = torch.tensor([tried.number], device=grid.places.device)
    return Trigger(
        target=cls,
        mask=grid.masks(number)[0].to(grid.kinds.dtype),
        pattern=grid.kinds[tried.number % len(grid.kinds)],  # a view: there may be many classes
        success=tried.success,
    )


def _foreign_mean(margins: Tensor, own: Tensor, cls: int) -> float:
    foreign = margins[own != cls, cls]
    return float(foreign.mean()) if len(foreign) else 0.0
