"""Law: every variant differs from the preset in one step, and only while it is measured."""

import copy
from functools import cache

import pytest

from benchmarks import zoo
from benchmarks.auto_ablation import MODELS, STRENGTHS, VARIANTS, summary, table, verdicts
from benchmarks.auto_verdicts import DIGITS_SEEDS
from benchmarks.harness import Row
from benchmarks.trials import Trial, digits_trial, run
from common.catalogue.methods import METHODS
from worker.purify import arsenal, auto, examiner, variants
from worker.purify.detection import evidence, search

QUICK = {"steps": 3, "restart_steps": 2, "copies": 1, "force": True}
PATCHED: tuple[tuple[object, str], ...] = (
    (examiner.Examiner, "exact"),
    (examiner.Examiner, "is_local"),
    (auto, "some"),
    (auto, "OVERSHOOTS"),
    (arsenal, "Waves"),
    (arsenal, "Halves"),
    (examiner, "UNSEEN"),
    (examiner, "NEAR"),
    (search, "OPENNESS"),
    (evidence, "CUTS"),
    (variants, "SHARPENING_STEPS"),
    (variants, "_colours"),
)


def state() -> list[object]:
    """Return what variants may patch."""
    return [copy.copy(getattr(module, name)) for module, name in PATCHED]


def resolved(**given: object) -> dict[str, object]:
    """Return the parameters of a job."""
    method = METHODS["auto"]
    params = method.resolve(
        method.parameters.model_validate(given), count=10, classes=10, image_shape=(3, 32, 32)
    )
    found: dict[str, object] = params.model_dump()
    return found


def row(variant: str, model: str, verdict: str, **measured: float | None) -> Row:
    """Return a row of that variant."""
    plain: Row = {"acc_before": 0.9, "acc_after": 0.9, "asr_before": 1.0, "asr_after": 0.0}
    return {
        "variant": variant,
        "model": model,
        "seed": 0,
        "verdict": verdict,
        "fidelity": 1.0,
        "seconds": 2.0,
        **plain,
        **measured,
    }


ROWS = [
    row("the preset", "VGG CIFAR checkers", "backdoored", fidelity=0.8, asr_after=0.3),
    row("the preset", "VGG GTSRB colours", "clean", fidelity=0.6, asr_after=0.1),
    row("the preset", "VGG CIFAR waves", "inconclusive", fidelity=1.0),
    row("the preset", "VGG GTSRB clean", "clean", asr_before=None, asr_after=None, acc_after=0.86),
    row("float32", "VGG GTSRB clean", "backdoored", asr_before=None, asr_after=None),
]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "the preset"])
def test_every_variant_changes_one_thing_and_puts_it_back(name: str) -> None:
    """It is a parameter or a step without one, never both."""
    variant, before = VARIANTS[name], state()
    different = [
        key for key, value in resolved(**variant.given).items() if value != resolved()[key]
    ]
    with variant.patched():
        during = state()
    assert len(different) + (during != before) == 1
    assert state() == before


def test_either_kind_of_starts_can_be_left_alone() -> None:
    """Masks that start open have the higher logits."""
    kinds = []
    for name in ("no half-open starts", "no nearly closed starts"):
        with VARIANTS[name].patched():
            kinds.append(list(search.OPENNESS))
    assert kinds == [[-2.0], [0.0]]


@cache
def tried() -> Trial:
    """Return the demo's model, of the first seed."""
    return digits_trial(30)


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_to_its_end(name: str) -> None:
    """With searches of a few steps it rewrites something."""
    variant = VARIANTS[name]
    with variant.patched():
        purified, _ = run(tried(), "auto", seed=30, **QUICK, **variant.given)
    assert purified.values


def test_each_strength_of_the_preset_is_tried_alone() -> None:
    """There is no other."""
    assert list(STRENGTHS) == resolved()["strengths"]


def test_no_model_of_the_test_part_is_looked_at() -> None:
    """What is learned here may be used to choose."""
    for model, seed in MODELS:
        assert model in zoo.CALIBRATION or seed in DIGITS_SEEDS["calibration"]


def test_a_summary_is_over_the_backdoored_models_but_for_accuracy_and_time() -> None:
    """The worst success is over all of them."""
    assert summary(ROWS[:4]) == pytest.approx(
        {
            "fidelity_mean": 0.8,
            "asr_after_max": 0.3,
            "acc_lost_mean": 0.01,
            "seconds_median": 2.0,
        }
    )
    assert set(summary([]).values()) == {None}


def test_a_verdict_is_right_wrong_or_inconclusive() -> None:
    """To call a clean model backdoored is as wrong as the other way round."""
    assert verdicts(ROWS[:4]) == (2, 1, 1)
    assert verdicts(ROWS[4:]) == (0, 1, 0)


def test_every_variant_has_its_line_and_unmeasured_stays_empty() -> None:
    """A variant that ran on clean models alone has no fidelity."""
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(VARIANTS)
    assert "| the preset | 4 of 10 | 0.800 | 30.0 | 1.0 | 2 / 1 / 1 | 2.0 |" in lines
    assert "| float32 | 1 of 10 |  |  | 0.0 | 0 / 1 / 0 | 2.0 |" in lines
    assert "| last layer alone | 0 of 10 |  |  |  |  |  |" in lines
