"""
Search a model for triggers, and say what they still achieve on what is made of it.

Everything that ``auto`` decides by comes from here, and nothing here sees a true trigger, a target class
or the success of an attack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.purify.batch_norm import absorb_batch_norms
from worker.purify.evidence import Verdict, anomaly_index, judge, suspects
from worker.purify.inversion import Inversion
from worker.purify.precision import Precision, autocast_type
from worker.purify.search import OPENNESS, search, search_again
from worker.purify.trigger import Field, Trigger
from worker.purify.variants import perturb, stamp_variants
from worker.purify.workpiece import Workpiece, laid_out

Forward = Callable[[Tensor], Tensor]

MIN_PATCHES = 3  # per trigger and step of a search for the suspects alone
FRESH_PATCHES_PER_STEP = 32
CHUNK = 256
EASY_FROM = 0.4  # index, from which on a fresh trigger is unlearned as well
INNOCENT = 3  # classes to compare a suspect with
COVERS_ALL_FROM = 0.2  # more of the images than of an innocent class, from which on it is no chance
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
class Trials:
    """
    Held-out images to try every candidate on.

    Attributes:
        images: ``(N, C, H, W)``, clean.
        before: The original's answers to these.
        patched: Images under fresh variants of each trigger, with the trigger's class.
        control: The same images under random patches on the same masks.
    """

    images: Tensor
    before: Tensor
    patched: list[tuple[int, Tensor]]
    control: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """
    How hard to search.

    Attributes:
        steps: For every class's trigger.
        restarts: Fresh searches per suspect class on a result.
        restart_steps: Steps of each.
        reach: Pixels by which a trigger's support is widened at most.
        tau: L1 norm of perturbations of the whole image.
    """

    steps: int
    restarts: int
    restart_steps: int
    reach: int
    tau: float


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
        self._generator, self._tick = generator, tick
        autocast = autocast_type(precision, work.images)
        self.computed_in = str(autocast or work.images.dtype).removeprefix("torch.")
        self._autocast = torch.autocast(
            work.images.device.type, dtype=autocast, enabled=autocast is not None
        )
        self._original = self._fast(work.model)
        self.field = self._search(classes)
        self.suspects = suspects(self.field)
        guilty = {trigger.target for trigger in self.suspects}
        # Neither close to guilty nor hard to reach for reasons of their own.
        self._innocent = [cls for cls in self.field.middle if cls not in guilty][:INNOCENT]
        self._covers_all = self._excess(self._original, sorted(guilty)) > COVERS_ALL_FROM

    def skip(self, searches: int) -> None:
        """Count fresh searches that are not needed as done."""
        self._skip(searches * self._effort.restart_steps)

    def _skip(self, steps: int) -> None:
        for _ in range(steps):
            self._tick()

    def _search(self, classes: int) -> Field:
        """Return the smallest triggers of the original; of a doubtful one after a second look."""
        work, steps = self._work, self._effort.steps
        given = (self._original, work.images, work.labels)
        field = search(*given, classes, steps=steps, generator=self._generator, tick=self._tick)
        if judge(field) is not Verdict.INCONCLUSIVE:
            self._skip(steps)
            return field
        return search_again(field, *given, steps=steps, generator=self._generator, tick=self._tick)

    def still_easy(self, result: nn.Module) -> list[Trigger]:
        """Return fresh triggers of *result* to suspect classes that are much smaller than ordinary."""
        return [
            each for each in self._afresh(result) if anomaly_index(each, self.field) >= EASY_FROM
        ]

    def _afresh(self, result: nn.Module) -> list[Trigger]:
        """Return triggers of *result* to the suspect classes, from fresh starts."""
        restarts = range(self._effort.restarts)
        targets = [each.target for each in self.suspects for _ in restarts]
        openness = [OPENNESS[number % len(OPENNESS)] for _ in self.suspects for number in restarts]
        inversion = Inversion(
            self._fast(result),
            self._work.images,
            self._work.labels,
            targets,
            openness=openness,
            generator=self._generator,
        )
        per_row = max(MIN_PATCHES, FRESH_PATCHES_PER_STEP // len(targets))
        inversion.run(self._effort.restart_steps, per_row=per_row, tick=self._tick)
        return inversion.triggers()

    def stamp(self, images: Tensor, triggers: Sequence[Trigger]) -> Tensor:
        """
        Return every image under a variant of a trigger.

        Where the original is open to perturbations of the whole image, every second one is under one.
        """
        stamped = self._patched(images, triggers)
        if self._covers_all:
            targets = sorted({trigger.target for trigger in triggers})
            stamped[::2] = self._perturbed(self._original, images, targets)[::2]
        return stamped

    def trials(self, held_out: Tensor, triggers: Sequence[Trigger]) -> Trials:
        """Return what to try every candidate on; each trigger has its own part, of one image at least."""
        starts = (number % len(held_out) for number in range(len(triggers)))
        parts = [held_out[start :: len(triggers)] for start in starts]
        pairs = list(zip(triggers, parts, strict=True))
        return Trials(
            images=held_out,
            before=_predictions(self._original, held_out),
            patched=[(each.target, self._patched(part, [each])) for each, part in pairs],
            control=[self._random(part, each) for each, part in pairs],
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

        It is the largest of three: the success, on held-out images, of fresh variants of what was
        unlearned, less that of random patches on the same masks, squared since variants are
        stronger than a trigger; the highest anomaly index of fresh triggers, as a share of the
        first one's; and, where the original is open to them, the excess of fresh dense perturbations.
        """
        forward = self._fast(result)
        left = [0.0]
        for (target, patched), control in zip(trials.patched, trials.control, strict=True):
            excess = _success(forward, patched, target) - _success(forward, control, target)
            left.append(max(0.0, excess) ** 2)
        if self._covers_all:
            left.append(self._excess(forward, sorted({target for target, _ in trials.patched})))
        first = {each.target: anomaly_index(each, self.field) for each in self.suspects}
        left += [
            anomaly_index(each, self.field) / first[each.target]
            for each in self._afresh(result)
            if first[each.target] > 0
        ]
        return min(1.0, max(left))

    def _patched(self, images: Tensor, triggers: Sequence[Trigger]) -> Tensor:
        return stamp_variants(
            self._original,
            images,
            triggers,
            reach=self._effort.reach,
            generator=self._generator,
        )

    def _perturbed(self, forward: Forward, images: Tensor, targets: Sequence[int]) -> Tensor:
        return perturb(forward, images, targets, tau=self._effort.tau, generator=self._generator)

    def _excess(self, forward: Forward, targets: Sequence[int]) -> float:
        """Return by how much more images perturbations lead to one of *targets* than to innocents."""
        images = self._work.images

        def success(cls: int) -> float:
            return _success(forward, self._perturbed(forward, images, [cls]), cls)

        innocent = [success(cls) for cls in self._innocent if cls not in targets]
        return max(map(success, targets)) - sum(innocent) / max(1, len(innocent))

    def _random(self, images: Tensor, trigger: Trigger) -> Tensor:
        noise = torch.rand(trigger.pattern.shape, generator=self._generator).to(images)
        return laid_out(images * (1 - trigger.mask) + noise * trigger.mask)

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
