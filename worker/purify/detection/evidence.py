"""
Judge by what was searched whether a model has a backdoor.

A backdoor makes one class much easier to reach than the others, or each class the next one. The first
shows in one of four ways, and no attack that was tried shows in all: a small plain square somewhere in
the image leads there, the smallest patch that sends any image there is far smaller (Neural Cleanse), the
smallest warp is, or the class can be driven much further ahead of the others (MM-BD). In each a class's
index counts how often an ordinary class's value must be halved, or doubled, to get there: among ten
classes the median absolute deviation, which the literature counts in, is itself a matter of chance, and a
model with two small classes and eight that happen to be alike had a higher index than one with a backdoor
(docs/auto-measurements.md). The second shows where one square leads images to many classes that
others of the same place do not lead away.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import log2

from torch.nn import functional

from worker.purify.detection.margins import Margins
from worker.purify.detection.squares import Squares
from worker.purify.detection.trigger import SUCCESS, Field, Trigger, Warped
from worker.purify.detection.verdict import Verdict


class Sign(StrEnum):
    """By what a class stands out."""

    SQUARE = "square"  # a small plain one in one place leads there
    PATCH = "patch"  # a small one leads there
    MARGIN = "margin"  # it can get far ahead of the others
    WARP = "warp"  # a slight one leads there


class Reach(StrEnum):
    """How far a trigger seems to reach of which a square leads to its class."""

    SQUARE = "square"  # that alone
    PATCH = "patch"  # a patch around it
    IMAGE = "image"  # places all over the image


@dataclass(frozen=True, kw_only=True)
class Cut:
    """From which index on a sign speaks of a backdoor, and below which of a clean model."""

    backdoored_from: float
    clean_below: float


# Set on models trained for it: benchmarks/auto_verdicts.py, docs/auto-measurements.md.
CUTS: Mapping[Sign, Cut] = {
    Sign.SQUARE: Cut(backdoored_from=1.0, clean_below=0.5),
    Sign.PATCH: Cut(backdoored_from=1.3, clean_below=0.65),
    Sign.MARGIN: Cut(backdoored_from=1.3, clean_below=0.9),
    Sign.WARP: Cut(backdoored_from=1.4, clean_below=1.1),
}

# A patch with an index from here on stands out as well where it succeeds on shifted samples. One that is
# made for the very samples, as the smallest of an innocent class is, does not.
CARRIED_FROM = 1.0

# To how many classes one square leads, and to how many for each that the images come from.
SCATTERING = Cut(backdoored_from=2.6, clean_below=2.2)
ONE_TO_ONE = 0.7

# Of the furthest that a class can get ahead: from here on a square that leads there is the trigger, and
# not a piece of it.
WHOLE = 0.04

# Of a patch, more than a pixel (of 32) away from the square; and more than so many, where it is not one
# larger patch. docs/auto-measurements.md has the models that these were read off.
BESIDE = 0.2
AROUND, SPREAD = 4, 0.12

# An index says nothing where there is hardly anybody to stand out from.
MIN_CLASSES = 4

MAX_SUSPECTS = 3
NEARLY = 0.3  # below the first's index; a fifth more in norm
LEAST_MARGIN = 1e-3  # in logits; a class that nothing leads to has none


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """
    Hold what was found of every class.

    Attributes:
        squares: The squares that lead furthest.
        field: The smallest patches.
        margins: The largest margins.
        warps: The norms of the smallest warps; ``worst_warp`` where none leads to a class. None where
            none was searched, since something else had told already.
        worst_warp: What is searched at most, in pixels.
        carried: The share of shifted samples that the patch of a class leads there, where that counts.
    """

    squares: Squares
    field: Field
    margins: Margins
    warps: Warped | None
    worst_warp: float
    carried: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.field.triggers)

    def index(self, sign: Sign, cls: int) -> float:
        """Return how far class *cls* stands out; 0 is an ordinary one."""
        match sign:
            case Sign.SQUARE:
                return self.squares.index(cls)
            case Sign.PATCH:
                return anomaly_index(self.field.triggers[cls], self.field)
            case Sign.MARGIN:
                own, ordinary = (
                    max(value, LEAST_MARGIN)
                    for value in (self.margins.largest[cls], self.margins.ordinary)
                )
                # Where not even an ordinary class gets ahead there is nothing to compare with.
                return log2(own / ordinary) if ordinary > LEAST_MARGIN else 0.0
            case Sign.WARP:
                if self.warps is None:
                    return 0.0
                return log2(self.warps.ordinary / self.warps.norms[cls])

    def reach(self, cls: int) -> Reach:
        """
        Return how far the trigger of *cls* seems to reach beyond the squares that were tried.

        It does where the largest lead there furthest, and a patch that is out of the ordinary lies beside
        them: around them if it is a larger patch, or all over the image.
        """
        square, patch = self.squares.triggers[cls].mask, self.field.triggers[cls].mask
        if not self.squares.grid.is_largest(square) or not self.stands_out(Sign.PATCH, cls):
            return Reach.SQUARE

        def further_than(pixels: int) -> float:
            """Return which share of the patch lies further away than so many pixels (of 32)."""
            away = pixels * self.squares.grid.step
            around = functional.max_pool2d(square[None], 2 * away + 1, stride=1, padding=away)[0]
            return float((patch * (1 - around)).sum() / patch.sum())

        if further_than(1) <= BESIDE:
            return Reach.SQUARE
        return Reach.IMAGE if further_than(AROUND) > SPREAD else Reach.PATCH

    def stands_out(self, sign: Sign, cls: int) -> bool:
        """Whether *cls* is that of a backdoor, by this sign."""
        index = self.index(sign, cls)
        if sign is Sign.PATCH and self.carried.get(cls, 0.0) >= SUCCESS:
            return index >= min(CARRIED_FROM, CUTS[sign].backdoored_from)
        return index >= CUTS[sign].backdoored_from

    @property
    def doubtful(self) -> list[int]:
        """The classes that stand out further than one of a clean model does, the furthest first."""

        def share(cls: int) -> float:
            return max(self.index(sign, cls) / CUTS[sign].clean_below for sign in Sign)

        found = [
            cls
            for cls in range(self.classes)
            if any(self.index(sign, cls) >= CUTS[sign].clean_below for sign in Sign)
        ]
        return sorted(found, key=lambda cls: -share(cls))


def whole(squares: Squares, margins: Margins) -> list[int]:
    """Return the classes whose squares are the trigger, the most suspicious first."""
    out = [
        cls
        for cls in range(len(squares.triggers))
        if squares.index(cls) >= CUTS[Sign.SQUARE].backdoored_from
        and squares.margins[cls] >= WHOLE * margins.largest[cls]
    ]
    return sorted(out, key=lambda cls: -squares.index(cls))


def scatters(squares: Squares) -> bool:
    """Whether a square leads each class to another one."""
    return scattered(squares) >= SCATTERING.backdoored_from


def scattered(squares: Squares) -> float:
    """Return to how many classes one square leads; 0 where it leads several to the same one."""
    found = squares.scattering
    return found.classes if found.one_to_one >= ONE_TO_ONE else 0.0


def has_told(evidence: Evidence) -> bool:
    """
    Whether the class is known without its warp.

    That is where a square is the trigger, or leads each class to another one, or where two other signs
    agree, a margin one of them. On models on which warps were searched nevertheless these were all
    ordinary (docs/auto-measurements.md).
    """
    agreed = any(
        evidence.stands_out(Sign.MARGIN, cls)
        and (evidence.stands_out(Sign.PATCH, cls) or evidence.stands_out(Sign.SQUARE, cls))
        for cls in range(evidence.classes)
    )
    return agreed or scatters(evidence.squares) or bool(whole(evidence.squares, evidence.margins))


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """
    Name a class to make harder to reach.

    Attributes:
        signs: Those by which it stands out; none where it is only the first of all.
        beyond_square: Whether it stayed near when its square was unlearned.
    """

    target: int
    signs: frozenset[Sign]
    beyond_square: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether the square that leads there is a piece of the trigger, or not all of it."""
        return Sign.SQUARE in self.signs and (Sign.MARGIN in self.signs or self.beyond_square)

    @property
    def by_patch(self) -> bool:
        """
        Whether it is the smallest patch that leads there, for want of anything else if it has no sign.

        Where a slight warp does, a small patch is a by-product of the same trigger.
        """
        return not self.signs or (Sign.PATCH in self.signs and Sign.WARP not in self.signs)


