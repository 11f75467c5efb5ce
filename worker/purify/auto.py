"""
Purify a model without knowing the attack: recover triggers, rewrite the last layers, search again.

Ours, out of three known parts. For each class the smallest trigger is recovered (``inversion``, after
Neural Cleanse), and a class that needs much less than the others is suspect (``evidence``). The last
layers are then rewritten in closed form so that stamped images give what their clean originals gave,
and clean ones what they gave before (``rewriting``). Like Adversarial Weight Masking it searches again on
what it made, and goes on with what it finds. How hard to rewrite is chosen per job by evidence that
anybody has: fresh triggers on the result, and agreement with the original on images made from the
samples.

What was tried instead, with numbers, is in docs/decisions/0005-auto.md. No step sees a true trigger, a
target class, or the success of an attack.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from worker.purify.augmentation import augment
from worker.purify.batch_norm import absorb_batch_norms
from worker.purify.errors import NotEnoughData, NotFinite, NothingToMask
from worker.purify.evidence import Verdict, anomaly_indices, judge, suspects
from worker.purify.inversion import invert
from worker.purify.method import Progress, Purified
from worker.purify.metrics import Preprocess
from worker.purify.precision import PRECISIONS, Precision, autocast_type
from worker.purify.rewriting import Pairs, rewritable, rewrite
from worker.purify.trigger import Trigger
from worker.purify.variants import perturb, stamp_variants
from worker.purify.workpiece import Workpiece, laid_out, prepare, require, ticker

Forward = Callable[[Tensor], Tensor]

# Masks that start open find triggers that only work as a whole, and those that start nearly closed
# find the smallest ones.
OPENNESS = (0.0, -2.0)
PATCHES_PER_STEP = 128  # so that many classes cost no more per step than a few
MIN_PATCHES = 3  # per class and step
FRESH_PATCHES_PER_STEP = 48  # of a search for the suspects alone
CHUNK = 256
INNOCENT = 3  # classes to compare a suspect with
COVERS_ALL_FROM = 0.2  # more of the images than of an innocent class, from which on it is no chance
MAX_POOL = 600  # images to rewrite with
MAX_POOL_VALUES = 2**27  # in half a gigabyte; there are four tensors of this size
PROBE_IMAGES = 8

# Of the mixed images more change their class than of real ones: docs/decisions/0005-auto.md.
BORDERLINE = 0.5


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """
    Hold one result and what speaks for it.

    Attributes:
        strength: Weight of the stamped images against the clean ones.
        agreement: Share of held-out images, mixed of the samples, that get the original's class.
        residual: What triggers still achieve; ``_Evidence.residual`` says how it is measured.
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


