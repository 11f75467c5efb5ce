"""
Measure what each step of `auto` is good for: the preset, and the preset without one of them.

One clean image per class, on models of the calibration part of `benchmarks.auto_verdicts` alone: digits
of five seeds, and five of `benchmarks.zoo`. A step that is off is off in the evidence as well. On a
processor without units for bfloat16 the variant in float32 is the preset.

--quick: digits of one seed.
--table: print the Markdown table of what --out holds, and measure nothing.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Row, conclude, markdown, measure_all, or_none, parser, recorded
from benchmarks.trials import DIGITS_BACKDOORED, run, trial, truth
from worker.purify import arsenal, auto, examiner, variants
from worker.purify.detection import search
from worker.purify.detection.evidence import CUTS, Cut, Sign
from worker.purify.detection.families import Perturbations
from worker.purify.detection.trigger import Trigger
from worker.purify.detection.verdict import Verdict

RESULTS = Path(__file__).parent / "results" / "auto_ablation.jsonl"
MODELS = (
    *((DIGITS_BACKDOORED, seed) for seed in range(30, 35)),
    ("VGG CIFAR checkers", 0),
    ("VGG GTSRB colours", 0),
    ("VGG GTSRB clean", 0),
    ("VGG CIFAR waves", 0),
    ("VGG GTSRB watermark, another", 0),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """
    Say what is otherwise than in the preset.

    Attributes:
        given: Parameters.
        patched: What no parameter turns off, turned off while it is entered.
    """

    given: Mapping[str, object] = field(default_factory=dict)
    patched: Callable[[], AbstractContextManager[object]] = nullcontext


def nearly_closed_starts() -> AbstractContextManager[object]:
    """Start no mask half open; those are the ones with the highest logits."""
    return patch.object(search, "OPENNESS", (min(search.OPENNESS),))


def half_open_starts() -> AbstractContextManager[object]:
    """Start no mask nearly closed; the searches on what was rewritten still do."""
    return patch.object(search, "OPENNESS", (max(search.OPENNESS),))


def without(sign: Sign) -> AbstractContextManager[object]:
    """Let no class stand out by *sign*, and let it cast no doubt on any."""
    return patch.dict(
        cast("dict[Sign, Cut]", CUTS),
        {sign: Cut(backdoored_from=math.inf, clean_below=math.inf)},
    )


def recovered_colours() -> AbstractContextManager[object]:
    """Redraw no colours of a trigger, and sharpen none."""

    def recovered(trigger: Trigger, _number: int, _generator: torch.Generator) -> Tensor:
        return trigger.pattern.clone()

    return patch.multiple(variants, SHARPENING_STEPS=0, _colours=recovered)


def everything_at_once() -> AbstractContextManager[object]:
    """Never unlearn squares alone."""
    return patch.object(examiner.Examiner, "exact", None)


def squares_taken_at_their_word() -> AbstractContextManager[object]:
    """Search no perturbations on a result for squares: whatever there is counts as nothing."""
    return patch.object(examiner, "NEAR", math.inf)


def crops_alone() -> AbstractContextManager[object]:
    """Rewrite with images that are neither pasted into each other nor mixed."""

    def crops(images: Tensor, _others: Tensor, _generator: torch.Generator) -> Tensor:
        return images

    return patch.object(auto, "some", crops)


def crops_always() -> AbstractContextManager[object]:
    """Resize crops whatever was found."""
    return patch.object(examiner.Examiner, "is_local", True)


def mildest() -> AbstractContextManager[object]:
    """Spend no accuracy on what nothing that was found looks like."""
    return patch.object(examiner, "UNSEEN", 0.0)


def smallest_for(family: str) -> AbstractContextManager[object]:
    """Search the smallest perturbations of the whole image in place of that family."""
    return patch.object(arsenal, family, Perturbations)


def no_overshoot() -> AbstractContextManager[object]:
    """Aim at the clean answers and no further."""
    return patch.object(auto, "OVERSHOOTS", (0.0,))


STRENGTHS = (0.1, 0.3, 1.0)  # the preset's
VARIANTS = {
    "the preset": Variant(),
    "no half-open starts": Variant(patched=nearly_closed_starts),
    "no nearly closed starts": Variant(patched=half_open_starts),
    "triggers not widened": Variant(given={"reach": 0}),
    "triggers not recoloured": Variant(patched=recovered_colours),
    "no squares": Variant(patched=functools.partial(without, Sign.SQUARE)),
    "no margins": Variant(patched=functools.partial(without, Sign.MARGIN)),
    "no warps": Variant(patched=functools.partial(without, Sign.WARP)),
    "squares never alone": Variant(patched=everything_at_once),
    "squares taken at their word": Variant(patched=squares_taken_at_their_word),
    "crops alone": Variant(patched=crops_alone),
    "crops in place of shifts": Variant(patched=crops_always),
    "no waves": Variant(patched=functools.partial(smallest_for, "Waves")),
    "no halves": Variant(patched=functools.partial(smallest_for, "Halves")),
    "no overshoot": Variant(patched=no_overshoot),
    "nothing spent on the unseen": Variant(patched=mildest),
    "no second search": Variant(given={"rounds": 0}),
    "last layer alone": Variant(given={"layers": 1}),
    **{
        f"strength {strength:g}, not chosen": Variant(given={"strengths": [strength]})
        for strength in STRENGTHS
    },
    "float32": Variant(given={"precision": "float32"}),
}


def measure(case: Row, *, data: Path, device: str = "cpu") -> Row:
    """Purify once without the step, and measure before and after."""
    variant = VARIANTS[case["variant"]]
    tried = trial(case["model"], case["seed"], data, device)
    with variant.patched():
        purified, row = run(tried, "auto", seed=case["seed"], **variant.given)
    return {**row, "computed_in": purified.computed_in}


def table(rows: Sequence[Row]) -> str:
    """Return the results as Markdown; what was not measured stays empty."""
    head = (
        "`auto` with",
        "runs",
        "fidelity, mean",
        "ASR after, worst %",
        "ACC lost, mean points",
        "verdicts right / wrong / inconclusive",
        "seconds, median",
    )
    lines = []
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        found = summary(own)
        shown = [
            _shown(found["fidelity_mean"], "{:.3f}"),
            _shown(found["asr_after_max"], "{:.1f}", times=100),
            _shown(found["acc_lost_mean"], "{:.1f}", times=100),
            " / ".join(map(str, verdicts(own))) if own else "",
            _shown(found["seconds_median"], "{:.1f}"),
        ]
        lines.append([name, f"{len(own)} of {len(MODELS)}", *shown])
    return markdown(head, lines) + "\n"


def summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return fidelity and ASR over the backdoored models, accuracy and time over all."""
    attacked = [row for row in rows if row["asr_before"] is not None]
    lost = [row["acc_before"] - row["acc_after"] for row in rows]
    return {
        "fidelity_mean": or_none(statistics.mean, [row["fidelity"] for row in attacked]),
        "asr_after_max": or_none(max, [row["asr_after"] for row in attacked]),
        "acc_lost_mean": or_none(statistics.mean, lost),
        "seconds_median": or_none(statistics.median, [row["seconds"] for row in rows]),
    }


