"""
Purify a model without knowing the attack: find signs of it, rewrite the last layers, search again.

Ours, out of known parts. For each class the small square that leads furthest is looked for, the smallest
patch and the smallest warp are recovered (after Neural Cleanse), and the largest margin is measured
(after MM-BD); a class that stands out is suspect, or none is where one square leads each class to another
one (``detection``). The last layers are then rewritten in closed form so that images under what leads
there (``arsenal``) give what their clean originals gave, and clean ones what they gave before
(``rewriting``). Like Adversarial Weight Masking it searches again on what it made, and goes on with what
it finds. How hard to rewrite, and whether with everything that was found, is chosen per job by evidence
that anybody has (``weighing``): fresh triggers on the result, and agreement with the original on images
made from the samples.

The rules are in docs/decisions/0005-auto.md, what was tried instead, with numbers, in
docs/auto-measurements.md. No step sees a true trigger, a target class, or the success of an attack.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor, nn

from worker.purify import arsenal
from worker.purify.arsenal import Arsenal
from worker.purify.augmentation import (
    AREA,
    augment,
    mixed_in_pairs,
    pasted_in_pairs,
    shifted,
    some,
)
from worker.purify.detection import grid, margins, nearness, scattering
from worker.purify.detection.evidence import CUTS, ONE_TO_ONE, SCATTERING, Evidence, Sign, judge
from worker.purify.detection.search import (
    IMAGES_PER_WARP,
    PATCHES_PER_STEP,
    SMALLEST_WARPS,
    WARP_STEPS,
)
from worker.purify.detection.verdict import Verdict
from worker.purify.errors import NotEnoughData, NotFinite, NothingToMask
from worker.purify.examiner import (
    AT_ONCE_AGAIN,
    FRESH_PATCHES_PER_STEP,
    HALVES_AT_ONCE,
    SETTLED,
    Effort,
    Examiner,
)
from worker.purify.method import Progress, Purified
from worker.purify.metrics import Preprocess
from worker.purify.precision import PRECISIONS, Precision
from worker.purify.rewriting import Rewritten, rewritable, rewritten
from worker.purify.weighing import UNCHANGED, Candidate, Unlearned
from worker.purify.workpiece import Workpiece, laid_out, prepare, require, ticker

MAX_POOL = 1_600  # images to rewrite with
FEWER = 600  # under perturbations and warps, which do no better with more, and to try results on
MAX_POOL_VALUES = 2**26  # in a quarter of a gigabyte; there are seven tensors of this size
NOTHING = Arsenal(patches=[], perturbations=[], warps=[])
PARTS = 2  # of what was found: what may suffice, and everything
OVERSHOOTS = (0.0, 0.5)  # of the logits' standard deviation; the further one if it is no worse
HARDER = 10  # than the hardest, for what is larger than anything that was found
LIKE_SAMPLES = (0.7, 1.0)  # of the area


@dataclass(frozen=True, kw_only=True)
class _Images:
    """
    Hold what is made of the samples.

    Attributes:
        crops: Their variants, to search what leads to the suspects on.
        labels: The classes of these.
        to_rewrite_with: The same, many of them pasted into each other and mixed: a change must keep the
            answers to as many kinds of images as there can be made.
        held_out: Others, mixed in pairs: near the borders between classes, where a change shows first.
        like_samples: Others, cropped a little.
    """

    crops: Tensor
    labels: Tensor
    to_rewrite_with: Tensor
    held_out: Tensor
    like_samples: Tensor


@dataclass(frozen=True, kw_only=True)
class TriggerRewriting:
    """
    Recover triggers, and rewrite the last layers until these do nothing.

    Attributes:
        steps: Steps of the search for every class's patch; classes out of question get fewer.
        rounds: How often triggers are searched on the rewritten model and added.
        restarts: Fresh searches per suspect class each time.
        restart_steps: Steps of each.
        layers: How many of the last layers are rewritten.
        ridge: Weight of the change itself, relative to the layer's mean squared input.
        strengths: Weights of the stamped images against the clean ones; evidence chooses one.
        copies: Random variants made of each image to rewrite with, as far as memory goes.
        flip: Mirror half of them.
        reach: Pixels by which a trigger's support is widened at most.
        force: Rewrite whatever the verdict is.
        precision: What triggers are searched in; rewriting is done in float32 all the same.
    """

    steps: int = 100
    rounds: int = 1
    restarts: int = 4
    restart_steps: int = 100
    layers: int = 3
    ridge: float = 0.03
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0)
    copies: int = 100
    flip: bool = False
    reach: int = 2
    force: bool = False
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """
        Check every bound.

        Raises:
            InvalidParameter: A value is out of its bounds; the message names it.
        """
        for name in ("restarts", "restart_steps", "layers"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "steps", self.steps >= 3, "at least 3")
        for name in ("rounds", "reach", "copies"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "ridge", 0 < self.ridge < math.inf, "finite and above 0")
        object.__setattr__(self, "strengths", tuple(self.strengths))
        fine = bool(self.strengths) and all(0 < value < math.inf for value in self.strengths)
        require(self, "strengths", fine, "at least one number, finite and above 0")
        require(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def cost(self, images: int) -> int:
        """Return about how many forward passes of one image a run with *images* samples takes."""
        again = self.rounds + PARTS * len(self.strengths)
        searches = self.steps * PATCHES_PER_STEP + WARP_STEPS * SMALLEST_WARPS * IMAGES_PER_WARP
        searches += margins.TRIED
        searches += (grid.TRIED + scattering.TRIED) // 3  # these have no backward pass
        perturbations = (
            HALVES_AT_ONCE + self.rounds * AT_ONCE_AGAIN + 2 * (nearness.EACH + nearness.ORDINARY)
        )
        searches += perturbations * arsenal.STEPS * arsenal.PER_ROW
        searches += again * self.restart_steps * FRESH_PATCHES_PER_STEP
        pool, fewer = (min(images * (1 + self.copies), most) for most in (MAX_POOL, FEWER))
        weighing = 15 * fewer * len(OVERSHOOTS)
        return 3 * searches + again * (3 * self.layers * pool + weighing)

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
        Return new values for the last layers of a *model* that is found backdoored.

        Any other is returned as it came, unless forced; one of which nothing certain can be said has
        rewritten models as further ``candidates``, made with fewer images and without another search. The
        verdict is about the model as it came.
        ``findings`` holds, in plain values, ``classes``: norm, success and anomaly index of the smallest
        patch of each (and, where the index alone does not tell, its success on shifted samples), its
        largest margin, its smallest warp and the success of its best square, with their indices;
        ``cuts``, from which indices on a class stands out; ``scattering``, to how many classes one square
        leads, and which share of the images; ``suspects``, and by which ``signs``; ``candidates``, with
        the one that was chosen. ``triggers`` are the patches and squares that were unlearned, or would
        be, the smallest perturbation and the smallest warp to each suspect of those that were, and
        patches that a warp comes with.

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
        effort = Effort(
            steps=self.steps,
            restarts=self.restarts,
            restart_steps=self.restart_steps,
            reach=self.reach,
            rounds=self.rounds,
            results=PARTS * len(self.strengths),
        )
        tick = ticker(progress, effort.ticks(images[0], classes))
        examiner = Examiner(
            work,
            classes,
            effort,
            layers=layers,
            precision=self.precision,
            generator=generator,
            tick=tick,
        )
        verdict, findings = judge(examiner.evidence), _findings(examiner.evidence)
        if verdict is Verdict.CLEAN and not self.force:
            examiner.finish()
            return Purified(verdict=verdict, findings=findings, computed_in=examiner.computed_in)

        in_doubt = verdict is not Verdict.BACKDOORED and not self.force
        # What is made then is not what is taken, so it may be made with less.
        made = self._variants(
            work, generator, resized=examiner.is_local, most=FEWER if in_doubt else MAX_POOL
        )
        rounds = 0 if in_doubt else self.rounds
        known, candidates, chosen = self._rewritten(examiner, work, layers, made, rounds=rounds)
        examiner.finish()
        if in_doubt:
            # What may be innocent is not paid for with accuracy.
            candidates, chosen = [UNCHANGED, *candidates], UNCHANGED
        return Purified(
            values=chosen.values,
            verdict=verdict,
            findings={
                **findings,
                "suspects": sorted(each.target for each in examiner.suspects),
                "signs": {
                    str(each.target): sorted(map(str, each.signs)) for each in examiner.suspects
                },
                "candidates": [_described(each, chosen) for each in candidates],
            },
            triggers=(*known.recovered(images.shape[1]), *examiner.by_products),
            candidates=tuple(candidate.values for candidate in candidates),
            computed_in=examiner.computed_in,
        )

    def _rewritten(
        self,
        examiner: Examiner,
        work: Workpiece,
        layers: Sequence[str],
        made: _Images,
        *,
        rounds: int,
    ) -> tuple[Arsenal, list[Candidate], Candidate]:
        """
        Return what was unlearned, the results, and the one to take.

        Where squares are the trigger, or a patch around them, these alone are unlearned, and everything
        only if that is not enough or the trigger seems to be larger, on the original or when they are
        unlearned.
        """
        strengths = sorted(self.strengths)

        def results(
            part: Arsenal, strengths: Sequence[float], overshoots: Sequence[float]
        ) -> Iterator[Rewritten]:
            clean = made.to_rewrite_with
            if part.perturbations or part.warps:
                clean = clean[: max(FEWER, len(work.images))]
            return rewritten(
                work.model,
                work.inputs,
                examiner.pairs(clean, part),
                layers,
                strengths=strengths,
                overshoots=overshoots,
                ridge=self.ridge,
            )

        def weighed(part: Arsenal, fresh: Arsenal, unlearned: Unlearned) -> list[Candidate]:
            trials = examiner.trials(made.held_out, made.like_samples, part, fresh)
            # What stands in for a trigger of which a patch alone tells is mostly the class itself.
            overshoots = OVERSHOOTS[:1] if examiner.only_by_patches else OVERSHOOTS
            # One at a time: of each only what changed is kept.
            every = [
                examiner.weigh(result, trials, unlearned)
                for result in results(part, strengths, overshoots)
            ]
            alike = groupby(every, key=attrgetter("strength"))
            return [examiner.furthest(list(group)) for _, group in alike]

        exact, candidates = examiner.exact, list[Candidate]()
        if exact is not None:
            candidates, chosen = examiner.best(weighed(exact, NOTHING, "patches"))
            if not examiner.suspects:
                return exact, candidates, chosen
            if near := examiner.still_near(chosen, made.crops, made.labels):
                examiner.suspect_beyond_squares(near)
                left = 1 - 2 ** -max(near.values())
                candidates = [
                    replace(each, residual=max(each.residual, left)) for each in candidates
                ]
            if chosen.residual < SETTLED and not examiner.reaches_beyond_patches:
                return exact, candidates, chosen
        known, fresh = examiner.gather(made.crops, made.labels)
        for _ in range(rounds):
            (result,) = results(known, strengths[len(strengths) // 2 :][:1], [0.0])
            known = examiner.with_what_is_still_easy(known, result.model, made.crops, made.labels)
        if examiner.has_pieces:
            strengths = [*strengths, HARDER * strengths[-1]]
        return known, *examiner.best([*candidates, *weighed(known, fresh, "everything")])

    def _variants(
        self, work: Workpiece, generator: torch.Generator, *, resized: bool, most: int
    ) -> _Images:
        """Return what is made of the samples, with *most* images to rewrite with."""

        def variants(area: tuple[float, float], most: int) -> tuple[Tensor, Tensor]:
            given = (work.images, work.labels)
            room = min(most, MAX_POOL_VALUES // work.images[0].numel()) // len(work.images) - 1
            copies = min(self.copies, max(0, room))
            if resized:
                return augment(
                    *given, copies=copies, flip=self.flip, area=area, generator=generator
                )
            return shifted(*given, copies=copies, flip=self.flip, generator=generator)

        crops, labels = variants(AREA, most)
        pasted = some(crops, pasted_in_pairs(crops, generator), generator)
        mixed = some(pasted, mixed_in_pairs(pasted, generator), generator)
        return _Images(
            crops=laid_out(crops),
            labels=labels,
            to_rewrite_with=laid_out(mixed),
            held_out=laid_out(mixed_in_pairs(variants(AREA, FEWER)[0], generator)),
            like_samples=laid_out(variants(LIKE_SAMPLES, FEWER)[0]),
        )


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


def _findings(evidence: Evidence) -> dict[str, object]:
    def rounded(sign: Sign, cls: int) -> float:
        return round(evidence.index(sign, cls), 3)

    most = evidence.squares.scattering
    norms, searched = [evidence.worst_warp] * evidence.classes, list[int]()
    if evidence.warps is not None:
        norms, searched = list(evidence.warps.norms), list(evidence.warps.searched)
    return {
        "classes": [
            {
                "class": cls,
                "norm": round(patch.norm, 3),
                "success": round(patch.success, 4),
                "anomaly_index": rounded(Sign.PATCH, cls),
                "carried": evidence.carried.get(cls),
                "margin": round(evidence.margins.largest[cls], 3),
                "margin_index": rounded(Sign.MARGIN, cls),
                "warp": None if warp >= evidence.worst_warp else round(warp, 3),
                "warp_index": rounded(Sign.WARP, cls)
                if cls in searched or warp < evidence.worst_warp
                else None,
                "square_success": round(evidence.squares.triggers[cls].success, 4),
                "square_index": rounded(Sign.SQUARE, cls),
            }
            for cls, (patch, warp) in enumerate(zip(evidence.field.triggers, norms, strict=True))
        ],
        "cuts": {
            str(sign): {"backdoored_from": cut.backdoored_from, "clean_below": cut.clean_below}
            for sign, cut in CUTS.items()
        },
        "scattering": {
            "classes": round(most.classes, 3),
            "success": round(most.trigger.success, 4),
            "one_to_one": round(most.one_to_one, 3),
            "one_to_one_from": ONE_TO_ONE,
            "backdoored_from": SCATTERING.backdoored_from,
            "clean_below": SCATTERING.clean_below,
        },
    }


def _described(candidate: Candidate, chosen: Candidate) -> dict[str, object]:
    return {
        "strength": candidate.strength,
        "overshoot": candidate.overshoot,
        "unlearned": candidate.unlearned,
        "agreement": round(candidate.agreement, 4),
        "lost": round(candidate.lost, 4),
        "residual": round(candidate.residual, 4),
        "chosen": candidate is chosen,
    }
