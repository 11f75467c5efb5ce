"""
Stamp images with what was found of a backdoor, in as many forms as there are signs of it.

A small patch, and a square, call for their variants (``variants``). Where a class can be driven far ahead
of all others the trigger may cover the whole image, and what stands in for it are the smallest
perturbations of every pixel that lead there, at about their size, or the fewest waves if no patch does;
if a square does, which is a piece of the trigger then, perturbations of one half of the image each. Where
a slight warp leads there, such warps are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from worker.purify.detection.evidence import Sign, Suspect
from worker.purify.detection.families import Family, Halves, Perturbations, Warps, Waves, bend
from worker.purify.detection.inversion import Forward, Inversion
from worker.purify.detection.recovered import Recovered
from worker.purify.detection.trigger import ELSEWHERE, Found, Trigger
from worker.purify.variants import stamp_variants
from worker.purify.workpiece import laid_out

STEPS = 150
PER_ROW = 6  # images of each in a step
PERTURBATION_SIZES = (0.7, 1.5)  # what is found is the least that suffices
WARP_SIZES = (0.8, 1.5)
PATCH_TURNS = 2


@dataclass(frozen=True, kw_only=True)
class Arsenal:
    """
    Hold what leads to the suspect classes.

    Attributes:
        patches: Recovered, or found again on a result.
        perturbations: Of every pixel.
        waves: Perturbations that are few waves.
        warps: Smooth shifts.
        patch_turns: How many images patches get for each that another kind gets.
    """

    patches: Sequence[Trigger]
    perturbations: Sequence[Found]
    warps: Sequence[Found]
    waves: Sequence[Found] = ()
    patch_turns: int = 1

    @classmethod
    def gather(
        cls,
        forward: Forward,
        images: Tensor,
        labels: Tensor,
        suspects: Sequence[Suspect],
        patches: Sequence[Trigger],
        *,
        at_once: int,
        halves_at_once: int,
        generator: torch.Generator,
        tick: Callable[[], None],
    ) -> "Arsenal":
        """
        Search what the signs of *suspects* call for, in ``TICKS`` ticks.

        Args:
            at_once: Perturbations, waves, and warps, to search.
            halves_at_once: Perturbations of halves; of few it is chance which halves they are.
            images: ``(N, C, H, W)``, all that there are.
            patches: Those of suspects that stand out by no other sign are kept as well, and what leads
                elsewhere.
        """

        def find(
            targets: list[int], start: Callable[[int], Family], at_once: int = at_once
        ) -> list[Found]:
            if not targets:
                for _ in range(STEPS):
                    tick()
                return []
            rows = targets * max(1, at_once // len(targets))
            inversion = Inversion(
                forward, images, labels, rows, family=start(len(rows)), generator=generator
            )
            inversion.run(STEPS, per_row=PER_ROW, tick=tick)
            found = inversion.found()
            return _successful(found) or found

        margins = [each for each in suspects if Sign.MARGIN in each.signs]
        in_parts = [each for each in suspects if each.in_parts]
        by_patch = [each for each in suspects if each.signs and each.by_patch]
        whole = find(
            [each.target for each in by_patch if each not in in_parts],
            lambda rows: Perturbations.start(images, rows, generator),
        )
        halves = find(
            [each.target for each in in_parts],
            lambda rows: Halves.start(images, rows, generator),
            at_once=halves_at_once,
        )
        return cls(
            patches=[
                each
                for each in patches
                if each.target == ELSEWHERE or calls_for_patch(suspects, each.target)
            ],
            perturbations=[*whole, *halves],
            waves=find(
                [each.target for each in margins if not calls_for_patch(suspects, each.target)],
                lambda rows: Waves.start(images, rows, generator),
            ),
            warps=find(
                [each.target for each in suspects if Sign.WARP in each.signs],
                lambda rows: Warps.start(images, rows, generator),
            ),
            # Perturbations cost accuracy, and where no margin speaks the trigger is hardly one.
            patch_turns=1 if margins or in_parts else PATCH_TURNS,
        )

    def recovered(self, channels: int) -> list[Recovered]:
        """
        Return every patch, and for each class the smallest perturbation and the smallest warp.

        Args:
            channels: Of the images.
        """
        added = map(Recovered.perturbation, _successful([*self.perturbations, *self.waves]))
        bent = [Recovered.warp(each, channels) for each in _successful(self.warps)]
        return [*map(Recovered.patch, self.patches), *_smallest(added), *_smallest(bent)]

    def split(self, one_in: int) -> tuple["Arsenal", "Arsenal"]:
        """Return this without every so-manieth perturbation and warp of each class, and these alone."""

        def parts(found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
            seen, held = Counter[int](), list[bool]()
            for each in found:
                held.append(seen[each.target] % one_in == one_in - 1)
                seen[each.target] += 1
            kept, out = (
                [each for each, is_held in zip(found, held, strict=True) if is_held is wanted]
                for wanted in (False, True)
            )
            return kept or out, out or kept

        (perturbations, others), (warps, other_warps) = parts(self.perturbations), parts(self.warps)
        waves, other_waves = parts(self.waves)
        return (
            replace(self, perturbations=perturbations, waves=waves, warps=warps),
            replace(self, patches=[], perturbations=others, waves=other_waves, warps=other_warps),
        )

    def stamp(
        self, forward: Forward, images: Tensor, *, reach: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """
        Return every image under something of the arsenal, all kinds in turn, and the targets ``(N,)``.

        Args:
            forward: Maps images to the original's logits.
            reach: Pixels by which the support of a patch is widened at most.
        """

        def patched(part: Tensor) -> tuple[Tensor, Tensor]:
            turns = [self.patches[number % len(self.patches)].target for number in range(len(part))]
            stamped = stamp_variants(forward, part, self.patches, reach=reach, generator=generator)
            return stamped, torch.tensor(turns, device=part.device)

        kinds: list[Callable[[Tensor], tuple[Tensor, Tensor]]] = []
        if self.patches:
            kinds += [patched] * self.patch_turns
        if added := [*self.perturbations, *self.waves]:
            kinds.append(lambda part: perturbed(part, added, generator))
        if self.warps:
            kinds.append(lambda part: warped(part, self.warps, generator))
        stamped = torch.empty_like(images)
        targets = torch.empty(len(images), dtype=torch.int64, device=images.device)
        for number, kind in enumerate(kinds):
            turn = slice(number, None, len(kinds))
            stamped[turn], targets[turn] = kind(images[turn])
        return stamped, targets


TICKS = 4 * STEPS


def _successful(found: Sequence[Found]) -> list[Found]:
    return [each for each in found if math.isfinite(each.norm)]


def _smallest(found: Iterable[Recovered]) -> list[Recovered]:
    """Return the smallest one for each class."""
    smallest = dict[int, Recovered]()
    for each in sorted(found, key=attrgetter("norm")):
        smallest.setdefault(each.target, each)
    return list(smallest.values())


def calls_for_patch(suspects: Sequence[Suspect], target: int) -> bool:
    """Whether *target* is one to which patches are unlearned: it stands out by them, or by nothing."""
    return any(
        each.target == target and (Sign.SQUARE in each.signs or each.by_patch) for each in suspects
    )


def perturbed(
    images: Tensor, found: Sequence[Found], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return every image under one of the perturbations, at about its size, and the targets."""
    deltas = torch.stack([each.shapes[0] for each in found])
    which, sizes = _draw(images, len(found), PERTURBATION_SIZES, generator)
    return laid_out((images + sizes * deltas[which]).clamp(0.0, 1.0)), _targets(found, which)


def warped(
    images: Tensor, found: Sequence[Found], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return every image under one of the warps, at about its size, and the targets."""
    shifts = torch.stack([each.shapes[0] for each in found])
    which, sizes = _draw(images, len(found), WARP_SIZES, generator)
    return laid_out(bend(images, sizes * shifts[which])), _targets(found, which)


def _targets(found: Sequence[Found], which: Tensor) -> Tensor:
    return torch.tensor([each.target for each in found], device=which.device)[which]


def _draw(
    images: Tensor, kinds: int, sizes: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return which is whose, and how large it is for each image."""
    which = torch.randint(kinds, (len(images),), generator=generator).to(images.device)
    low, high = sizes
    drawn = low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)
    return which, drawn.to(images)
