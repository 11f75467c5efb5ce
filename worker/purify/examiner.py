"""
Search a model for signs of a backdoor, and say what is left of it on what is made of the model.

Everything that ``auto`` decides by comes from here, and nothing here sees a true trigger, a target class
or the success of an attack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn

from worker.purify import arsenal as arsenals
from worker.purify import margins, squares
from worker.purify.arsenal import Arsenal, calls_for_patch, perturbed, warped
from worker.purify.batch_norm import absorb_batch_norms
from worker.purify.evidence import Evidence, Sign, judge, suspects
from worker.purify.families import Patches
from worker.purify.inversion import Forward, Found, Inversion
from worker.purify.margins import largest_margins
from worker.purify.precision import Precision, autocast_type
from worker.purify.search import (
    OPENNESS,
    WARP_STEPS,
    search,
    search_again,
    smallest_warps,
    ticks,
    worst_warp,
)
from worker.purify.squares import Squares, best_squares
from worker.purify.trigger import Field, Trigger
from worker.purify.variants import stamp_variants
from worker.purify.verdict import Verdict
from worker.purify.workpiece import Workpiece, laid_out

MIN_PATCHES = 3  # per trigger and step of a search for the suspects alone
FRESH_PATCHES_PER_STEP = 32
CHUNK = 256
EASY_FROM = 0.4  # index, from which on a fresh patch is unlearned as well
HARDLY_LARGER = 1.5

AT_ONCE, HELD_OUT_ONE_IN = 20, 5  # perturbations and warps, on the original
AT_ONCE_AGAIN = 8  # on a result
PROBE_IMAGES = 8

# Of the mixed images more change their class than of real ones: docs/decisions/0005-auto.md.
BORDERLINE = 0.5


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """
    Hold one result and what speaks for it.

    Attributes:
        strength: Weight of the stamped images against the clean ones; 0 is the model as it came.
        agreement: Share of held-out images, mixed of the samples, that get the original's class.
        residual: What triggers still achieve; ``Examiner.residual`` says how it is measured.
        values: Its tensors that differ from the original's.
    """

    strength: float
    agreement: float
    residual: float
    values: dict[str, Tensor]

    @property
    def score(self) -> float:
        """Fidelity, as far as it can be seen without the attack."""
        return (1 - BORDERLINE * (1 - self.agreement)) * (1 - self.residual)


UNCHANGED = Candidate(strength=0.0, agreement=1.0, residual=1.0, values={})


@dataclass(frozen=True, kw_only=True)
class Stamped:
    """
    Hold held-out images under one thing that leads to a class.

    Attributes:
        target: That class.
        images: ``(n, C, H, W)``.
        control: The same images under something random of the same kind and size.
        stronger: Whether what is stamped is stronger than a trigger would be.
    """

    target: int
    images: Tensor
    control: Tensor
    stronger: bool


@dataclass(frozen=True, kw_only=True)
class Trials:
    """
    Held-out images to try every candidate on.

    Attributes:
        images: ``(N, C, H, W)``, clean.
        before: The original's answers to these.
        stamped: Parts of them, one for everything that leads to a suspect.
    """

    images: Tensor
    before: Tensor
    stamped: list[Stamped]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """
    How hard to search.

    Attributes:
        steps: For every class's patch.
        restarts: Fresh searches per suspect class on a result.
        restart_steps: Steps of each.
        reach: Pixels by which a patch's support is widened at most.
    """

    steps: int
    restarts: int
    restart_steps: int
    reach: int

    def ticks(self, image: Tensor, classes: int, rounds: int, results: int) -> int:
        """Return how often an examiner ticks that goes on for *rounds* and weighs *results*."""
        first = ticks(self.steps, classes) + self.steps + margins.ticks(classes) + WARP_STEPS
        again = self.ticks_after_verdict(image, classes, rounds, results)
        return first + squares.ticks(image, classes) + again

    def ticks_after_verdict(self, image: Tensor, classes: int, rounds: int, results: int) -> int:
        """Return how many of these come after the verdict."""
        again = arsenals.TICKS + squares.ticks(image, classes)
        return arsenals.TICKS + rounds * again + (rounds + results) * self.restart_steps


class Examiner:
    """
    Search triggers, on the model as it came and on what is made of it.

    Args:
        classes: How many the model tells apart.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step of a search.
    """

    def __init__(
        self,
        work: Workpiece,
        classes: int,
        effort: Effort,
        *,
        precision: Precision,
        generator: torch.Generator,
        tick: Callable[[], None],
    ) -> None:
        self._work, self._effort = work, effort
        self._classes, self._generator, self._tick = classes, generator, tick
        autocast = autocast_type(precision, work.images)
        self.computed_in = str(autocast or work.images.dtype).removeprefix("torch.")
        self._autocast = torch.autocast(
            work.images.device.type, dtype=autocast, enabled=autocast is not None
        )
        self._original = self._fast(work.model)
        self.evidence = self._look()
        self.suspects = suspects(self.evidence)

    def skip(self, rounds: int, results: int) -> None:
        """Count what comes after the verdict as done."""
        image, classes = self._work.images[0], self._classes
        self._pass_over(self._effort.ticks_after_verdict(image, classes, rounds, results))

    def _pass_over(self, ticks: int) -> None:
        for _ in range(ticks):
            self._tick()

    def _look(self) -> Evidence:
        """Return what speaks for a backdoor; where patches are doubtful, after a second look."""
        work, steps = self._work, self._effort.steps
        given = (self._original, work.images, work.labels)
        generator, tick = self._generator, self._tick
        found_squares = self._squares(self._original)
        largest = largest_margins(
            self._original, work.images[0], self._classes, generator=generator, tick=tick
        )
        field = search(*given, self._classes, steps=steps, generator=generator, tick=tick)

        def evidence(field: Field, warps: Sequence[float]) -> Evidence:
            return Evidence(
                squares=found_squares,
                field=field,
                margins=largest,
                warps=warps,
                worst_warp=worst_warp(work.images),
            )

        found = evidence(field, smallest_warps(field, *given, generator=generator, tick=tick))
        if judge(found) is Verdict.INCONCLUSIVE:
            field = search_again(field, *given, steps=steps, generator=generator, tick=tick)
            return evidence(field, found.warps)
        self._pass_over(steps)
        return found

    def _squares(self, forward: Forward) -> Squares:
        """Return the squares that lead furthest; what is drawn after them does not depend on them."""
        return best_squares(
            forward,
            self._work.images,
            self._classes,
            generator=self._generator.clone_state(),
            tick=self._tick,
        )

    def gather(self, images: Tensor, labels: Tensor) -> tuple[Arsenal, Arsenal]:
        """Return what leads to the suspects, found on *images*: to unlearn, and to try results on."""
        patches = [
            found.triggers[each.target]
            for each in self.suspects
            for sign, found in (
                (Sign.SQUARE, self.evidence.squares),
                (Sign.PATCH, self.evidence.field),
            )
            if sign in each.signs or (sign is Sign.PATCH and not each.signs)
        ]
        found = Arsenal.gather(
            self._original,
            images,
            labels,
            self.suspects,
            patches,
            at_once=AT_ONCE,
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
        easy = [each for each in self._afresh(result) if self._index(each) >= EASY_FROM]
        again = Arsenal.gather(
            self._fast(result),
            images,
            labels,
            self.suspects,
            [*self._squares_left(result), *easy],
            at_once=AT_ONCE_AGAIN,
            generator=self._generator,
            tick=self._tick,
        )
        return replace(
            arsenal,
            patches=[*arsenal.patches, *again.patches],
            perturbations=_with_small_ones(arsenal.perturbations, again.perturbations),
            warps=_with_small_ones(arsenal.warps, again.warps),
        )

    def _squares_left(self, result: nn.Module) -> list[Trigger]:
        """Return the squares of *result* that still lead to suspects that squares lead to."""
        targets = [each.target for each in self.suspects if Sign.SQUARE in each.signs]
        if not targets:
            self._pass_over(squares.ticks(self._work.images[0], self._classes))
            return []
        found = self._squares(self._fast(result))
        return [found.triggers[target] for target in targets if found.margins[target] > 0]

    def _index(self, patch: Trigger) -> float:
        """Return how far *patch*, found on a result, stands out among those of the original."""
        triggers = list(self.evidence.field.triggers)
        triggers[patch.target] = patch
        field = Field(triggers=triggers, middle=self.evidence.field.middle)
        return replace(self.evidence, field=field).index(Sign.PATCH, patch.target)

    def _afresh(self, result: nn.Module) -> list[Trigger]:
        """Return patches of *result*, from fresh starts, to the suspects that patches lead to."""
        targets = [
            each.target for each in self.suspects if calls_for_patch(self.suspects, each.target)
        ]
        if not targets:
            self._pass_over(self._effort.restart_steps)
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
        inversion.run(self._effort.restart_steps, per_row=per_row, tick=self._tick)
        return inversion.triggers()

    def stamp(self, images: Tensor, arsenal: Arsenal) -> Tensor:
        """Return every image under something of *arsenal*, all kinds in turn."""
        return arsenal.stamp(
            self._original, images, reach=self._effort.reach, generator=self._generator
        )

    def trials(self, held_out: Tensor, arsenal: Arsenal, fresh: Arsenal) -> Trials:
        """
        Return what to try every candidate on.

        Args:
            arsenal: What is unlearned; of its patches fresh variants are made.
            fresh: Perturbations and warps that are not unlearned.
        """
        number = 0

        def part(of: int) -> Tensor:
            """Return the next share of the images, one at least."""
            nonlocal number
            number += 1
            return held_out[(number - 1) % of % len(held_out) :: of]

        stamped = [self._patched(part(len(arsenal.patches)), each) for each in arsenal.patches]
        for kind, move in ((fresh.perturbations, perturbed), (fresh.warps, warped)):
            stamped += [
                self._moved(held_out, [each for each in kind if each.target == target], move)
                for target in dict.fromkeys(each.target for each in kind)
            ]
        return Trials(
            images=held_out, before=_predictions(self._original, held_out), stamped=stamped
        )

    def weigh(self, result: nn.Module, strength: float, trials: Trials) -> Candidate:
        """Return *result* with what speaks for it."""
        answers = _predictions(self._fast(result), trials.images)
        return Candidate(
            strength=strength,
            agreement=float((answers == trials.before).float().mean()),
            residual=self.residual(result, trials),
            values=_changes(self._work.model, result),
        )

    def residual(self, result: nn.Module, trials: Trials) -> float:
        """
        Return what triggers still achieve on *result*, in [0, 1].

        It is the largest of two: the success, on held-out images, of fresh variants of what was
        unlearned, less that of something random of the same size, for patches squared since variants
        of these are stronger than a trigger; and the highest index of fresh patches, as a share of the
        first one's.
        """
        forward = self._fast(result)
        left = [0.0]
        for each in trials.stamped:
            excess = _success(forward, each.images, each.target) - _success(
                forward, each.control, each.target
            )
            left.append(max(0.0, excess) ** (2 if each.stronger else 1))
        for patch in self._afresh(result):
            first = self.evidence.index(Sign.PATCH, patch.target)
            if first > 0:
                left.append(self._index(patch) / first)
        return min(1.0, max(left))

    def _patched(self, images: Tensor, patch: Trigger) -> Stamped:
        noise = torch.rand(patch.pattern.shape, generator=self._generator).to(images)
        return Stamped(
            target=patch.target,
            images=stamp_variants(
                self._original,
                images,
                [patch],
                reach=self._effort.reach,
                generator=self._generator,
            ),
            control=laid_out(images * (1 - patch.mask) + noise * patch.mask),
            stronger=True,
        )

    def _moved(
        self,
        images: Tensor,
        found: Sequence[Found],
        move: Callable[[Tensor, Sequence[Found], torch.Generator], Tensor],
    ) -> Stamped:
        """Return *images* perturbed or warped, with the same numbers in another order as control."""

        def shuffled(each: Found) -> Found:
            (shape,) = each.shapes
            # Whole planes are turned and mirrored, so that what is smooth stays smooth.
            return replace(each, shapes=(-shape.flip(1, 2).contiguous(),))

        return Stamped(
            target=found[0].target,
            images=move(images, found, self._generator),
            control=move(images, [shuffled(each) for each in found], self._generator),
            stronger=False,
        )

    def _fast(self, model: nn.Module) -> Forward:
        """Return *model* as a function that is quick to call and to differentiate by its input."""
        work = self._work
        fast = absorb_batch_norms(model, work.inputs(work.images[:PROBE_IMAGES]))

        def forward(images: Tensor) -> Tensor:
            inputs = work.inputs(images)
            with self._autocast:
                logits: Tensor = fast(inputs)
            return logits.to(images.dtype)

        return forward


def _with_small_ones(known: Sequence[Found], found: Sequence[Found]) -> list[Found]:
    """Return *known*, and those *found* that are not much larger than the median of these."""
    norms = [each.norm for each in known if isfinite(each.norm)]
    largest = HARDLY_LARGER * median(norms) if norms else 0.0
    return [*known, *(each for each in found if each.norm <= largest)]


def _success(forward: Forward, images: Tensor, target: int) -> float:
    return float((_predictions(forward, images) == target).float().mean())


def _predictions(forward: Forward, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([forward(chunk).argmax(dim=1) for chunk in torch.split(images, CHUNK)])


def _changes(original: nn.Module, result: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of *result* that differ, on the CPU."""
    before = dict(original.named_parameters())
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in result.named_parameters()
        if not torch.equal(before[name], parameter)
    }
