"""Law: every verdict is counted once, beside the truth, and in the part that it belongs to."""

from pathlib import Path

import pytest

from benchmarks import awm_digits, zoo
from benchmarks.auto_verdicts import (
    DIGITS_SEEDS,
    INDEX,
    TARGETS,
    cases,
    figures,
    measure,
    nearest_to_cut,
    tables,
)
from benchmarks.harness import Row
from benchmarks.trials import DIGITS, truth
from examples.digits import TARGET

CUTS = {"square": 1.0, "patch": 1.3, "margin": 1.3, "warp": 1.4}
QUICK = {"steps": 3, "restart_steps": 2, "copies": 1}


def row(
    part: str, model: str, seed: int, verdict: str, nearest: float, *, named: bool = True
) -> Row:
    """Return a row; of a clean model no class is the target."""
    guilty = truth(model) == "backdoored"
    return {
        "part": part,
        "model": model,
        "seed": seed,
        "truth": str(truth(model)),
        "verdict": verdict,
        "nearest_to_cut": nearest,
        "suspects_are_target": named if guilty else None,
    }


ROWS = [
    row("calibration", "digits backdoored", 30, "backdoored", 2.5),
    row("calibration", "digits backdoored", 31, "clean", 0.5, named=False),
    row("calibration", "digits backdoored", 32, "inconclusive", 0.9),
    row("calibration", "digits clean", 30, "backdoored", 1.25),
    row("test", "digits clean", 60, "clean", 0.5),
    row("test", "small_vgg clean, GTSRB", 1, "inconclusive", 0.75),
]


def test_the_two_parts_share_neither_a_model_nor_a_seed() -> None:
    """Nor a seed with the digits on which the presets were chosen."""
    calibration, test = cases("calibration"), cases("test")
    assert len(calibration) == 2 * len(zoo.CALIBRATION) + 2 * 22
    assert len(test) == 2 * len(zoo.TEST) + 2 * 12
    trained = [
        {case["model"] for case in part} & zoo.RECIPES.keys() for part in (calibration, test)
    ]
    assert not trained[0] & trained[1]
    seeds = [set(awm_digits.SEEDS), *map(set, DIGITS_SEEDS.values())]
    assert len(set.union(*seeds)) == sum(map(len, seeds))


def test_each_verdict_stands_in_the_line_of_its_truth() -> None:
    """And of its part and its data, with the targets found and how near they came to a cut."""
    calibration, test = tables(ROWS).split("**test part**")
    assert (
        "| digits | clean | 1 of 22 | 0 | 1 | 0 | – | 1.25 / 1.25 / 1.25 |"
        in calibration.splitlines()
    )
    assert (
        "| digits | backdoored | 3 of 22 | 1 | 1 | 1 | 2 of 3 | 0.50 / 0.90 / 2.50 |"
        in calibration.splitlines()
    )
    assert "| digits | clean | 1 of 12 | 1 | 0 | 0 | – | 0.50 / 0.50 / 0.50 |" in test.splitlines()
    assert "| GTSRB | clean | 1 of 2 | 0 | 0 | 1 | – | 0.75 / 0.75 / 0.75 |" in test.splitlines()


def test_what_was_not_measured_stays_empty() -> None:
    """Every line is there; where a part has no such model there is none."""
    lines = [line for line in tables([]).splitlines() if " of " in line]
    assert len(lines) == 6 + 5  # no backdoored GTSRB model is in the test part
    assert all(line.endswith("|  |  |  |  |  |") for line in lines)


def test_figures_count_the_errors_of_each_part() -> None:
    """What a part did not measure is none."""
    assert figures(ROWS) == pytest.approx(
        {
            "calibration_clean_called_backdoored": 1,
            "calibration_backdoored_called_clean_share": 1 / 3,
            "calibration_inconclusive_share": 1 / 4,
            "test_clean_called_backdoored": 0,
            "test_backdoored_called_clean_share": None,
            "test_inconclusive_share": 1 / 2,
        }
    )
    assert figures([]).keys() >= TARGETS.keys()


@pytest.mark.parametrize(
    ("sign", "cls", "square", "scattered", "nearest"),
    [
        ("anomaly_index", 0, 0.0, 1.3, 1.5),
        ("margin_index", 1, 0.0, 1.3, 1.5),
        ("warp_index", 1, 0.0, 1.3, 1.5),
        ("margin_index", 1, 2.0, 1.3, 2.0),
        ("margin_index", 1, 0.0, 5.2, 2.0),
    ],
)
def test_the_highest_evidence_is_that_of_any_sign_and_any_class(
    sign: str, cls: int, square: float, scattered: float, nearest: float
) -> None:
    """Each as a share of its own cut; where warps were not searched they are left out."""
    indices = dict.fromkeys(INDEX.values(), 0.1) | {"warp_index": None}
    classes = [{**indices}, {**indices, "square_index": square}]
    classes[cls][sign] = 1.5 * CUTS[next(key for key, name in INDEX.items() if name == sign)]
    findings = {
        "classes": classes,
        "cuts": {key: {"backdoored_from": cut} for key, cut in CUTS.items()},
        "scattering": {
            "classes": scattered,
            "backdoored_from": 2.6,
            "one_to_one": 0.9,
            "one_to_one_from": 0.8,
        },
    }
    assert nearest_to_cut(findings) == pytest.approx(nearest)


@pytest.mark.parametrize("model", DIGITS)
def test_a_case_says_what_stood_out_and_whether_that_is_the_target(
    model: str, tmp_path: Path
) -> None:
    """With ACC and ASR before and after; a clean model has no target to find and no attack."""
    found = measure(
        {"part": "test", "model": model, "seed": 60}, data=tmp_path, device="cpu", **QUICK
    )
    clean = truth(model) == "clean"
    assert found["truth"] == str(truth(model))
    assert found["suspects_are_target"] == (None if clean else found["suspects"] == [TARGET])
    assert (found["asr_before"] is None) is clean
    assert found.keys() >= {"nearest_to_cut", "verdict", "acc_before", "acc_after", "seconds"}