@dataclass(frozen=True, kw_only=True)
class TriggerRewriting:
    """
    Recover triggers, and rewrite the last layers until these do nothing.

    Attributes:
        steps: Steps of the search for every class's trigger, from each of two kinds of starts.
        rounds: How often triggers are searched on the rewritten model and added.
        restarts: Fresh searches per suspect class each time.
        restart_steps: Steps of each.
        layers: How many of the last layers are rewritten.
        ridge: Weight of the change itself, relative to the layer's mean squared input.
        strengths: Weights of the stamped images against the clean ones; evidence chooses one.
        copies: Random variants made of each image to rewrite with, as far as memory goes.
        flip: Mirror half of them.
        tau: L1 norm of the perturbations of the whole image, which stand in for triggers without a place.
        reach: Pixels by which a trigger's support is widened at most.
        force: Rewrite even where the verdict is clean.
        precision: What triggers are searched in; rewriting is done in float32 all the same.
    """

    steps: int = 200
    rounds: int = 1
    restarts: int = 4
    restart_steps: int = 100
    layers: int = 2
    ridge: float = 0.03
    strengths: tuple[float, ...] = (0.02, 0.1, 1.0)
    copies: int = 40
    flip: bool = False
    reach: int = 2
    tau: float = 100.0
    force: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """
        Check every bound.

        Raises:
            InvalidParameter: A value is out of its bounds; the message names it.
        """
        for name in ("steps", "restarts", "restart_steps", "layers"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("rounds", "reach", "copies"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "tau", 0 < self.tau < math.inf, "finite and above 0")
        require(self, "ridge", 0 < self.ridge < math.inf, "finite and above 0")
        object.__setattr__(self, "strengths", tuple(self.strengths))
        fine = bool(self.strengths) and all(0 < value < math.inf for value in self.strengths)
        require(self, "strengths", fine, "at least one number, finite and above 0")
        require(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def cost(self, images: int) -> int:
        """Return about how many forward passes of one image a run with *images* samples takes."""
        again = self.rounds + len(self.strengths)
        searches = len(OPENNESS) * self.steps * PATCHES_PER_STEP
        searches += again * self.restart_steps * FRESH_PATCHES_PER_STEP
        pool = min(images * (1 + self.copies), MAX_POOL)
        return 3 * searches + again * (5 * self.layers + 15) * pool

    def purify(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        preprocess: Preprocess | None = None,
        seed: int,
        progress: Progress | None = None,
    ) -> Purified:
        """
        Return new values for the last layers of *model*, or none where it is found clean.

        The verdict is about the model as it came. ``findings`` holds, in plain values, ``classes``: norm,
        success and anomaly index of the smallest trigger of each; ``suspects``; ``candidates``,
        with the one that was chosen. ``triggers`` are those that were unlearned.

        The work is done on the device of the model, in float64 for float64 images and in float32
        otherwise. Torch's global generator is neither used nor changed.

        Args:
            images: Clean images ``(N, C, H, W)`` in [0, 1].
            labels: Their classes ``(N,)`` int64.
            preprocess: Applied to images right before the model, such as mean and std.
            progress: Called with the steps done and the steps in all after each of them.

        Raises:
            NotEnoughData: There is no image.
            NothingToMask: No layer can be rewritten.
            NotFinite: A weight or an output is not a finite number.
            InvalidParameter: The images or the labels are not what they should be.
            UnusableModel: The model cannot be copied, or gives no logits.
        """
        work = prepare(model, images, labels, preprocess)
        if len(images) == 0:
            raise NotEnoughData
        classes = _classes(work)
        layers = rewritable(work.model, work.logits, work.images[:1])[-self.layers :]
        if not layers:
            raise NothingToMask("The model has no linear layer and no convolution to rewrite.")
        generator = torch.Generator().manual_seed(seed)
        tick = ticker(progress, self._ticks)
        evidence = _Evidence(self, work, generator, tick)

        smallest = evidence.gather(classes)
        verdict = judge(smallest)
        found = Purified(
            verdict=verdict, findings=_findings(smallest), computed_in=evidence.computed_in
        )
        if verdict is Verdict.CLEAN and not self.force:
            evidence.skip(self.rounds + len(self.strengths))
            return found

        run = _runner(work)
        pool, held_out = self._variants(work, generator)
        triggers = suspects(smallest)

        def rewritten(strength: float) -> nn.Module:
            result = copy.deepcopy(work.model)
            rewrite(
                result,
                work.model,
                run,
                Pairs(clean=pool, stamped=evidence.stamp(pool, triggers)),
                layers,
                strength=strength,
                ridge=self.ridge,
            )
            return result

        for _ in range(self.rounds):
            middling = sorted(self.strengths)[len(self.strengths) // 2]
            triggers = triggers + evidence.still_easy(rewritten(middling))
        strengths = sorted(self.strengths)
        if verdict is not Verdict.BACKDOORED:
            # What may be innocent is not paid for with accuracy; what is left shows as residual.
            strengths = strengths[:1]
        candidates = [
            evidence.weigh(rewritten(strength), strength, triggers, held_out)
            for strength in strengths
        ]
        evidence.skip(len(self.strengths) - len(strengths))
        chosen = max(candidates, key=lambda candidate: candidate.score)  # of equals the mildest
        return Purified(
            values=chosen.values,
            verdict=verdict,
            findings={
                **found.findings,
                "suspects": sorted({trigger.target for trigger in triggers}),
                "candidates": [_described(each, chosen) for each in candidates],
            },
            triggers=tuple(triggers),
            candidates=tuple(each.values for each in candidates),
            computed_in=evidence.computed_in,
        )

    @property
    def _ticks(self) -> int:
        again = self.rounds + len(self.strengths)
        return len(OPENNESS) * self.steps + again * self.restart_steps

    def _variants(self, work: Workpiece, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """
        Return variants of the images to rewrite with, and others to measure agreement on.

        The latter are mixed in pairs: closer to the borders between classes, where a change shows first.
        """
        count = len(work.images)
        room = min(MAX_POOL, MAX_POOL_VALUES // work.images[0].numel()) // count - 1
        copies = min(self.copies, max(0, room))
        pool, others = (
            augment(work.images, work.labels, copies=copies, flip=self.flip, generator=generator)[0]
            for _ in range(2)
        )
        order = torch.randperm(len(others), generator=generator).to(others.device)
        share = (torch.rand(len(others), 1, 1, 1, generator=generator) / 2).to(others)
        return laid_out(pool), laid_out(others * (1 - share) + others[order] * share)


class _Evidence:
    """Search triggers, on the model as it came and on what is made of it."""

    def __init__(
        self,
        method: TriggerRewriting,
        work: Workpiece,
        generator: torch.Generator,
        tick: Callable[[], None],
    ) -> None:
        self._method, self._work = method, work
        self._generator, self._tick = generator, tick
        autocast = autocast_type(method.precision, work.images)
        self.computed_in = str(autocast or work.images.dtype).removeprefix("torch.")
        self._autocast = torch.autocast(
            work.images.device.type, dtype=autocast, enabled=autocast is not None
        )
        self.original = self._fast(work.model)
        self._ordinary = 0.0
        self._suspects: list[Trigger] = []
        self._innocent: list[int] = []
        self._covers_all = False

    def gather(self, classes: int) -> list[Trigger]:
        """Return the smallest trigger of every class of the original."""
        found = [
            invert(
                self.original,
                self._work.images,
                self._work.labels,
                range(classes),
                steps=self._method.steps,
                per_class=max(MIN_PATCHES, PATCHES_PER_STEP // classes),
                openness=openness,
                generator=self._generator,
                tick=self._tick,
            )
            for openness in OPENNESS
        ]
        smallest = [
            min(of_class, key=lambda trigger: (trigger.norm, -trigger.success))
            for of_class in zip(*found, strict=True)
        ]
        self._ordinary = median(trigger.norm for trigger in smallest)
        self._suspects = suspects(smallest)
        guilty = {trigger.target for trigger in self._suspects}
        # The middle of the field: neither close to guilty nor hard to reach for reasons of its own.
        ranked = sorted(smallest, key=lambda trigger: abs(trigger.norm - self._ordinary))
        others = [trigger.target for trigger in ranked if trigger.target not in guilty]
        self._innocent = others[:INNOCENT]
        self._covers_all = any(self._excess(self.original, cls) > COVERS_ALL_FROM for cls in guilty)
        return smallest

    def skip(self, searches: int) -> None:
        """Count fresh searches that are not needed as done."""
        for _ in range(searches * self._method.restart_steps):
            self._tick()

    def still_easy(self, result: nn.Module) -> list[Trigger]:
        """Return fresh triggers of *result* to suspect classes, smaller than an innocent class's."""
        return [trigger for trigger in self._afresh(result) if trigger.norm < self._ordinary]

    def weigh(
        self, result: nn.Module, strength: float, triggers: Sequence[Trigger], held_out: Tensor
    ) -> Candidate:
        """Return *result* with what speaks for it."""
        answers, before = (
            _predictions(self._fast(result), held_out),
            _predictions(self.original, held_out),
        )
        return Candidate(
            strength=strength,
            agreement=float((answers == before).float().mean()),
            residual=self.residual(result, triggers, held_out),
            values=_changes(self._work.model, result),
        )

    def residual(self, result: nn.Module, triggers: Sequence[Trigger], held_out: Tensor) -> float:
        """
        Return what triggers still achieve on *result*, in [0, 1].

        It is the largest of three: the success, on held-out images, of fresh variants of what was
        unlearned, less that of random patches on the same masks; of fresh triggers, how much of the
        way from the ordinary size of a trigger down to that of the first one found they still
        save; and, where the original is open to them, the excess of fresh dense perturbations.
        """
        forward = self._fast(result)
        known = 0.0
        for trigger in triggers:
            patched = self._success(forward, self._patched(held_out, [trigger]), trigger.target)
            control = self._success(forward, self._random(held_out, trigger), trigger.target)
            known = max(known, patched - control)
            if self._covers_all:
                known = max(known, self._excess(forward, trigger.target))
        first = {trigger.target: trigger.norm for trigger in self._suspects}
        saved = (
            (self._ordinary - trigger.norm) / (self._ordinary - first[trigger.target])
            for trigger in self.still_easy(result)
            if first[trigger.target] < self._ordinary
        )
        return max([known, *(min(1.0, share) for share in saved)])

    def stamp(self, images: Tensor, triggers: Sequence[Trigger]) -> Tensor:
        """
        Return every image under a variant of a trigger.

        Where the original is open to perturbations of the whole image, every second one is under one.
        """
        stamped = self._patched(images, triggers)
        if self._covers_all:
            targets = sorted({trigger.target for trigger in triggers})
            stamped[::2] = self._perturbed(self.original, images, targets)[::2]
        return stamped

    def _patched(self, images: Tensor, triggers: Sequence[Trigger]) -> Tensor:
        return stamp_variants(
            self.original, images, triggers, reach=self._method.reach, generator=self._generator
        )

    def _perturbed(self, forward: Forward, images: Tensor, targets: Sequence[int]) -> Tensor:
        return perturb(forward, images, targets, tau=self._method.tau, generator=self._generator)

    def _excess(self, forward: Forward, target: int) -> float:
        """Return by how much perturbations lead more images to *target* than to innocent classes."""
        images = self._work.images
        innocent = [cls for cls in self._innocent if cls != target]

        def success(cls: int) -> float:
            return self._success(forward, self._perturbed(forward, images, [cls]), cls)

        return success(target) - sum(map(success, innocent)) / max(1, len(innocent))

    def _random(self, images: Tensor, trigger: Trigger) -> Tensor:
        noise = torch.rand(trigger.pattern.shape, generator=self._generator).to(images)
        return laid_out(images * (1 - trigger.mask) + noise * trigger.mask)

    @staticmethod
    def _success(forward: Forward, images: Tensor, target: int) -> float:
        return float((_predictions(forward, images) == target).float().mean())

    def _afresh(self, result: nn.Module) -> list[Trigger]:
        """Return triggers of *result* to the suspect classes, from fresh starts."""
        targets = [t.target for t in self._suspects for _ in range(self._method.restarts)]
        return invert(
            self._fast(result),
            self._work.images,
            self._work.labels,
            targets,
            steps=self._method.restart_steps,
            per_class=max(MIN_PATCHES, FRESH_PATCHES_PER_STEP // len(targets)),
            openness=OPENNESS[-1],
            generator=self._generator,
            tick=self._tick,
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


def _classes(work: Workpiece) -> int:
    """
    Return how many classes the model tells apart.

    Raises:
        NotFinite: Its answers are not.
    """
    with torch.no_grad():
        logits = work.logits(work.images[:1])
    if not bool(logits.isfinite().all()):
        raise NotFinite
    return logits.shape[1]


def _runner(work: Workpiece) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(work.inputs(images))
        return logits

    return run


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


def _findings(smallest: Sequence[Trigger]) -> dict[str, object]:
    indices = anomaly_indices([trigger.norm for trigger in smallest])
    return {
        "classes": [
            {
                "class": trigger.target,
                "norm": round(trigger.norm, 3),
                "success": round(trigger.success, 4),
                "anomaly_index": round(index, 3),
            }
            for trigger, index in zip(smallest, indices, strict=True)
        ]
    }


def _described(candidate: Candidate, chosen: Candidate) -> dict[str, object]:
    return {
        "strength": candidate.strength,
        "agreement": round(candidate.agreement, 4),
        "residual": round(candidate.residual, 4),
        "chosen": candidate is chosen,
    }