def anomaly_index(trigger: Trigger, field: Field) -> float:
    """Return how often the norm of an ordinary class must be halved to come to the trigger's."""
    return log2(field.ordinary / trigger.norm)


def judge(evidence: Evidence) -> Verdict:
    """
    Return what all signs say together: any speaks of a backdoor, and all of a clean model.

    A square that leads images to many classes speaks as well, though for none of them.
    """
    successful = [trigger for trigger in evidence.field.triggers if trigger.success > 0]
    if evidence.classes < MIN_CLASSES or not successful:
        return Verdict.INCONCLUSIVE
    classes = range(evidence.classes)
    if scatters(evidence.squares) or any(
        evidence.stands_out(sign, cls) for sign in Sign for cls in classes
    ):
        return Verdict.BACKDOORED
    if scattered(evidence.squares) >= SCATTERING.clean_below:
        return Verdict.INCONCLUSIVE
    return Verdict.INCONCLUSIVE if evidence.doubtful else Verdict.CLEAN


def suspects(evidence: Evidence) -> list[Suspect]:
    """
    Return the classes to make harder to reach, the most suspicious first.

    A square that is the trigger speaks first, then margins and warps: where these and a patch, or the
    square that is a piece of something, named different classes, they were right on every model that
    it was tried on. Without these, squares of any kind do, and then the smallest patch, whatever the
    verdict. Up to two more must stand out by themselves and nearly as far: to unlearn the patch of an
    innocent class costs accuracy, since such a patch is made of what the class looks like. There are
    none where one square leads each class to another one: that square is unlearned, whatever class
    stands out beside.
    """
    if scatters(evidence.squares):
        return []
    named = (
        _nearly_as_far(evidence, Sign.SQUARE, whole(evidence.squares, evidence.margins))
        or [*_named(evidence, Sign.MARGIN), *_named(evidence, Sign.WARP)]
        or _named(evidence, Sign.SQUARE)
        or _named(evidence, Sign.PATCH)
        or [min(range(evidence.classes), key=_norm(evidence.field))]
    )
    return [
        Suspect(
            target=cls, signs=frozenset(sign for sign in Sign if evidence.stands_out(sign, cls))
        )
        for cls in list(dict.fromkeys(named))[:MAX_SUSPECTS]
    ]


def _named(evidence: Evidence, sign: Sign) -> list[int]:
    """Return the classes that stand out by *sign*, nearly as far as the first of them."""
    out = [cls for cls in range(evidence.classes) if evidence.stands_out(sign, cls)]
    ranked = sorted(out, key=lambda cls: -evidence.index(sign, cls))
    return _nearly_as_far(evidence, sign, ranked)


def _nearly_as_far(evidence: Evidence, sign: Sign, ranked: Sequence[int]) -> list[int]:
    return [
        cls
        for cls in ranked[:MAX_SUSPECTS]
        if evidence.index(sign, cls) >= evidence.index(sign, ranked[0]) - NEARLY
    ]


def _norm(field: Field) -> Callable[[int], float]:
    return lambda cls: field.triggers[cls].norm
