"""
Search a model for signs of a backdoor, and say what is left of it on what is made of the model.

Everything that ``auto`` decides by comes from here, and nothing here sees a true trigger, a target class
or the success of an attack.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn

from worker.purify import arsenal as arsenals
from worker.purify.arsenal import Arsenal, calls_for_patch, perturbed, warped
from worker.purify.batch_norm import absorb_batch_norms
from worker.purify.cutting import cut_before
from worker.purify.detection.evidence import (
    CUTS,
    Reach,
    Sign,
    scatters,
    suspects,
    whole,
)
from worker.purify.detection.families import Patches
from worker.purify.detection.inversion import Forward, Inversion, pace_for
from worker.purify.detection.look import look, ticks
from worker.purify.detection.nearness import nearness
from worker.purify.detection.recovered import Recovered
from worker.purify.detection.search import OPENNESS
from worker.purify.detection.squares import still_leading
from worker.purify.detection.trigger import ELSEWHERE, Field, Found, Trigger
from worker.purify.in_place import elus_in_place
from worker.purify.pooling import pool_first
from worker.purify.precision import Precision, autocast_type
from worker.purify.rewriting import Pairs, Rewritten
from worker.purify.variants import stamp_variants
from worker.purify.weighing import Candidate, Stamped, Trials, Unlearned, lead, logits
from worker.purify.workpiece import Workpiece, in_parts, laid_out

MIN_PATCHES = 3  # per trigger and step of a search for the suspects alone
FRESH_PATCHES_PER_STEP = 32
EASY_FROM = 0.4  # index, from which on a fresh patch is unlearned as well
HARDLY_LARGER = 1.5

# What may be paid for what nothing that was found looks like: of the answers, so many; twice as many
# where only a piece of the trigger was found.
UNSEEN = 0.005

SETTLED = 0.05  # residual, from which on a square is not all that there is

AT_ONCE, HELD_OUT_ONE_IN = 20, 5  # perturbations, waves and warps, on the original
HALVES_AT_ONCE = 48  # perturbations of halves, on the original
AT_ONCE_AGAIN = 8  # on a result
PROBE_IMAGES = 8
# What tells whether a suspect stays near without its square: docs/auto-measurements.md.
NEAR, NO_FURTHER = 1.2, 0.7  # index on a result, and its share of that on the original


@dataclass(frozen=True, kw_only=True)
class Effort:
    """
    How hard to search.

    Attributes:
        steps: For every class's patch.
        restarts: Fresh searches per suspect class on a result.
        restart_steps: Steps of each.
        reach: Pixels by which a patch's support is widened at most.
        rounds: How often it is searched on what was made of the model.
        results: How many of these are weighed at most.
    """

    steps: int
    restarts: int
    restart_steps: int
    reach: int
    rounds: int
    results: int

    def ticks(self, image: Tensor, classes: int) -> int:
        """Return how often an examiner ticks."""
        again = (self.rounds + self.results) * self.restart_steps + 2 * arsenals.STEPS
        return ticks(image, classes, self.steps) + (1 + self.rounds) * arsenals.TICKS + again


class Examiner:
    """
    Search triggers, on the model as it came and on what is made of it.

    Args:
        classes: How many the model tells apart.
        layers: In which results differ from it.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step of a search.
    """

    def __init__(
        self,
        work: Workpiece,
        classes: int,
        effort: Effort,
        *,
        layers: Sequence[str],
        precision: Precision,
        generator: torch.Generator,
        tick: Callable[[], None],
    ) -> None:
        self._work, self._effort = work, effort
        self._classes, self._generator = classes, generator
        self._ticks_left = effort.ticks(work.images[0], classes)

        def counted() -> None:
            self._ticks_left -= 1
            tick()

        self._tick = counted
        autocast = autocast_type(precision, work.images)
        self.computed_in = str(autocast or work.images.dtype).removeprefix("torch.")
        self._autocast = torch.autocast(
            work.images.device.type, dtype=autocast, enabled=autocast is not None
        )
        absorbed = self._absorbed(work.model)
        self._original = self._of_images(absorbed)
        self._cut = cut_before(absorbed, layers, work.inputs(work.images[:PROBE_IMAGES]))
        self.evidence = look(
            self._original,
            work.images,
            work.labels,
            classes,
            steps=effort.steps,
            generator=generator,
            tick=counted,
        )
        self.suspects = suspects(self.evidence)

    def finish(self) -> None:
        """Count what was not searched as done."""
        self._pass_over(self._ticks_left)

    def _pass_over(self, ticks: int) -> None:
        for _ in range(ticks):
            self._tick()

    @property
    def is_local(self) -> bool:
        """Whether all that was found lies in one place of the image."""
        return all(
            calls_for_patch(self.suspects, each.target) and Sign.WARP not in each.signs
            for each in self.suspects
        )

    @property
    def exact(self) -> Arsenal | None:
        """
        What may suffice, where squares are triggers, or patches around them.

        What goes beyond these makes a class harder to reach than it was without a backdoor, and costs
        accuracy.
        """
        found = self.evidence.squares
        named = whole(found, self.evidence.margins)
        if scatters(found):
            # There may be two attacks.
            others = [square for cls in named for square in found.leading_to(cls)]
            triggers = [found.scattering.trigger, *found.scattering.alike, *others]
        else:
            if not set(named).issuperset(each.target for each in self.suspects):
                return None
            triggers = [
                square for each in self.suspects for square in found.leading_to(each.target)
            ]
            triggers += [
                self.evidence.field.triggers[each.target]
                for each in self.suspects
                if self.evidence.reach(each.target) is Reach.PATCH
            ]
        return Arsenal(patches=triggers, perturbations=[], warps=[])

    @property
    def has_pieces(self) -> bool:
        """Whether squares lead to suspects that are not the trigger."""
        if self.exact is None:
            return any(Sign.SQUARE in each.signs for each in self.suspects)
        return any(each.beyond_square for each in self.suspects)

    @property
    def only_by_patches(self) -> bool:
        """Whether all suspects stand out by their patch at most."""
        return bool(self.suspects) and all(each.signs <= {Sign.PATCH} for each in self.suspects)

    @property
    def _spent(self) -> float:
        """What of the score may be paid for what the evidence does not show."""
        return UNSEEN * (1 + self.has_pieces)

    @property
    def reaches_beyond_patches(self) -> bool:
        """Whether a suspect's trigger seems to be more than a square or a patch around it."""
        return any(
            each.beyond_square
            or (Sign.SQUARE in each.signs and self.evidence.reach(each.target) is Reach.IMAGE)
            for each in self.suspects
        )

    @property
    def by_products(self) -> list[Recovered]:
        """Return the patches that led to suspects where a slight warp does: seen, and not unlearned."""
        return [
            Recovered.patch(self.evidence.field.triggers[each.target])
            for each in self.suspects
            if Sign.PATCH in each.signs and not each.by_patch
        ]

    def gather(self, images: Tensor, labels: Tensor) -> tuple[Arsenal, Arsenal]:
        """Return what leads to the suspects, found on *images*: to unlearn, and to try results on."""
        squares_found = [
            square
            for each in self.suspects
            if Sign.SQUARE in each.signs
            for square in self.evidence.squares.leading_to(each.target)
        ]
        patches = [
            self.evidence.field.triggers[each.target] for each in self.suspects if each.by_patch
        ]
        found = Arsenal.gather(
            self._original,
            images,
            labels,
            self.suspects,
            [*squares_found, *patches],
            at_once=AT_ONCE,
            halves_at_once=HALVES_AT_ONCE,
            generator=self._generator,
            tick=self._tick,
        )
        return found.split(HELD_OUT_ONE_IN)

    def with_what_is_still_easy(
        self, arsenal: Arsenal, result: nn.Module, images: Tensor, labels: Tensor
    ) -> Arsenal:
        """
        Return *arsenal* with what leads to suspects on *result*, found on *images*.

        Patches count that are much smaller than ordinary, and of the rest what is hardly larger than it
        was on the original.
        """
        targets = [
            each.target for each in self.suspects if calls_for_patch(self.suspects, each.target)
        ]
        easy = [each for each in self._afresh(result, targets) if self._index(each) >= EASY_FROM]
        again = Arsenal.gather(
            self._fast(result),
            images,
            labels,
            self.suspects,
            [*self._squares_left(result), *easy],
            at_once=AT_ONCE_AGAIN,
            halves_at_once=AT_ONCE_AGAIN,
            generator=self._generator,
            tick=self._tick,
        )
        return replace(
            arsenal,
            patches=[*arsenal.patches, *again.patches],
            perturbations=_with_small_ones(arsenal.perturbations, again.perturbations),
            waves=_with_small_ones(arsenal.waves, again.waves),
            warps=_with_small_ones(arsenal.warps, again.warps),
        )

    def _squares_left(self, result: nn.Module) -> list[Trigger]:
        """Return the squares of *result* that still lead to suspects that squares lead to."""
        forward, images = self._fast(result), self._work.images
        left = [
            still_leading(
                self.evidence.squares, forward, images, each.target, generator=self._generator
            )
            for each in self.suspects
            if Sign.SQUARE in each.signs
        ]
        return [each for each in left if each is not None]

    def _index(self, patch: Trigger) -> float:
        """Return how far *patch*, found on a result, stands out among those of the original."""
        triggers = list(self.evidence.field.triggers)
        triggers[patch.target] = patch
        field = Field(triggers=triggers, middle=self.evidence.field.middle)
        return replace(self.evidence, field=field).index(Sign.PATCH, patch.target)

    def _afresh(self, result: nn.Module, targets: Sequence[int]) -> list[Trigger]:
        """Return patches of *result*, from fresh starts, to these classes."""
        if not targets:
            return []
        rows = [target for target in targets for _ in range(self._effort.restarts)]
        starts = [OPENNESS[number % len(OPENNESS)] for number in range(self._effort.restarts)]
        family = Patches.start(self._work.images, starts * len(targets), self._generator)
        inversion = Inversion(
            self._fast(result),
            self._work.images,
            self._work.labels,
            rows,
            family=family,
            generator=self._generator,
        )
        per_row = max(MIN_PATCHES, FRESH_PATCHES_PER_STEP // len(rows))
        inversion.run(
            self._effort.restart_steps,
            per_row=per_row,
            tick=self._tick,
            pace=pace_for(self._work.images[0]),
        )
        return inversion.triggers()

    def pairs(self, images: Tensor, arsenal: Arsenal) -> Pairs:
        """Return the images, and each of them under something of *arsenal*, all kinds in turn."""
        stamped, targets = arsenal.stamp(
            self._original, images, reach=self._effort.reach, generator=self._generator
        )
        return Pairs(clean=images, stamped=stamped, targets=targets)

    def trials(
        self, held_out: Tensor, like_samples: Tensor, arsenal: Arsenal, fresh: Arsenal
    ) -> Trials:
        """
        Return what to try every candidate on.

        Args:
            held_out: Images near the borders between classes.
            like_samples: Others.
            arsenal: What is unlearned; of its patches fresh variants are made.
            fresh: Perturbations and warps that are not unlearned.
        """
        patches = len(arsenal.patches)
        stamped = [
            # The next share of the images for each, one at least.
            self._patched(images[number % len(images) :: patches], patch)
            for number, patch in enumerate(arsenal.patches)
            # Near the borders anything leads elsewhere, and a trigger no more often than its control.
            for images in [like_samples if patch.target == ELSEWHERE else held_out]
        ]
        # Where a square is the trigger, perturbations show how near the class is, not what is left.
        exact = {
            each.target
            for each in self.suspects
            if Sign.SQUARE in each.signs and not each.beyond_square
        }
        perturbations = [
            each for each in (*fresh.perturbations, *fresh.waves) if each.target not in exact
        ]
        for kind, move in ((perturbations, perturbed), (fresh.warps, warped)):
            stamped += [
                self._moved(held_out, [each for each in kind if each.target == target], move)
                for target in dict.fromkeys(each.target for each in kind)
            ]
        answers = logits(self._original, like_samples)
        return Trials(
            images=self._features(held_out),
            before=logits(self._original, held_out),
            leads=lead(answers, answers.argmax(dim=1)),
            suspects=[each.target for each in self.suspects],
            stamped=[
                replace(
                    each,
                    bare=self._features(each.bare),
                    images=self._features(each.images),
                    control=self._features(each.control),
                )
                for each in stamped
            ],
        )

    def weigh(self, result: Rewritten, trials: Trials, unlearned: Unlearned) -> Candidate:
        """Return *result* with what speaks for it."""
        forward = self._forward(self._cut.tail(self._absorbed(result.model)))
        agreement, lost = trials.agreement_and_loss(forward)
        return Candidate(
            strength=result.strength,
            overshoot=result.overshoot,
            unlearned=unlearned,
            agreement=agreement,
            lost=lost,
            residual=trials.residual(forward),
            values=_changes(self._work.model, result.model),
        )

    def furthest(self, candidates: Sequence[Candidate]) -> Candidate:
        """
        Return the one of *candidates* of one strength that goes furthest without being worse.

        Args:
            candidates: What goes further comes later.
        """
        return candidates[_leaders(candidates, self._spent)[-1]]

    def best(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], Candidate]:
        """
        Return *candidates*, and the one to take, having searched patches on it afresh.

        What such a search finds can only add to a residual, so only those are searched that lead.

        Args:
            candidates: What unlearns more comes after what unlearns less.
        """
        weighed = list(candidates)
        spent = self._spent
        while unsearched := [n for n in _leaders(weighed, spent) if not weighed[n].searched]:
            weighed[unsearched[0]] = self._searched(weighed[unsearched[0]])
        return weighed, weighed[_leaders(weighed, spent)[-1]]

    def still_near(self, chosen: Candidate, images: Tensor, labels: Tensor) -> dict[int, float]:
        """
        Return the suspects that stay near without their squares, and their indices on such a result.

        A trigger that covers the image may answer to a square as well, and without it still lead there:
        the smallest perturbation that leads to its class is then much smaller than an ordinary one's, and
        hardly larger than it was.

        Args:
            chosen: A result under squares alone.
            images: To search on, ``(N, C, H, W)``, all that there are.
            labels: ``(N,)`` int64.

        Raises:
            NotFinite: The logits are not.
        """
        # What is drawn after this look does not depend on it.
        generator = self._generator.clone_state()
        near = self._nearness(self._fast(self._result(chosen)), images, labels, generator)
        if not any(index >= NEAR for index in near.values()):
            return {}
        before = self._nearness(self._original, images, labels, generator)
        return {
            target: index
            for target, index in near.items()
            if index >= max(NEAR, NO_FURTHER * before.get(target, 0.0))
        }

    def suspect_beyond_squares(self, targets: Collection[int]) -> None:
        """Take the squares that lead to *targets* for pieces of their triggers from now on."""
        self.suspects = [
            replace(each, beyond_square=each.target in targets) for each in self.suspects
        ]

    def _searched(self, candidate: Candidate) -> Candidate:
        """
        Return *candidate* with what else leads to the suspects on it.

        That is the success of the squares that still lead, and how far fresh patches stand out beyond
        what those of a clean model may, as a share of how far the first ones did.
        """
        result = self._result(candidate)
        left = [candidate.residual, *(each.success for each in self._squares_left(result))]
        ordinary = CUTS[Sign.PATCH].clean_below
        for patch in self._afresh(result, [each.target for each in self.suspects if each.by_patch]):
            first = self.evidence.index(Sign.PATCH, patch.target)
            if first > ordinary:
                left.append((self._index(patch) - ordinary) / (first - ordinary))
        return replace(candidate, residual=min(1.0, max(left)), searched=True)

    def _nearness(
        self, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[int, float]:
        """Return how near the suspects are, by the smallest perturbations that lead there."""
        return nearness(
            forward,
            images,
            labels,
            [each.target for each in self.suspects],
            self.evidence.field,
            steps=arsenals.STEPS,
            per_row=arsenals.PER_ROW,
            generator=generator,
            tick=self._tick,
        )

    def _result(self, candidate: Candidate) -> nn.Module:
        result = copy.deepcopy(self._work.model)
        result.load_state_dict(candidate.values, strict=False)
        return result

    def _patched(self, images: Tensor, patch: Trigger) -> Stamped:
        other = torch.rand(patch.pattern.shape, generator=self._generator).to(images)
        if patch.target == ELSEWHERE:
            # Of one pixel chance may make the very trigger.
            other = 1 - patch.pattern
        return Stamped(
            target=patch.target,
            bare=images,
            images=stamp_variants(
                self._original,
                images,
                [patch],
                reach=self._effort.reach,
                generator=self._generator,
            ),
            control=laid_out(images * (1 - patch.mask) + other * patch.mask),
            stronger=True,
        )

    def _moved(
        self,
        images: Tensor,
        found: Sequence[Found],
        move: Callable[[Tensor, Sequence[Found], torch.Generator], tuple[Tensor, Tensor]],
    ) -> Stamped:
        """Return the images perturbed or warped, with the same numbers in another order as control."""

        def shuffled(each: Found) -> Found:
            (shape,) = each.shapes
            # Whole planes are turned and mirrored, so that what is smooth stays smooth.
            return replace(each, shapes=(-shape.flip(1, 2).contiguous(),))

        return Stamped(
            target=found[0].target,
            bare=images,
            images=move(images, found, self._generator)[0],
            control=move(images, [shuffled(each) for each in found], self._generator)[0],
            stronger=False,
        )

    def _fast(self, model: nn.Module) -> Forward:
        """Return *model* as a function that is quick to call and to differentiate by its input."""
        return self._of_images(self._absorbed(model))

    def _of_images(self, network: nn.Module) -> Forward:
        forward, inputs = self._forward(network), self._work.inputs
        return lambda images: forward(inputs(images))

    def _absorbed(self, model: nn.Module) -> nn.Module:
        probe = self._work.inputs(self._work.images[:PROBE_IMAGES])
        return elus_in_place(pool_first(absorb_batch_norms(model, probe), probe), probe)

    def _forward(self, network: nn.Module) -> Forward:
        """Return what *network* gives, in the type of the images."""

        def forward(inputs: Tensor) -> Tensor:
            with self._autocast:
                logits: Tensor = network(inputs)
            return logits.to(self._work.images.dtype)

        return forward

    def _features(self, images: Tensor) -> Tensor:
        """Return what goes into the part of results that differs."""
        with torch.no_grad(), self._autocast:
            parts = [self._cut.head(self._work.inputs(each)) for each in in_parts(images)]
        return torch.cat(parts)


def _leaders(candidates: Sequence[Candidate], spent: float) -> tuple[int, int]:
    """Return which has the highest score, and the last, or strongest, that has at most *spent* less."""
    scores = [candidate.score for candidate in candidates]
    first = scores.index(max(scores))
    close = [n for n, score in enumerate(scores) if score >= scores[first] - spent]
    return first, close[-1]


def _with_small_ones(known: Sequence[Found], found: Sequence[Found]) -> list[Found]:
    """Return *known*, and those *found* that are not much larger than the median of these."""
    norms = [each.norm for each in known if isfinite(each.norm)]
    largest = HARDLY_LARGER * median(norms) if norms else 0.0
    return [*known, *(each for each in found if each.norm <= largest)]


def _changes(original: nn.Module, result: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of *result* that differ, on the CPU."""
    before = dict(original.named_parameters())
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in result.named_parameters()
        if not torch.equal(before[name], parameter)
    }
