"""
Tell whether a square leads every class to another one, an attack that makes none stand out.

On a clean model a square that hides the object may lead to many classes as well, but then so do others of
the same place. And what is the best of many is so by chance too, so each choice is judged by other images
than it was made on, but for the last one, between a few squares and many images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.purify.augmentation import shifted
from worker.purify.detection.grid import Forward, Grid, margins
from worker.purify.detection.trigger import ELSEWHERE, Trigger
from worker.purify.workpiece import laid_out

GLANCE = 10  # images that squares are tried on
FIRST, GOING_ON = 4, 600  # the first of these, after which so many squares go on
GLANCED = 60  # squares that go on after these
CHOOSING = 30  # other images
FIRST_CHOOSING, GOOD = 10, 20  # the first of these, after which so many squares go on
BEST = 3  # squares that go on after these
JUDGING = 100  # others again; of fewer it is chance to how many classes a square leads them
JUDGED_FROM = 2.0  # classes, from which on others beside the first are tried
MANY = 50  # classes of the model; of more, some may differ in one place of the image alone
EACH, AT_LEAST = 2, 400  # images for each of many classes, and in all, to see what shares a class
ALIKE, NEARLY = 8, 0.8  # of these, at most so many, that lead to nearly as many as the best
ALIKE_ON = 40  # images
SURE = 0.25  # of the lead of its own class, by which another one must lead
LEAST_LEAD = 1e-3  # in logits
TICKS = 3
TRIED = 25_000  # images under squares, at most about


@dataclass(frozen=True, kw_only=True)
class Scattering:
    """
    Hold the square that leads images to the most classes: an attack that sends each class to another.

    Attributes:
        trigger: What it looks like; it leads ``ELSEWHERE``.
        classes: To how many classes: the inverse of how often two images that it leads away are led
            to the same one, times how many of the images it leads away. One class that attracts most of
            them hardly counts for more than one, and an image that half of the other squares lead away
            from the same place does not count.
        one_to_one: To how many classes, for each that the images come from. An attack sends each class to
            one of its own. What hides a part of the image, where the class is made of parts (the digits
            of a number, say), sends all classes that differ in it to the same one, and may send each of
            the others elsewhere nevertheless. It is asked where there are many classes, and 1 elsewhere.
        alike: Others of the same kind that lie within it, or hardly beyond, and lead to nearly as many:
            which of them is the true one does not show.
    """

    trigger: Trigger
    classes: float
    one_to_one: float = 1.0
    alike: Sequence[Trigger] = ()


def most_scattering(
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

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1]; of few, shifted copies are made.
        numbers: What may, in *grid*; of many a first glance leaves a few.
        generator: A CPU generator, the only source of randomness.
        tick: Called ``TICKS`` times.

    Raises:
        NotFinite: The logits are not.
    """
    kinds = len(grid.kinds)
    copies = -(-(GLANCE + CHOOSING + JUDGING) // len(images))
    labels = torch.zeros(len(images), device=images.device)  # nobody asks for these
    more, _ = shifted(images, labels, copies=copies, flip=False, generator=generator)
    first = _led(forward, laid_out(more[:FIRST]), grid, numbers)
    rest = _led(forward, laid_out(more[FIRST:GLANCE]), grid, first.best(GOING_ON))
    glance = first.only(rest.numbers).joined(rest)
    tick()
    choosing, judging = laid_out(more[GLANCE : GLANCE + CHOOSING]), laid_out(more[-JUDGING:])
    again = grid.with_other_kinds(glance.best(GLANCED))
    first = _led(forward, choosing[:FIRST_CHOOSING], grid, again)
    again = grid.with_other_kinds(first.seen(kinds).best(GOOD))
    rest = _led(forward, choosing[FIRST_CHOOSING:], grid, again)
    best = first.only(again).joined(rest).seen(kinds).best(BEST)
    others = _led(forward, judging, grid, grid.with_other_kinds(best))
    tick()
    seen = others.seen(kinds)
    classes = _led_to(seen.away, seen.to, seen.classes)
    row = int(classes.argmax())
    number = int(others.numbers[row])
    alike = list[Trigger]()
    if classes[row] >= JUDGED_FROM:
        near = _led(forward, judging[:ALIKE_ON], grid, grid.within(number))
        alike = [near.trigger(each, grid) for each in near.alike() if near.numbers[each] != number]
    one_to_one = 1.0
    if seen.classes > MANY and classes[row] >= JUDGED_FROM:
        enough = max(AT_LEAST, EACH * seen.classes)
        one_to_one = _one_to_one(forward, images, grid, number, enough, generator)
    tick()
    return Scattering(
        trigger=others.trigger(row, grid),
        classes=float(classes[row]),
        one_to_one=one_to_one,
        alike=alike,
    )


def leading_away(left: Tensor, tried_on: Tensor, most: int) -> Tensor:
    """
    Return the rows of those squares, or groups, that lead away furthest what they were tried on.

    Args:
        left: By how much the image's own class still leads under each.
        tried_on: Which image that was. Some are led away more easily than others, so each has its share.
        most: So many, about.
    """
    which = sorted(set(tried_on.tolist()))
    furthest = []
    for image in which[:most]:
        own = (tried_on == image).nonzero()[:, 0]
        share = min(len(own), max(1, most // len(which)))
        furthest.append(own[left[own].topk(share, largest=False).indices])
    return torch.cat(furthest)


@dataclass(frozen=True, kw_only=True)
class _Led:
    """
    Hold where squares led a few images.

    Attributes:
        numbers: Of the squares, ``(M,)``, in the grid.
        own: The class that leads without one, ``(N,)``.
        to: The class that leads under each, ``(M, N)``.
        away: Whether that is another one than the image's own, and leads surely, ``(M, N)``.
        left: Which share of its lead the own class keeps on average, in [-1, 1], ``(M,)``.
        classes: How many there are.
    """

    numbers: Tensor
    own: Tensor
    to: Tensor
    away: Tensor
    left: Tensor
    classes: int

    def best(self, count: int) -> Tensor:
        """Return the numbers of those that lead to the most classes; of equal ones, furthest away."""
        by_distance = self.left.argsort(stable=True)
        led_to = _led_to(self.away, self.to, self.classes)[by_distance]
        return self.numbers[by_distance[led_to.argsort(descending=True, stable=True)[:count]]]

    def seen(self, kinds: int) -> "_Led":
        """Return this, of all *kinds* at some places, without what is hidden there (``_not_hidden``)."""
        return replace(self, away=_not_hidden(self.away, kinds))

    def only(self, numbers: Tensor) -> "_Led":
        """Return this of the squares *numbers*, in their order."""
        rows = (self.numbers == numbers[:, None]).int().argmax(1)
        return replace(
            self, numbers=numbers, to=self.to[rows], away=self.away[rows], left=self.left[rows]
        )

    def joined(self, others: "_Led") -> "_Led":
        """Return this with what the same squares did to other images."""
        both = self.to.shape[1], others.to.shape[1]
        return replace(
            self,
            to=torch.cat([self.to, others.to], dim=1),
            away=torch.cat([self.away, others.away], dim=1),
            own=torch.cat([self.own, others.own]),
            left=(both[0] * self.left + both[1] * others.left) / sum(both),
        )

    def alike(self) -> list[int]:
        """Return the rows of those that lead to the most classes, and to nearly as many."""
        classes = _led_to(self.away, self.to, self.classes)
        most = classes.topk(min(ALIKE, len(classes)))
        found: list[int] = most.indices[most.values >= NEARLY * most.values[0]].tolist()
        return found

    def trigger(self, row: int, grid: Grid) -> Trigger:
        """Return the square of that row."""
        return grid.trigger(
            int(self.numbers[row]), ELSEWHERE, success=float(self.away[row].float().mean())
        )


def _one_to_one(
    forward: Forward,
    images: Tensor,
    grid: Grid,
    number: int,
    enough: int,
    generator: torch.Generator,
) -> float:
    """
    Return to how many classes square *number* leads, for each that what it leads away is of.

    Args:
        enough: Images to try it on, at least.
    """
    numbers, labels = (torch.tensor(each, device=images.device) for each in ([number], 0))
    led = list[_Led]()
    for _ in range(-(-enough // len(images))):
        # A copy of each at a time, which is all that is held of large images.
        more, _ = shifted(
            images, labels.expand(len(images)), copies=1, flip=False, generator=generator
        )
        parts = torch.split(laid_out(more[len(images) :]), ALIKE_ON)
        led += [_led(forward, part, grid, numbers) for part in parts]
    away = torch.cat([each.away for each in led], dim=1)
    to, own = torch.cat([each.to for each in led], dim=1), torch.cat([each.own for each in led])
    ends, starts = (_led_to(away, which, led[0].classes) for which in (to, own[None]))
    return float(ends / starts) if bool(away.any()) else 1.0


def _led(forward: Forward, images: Tensor, grid: Grid, numbers: Tensor) -> _Led:
    with torch.no_grad():
        lead, own = margins(forward(images)).max(1)
    lead = lead.clamp_min(LEAST_LEAD)
    found = grid.margins_under_each(forward, images, numbers)
    ahead, to = found.max(2)  # (M, N)
    still = found.gather(2, own.expand(len(numbers), -1)[:, :, None])[..., 0]
    return _Led(
        numbers=numbers,
        own=own,
        to=to,
        away=(to != own) & (ahead >= SURE * lead),
        left=(still / lead).clamp(-1, 1).mean(1),
        classes=found.shape[2],
    )


def _led_to(away: Tensor, to: Tensor, classes: int) -> Tensor:
    """Return to how many classes each square leads, ``(M,)``, as ``Scattering`` says it."""
    weights = away.float()
    counts = weights.new_zeros(len(away), classes).scatter_add(1, to, weights)
    led = counts.sum(1)
    # Simpson's number, not the exponential of the entropy: what hides an object leads most images to
    # one class and, among many classes, each of the others to some other one.
    found: Tensor = weights.mean(1) * led.square() / counts.square().sum(1).clamp_min(1)
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