def verdicts(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Return how many verdicts are right, wrong, and inconclusive."""
    inconclusive = sum(row["verdict"] == Verdict.INCONCLUSIVE for row in rows)
    right = sum(row["verdict"] == truth(row["model"]) for row in rows)
    return right, len(rows) - right - inconclusive, inconclusive


def _shown(figure: float | None, form: str, *, times: int = 1) -> str:
    return "" if figure is None else form.format(times * figure)


def main() -> None:
    """Measure every case and conclude."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=1, help="processes that measure at once")
    options.add_argument("--device", default="cpu", help="of the zoo's models")
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if chosen.table:
        print(table(recorded(chosen.out or RESULTS)), end="")
        return
    cases = [
        {"variant": variant, "model": model, "seed": seed}
        for model, seed in (MODELS[:1] if chosen.quick else MODELS)
        for variant in VARIANTS
    ]
    rows = measure_all(
        cases,
        functools.partial(measure, data=chosen.data, device=chosen.device),
        chosen.out,
        jobs=chosen.jobs,
    )
    conclude(
        "auto_ablation",
        figures={
            name: summary([row for row in rows if row["variant"] == name]) for name in VARIANTS
        },
        targets={},  # it compares; the targets are those of the whole method, in erase
        met=True,
    )


if __name__ == "__main__":
    main()
