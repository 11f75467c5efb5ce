"""
Measure AWM, with its preset, on the backdoored digits of the demo.

Per training seed: train the backdoored model, draw five clean samples per class, purify, and measure on
test images that were not drawn. The preset was chosen on the seeds 0 to 13; 14 to 21 were unseen.
``--quick`` takes the seeds 0 and 10.
"""

from statistics import mean

from benchmarks.harness import Row, conclude, measure_all, parse
from benchmarks.trials import digits_trial, run

SEEDS = range(22)
QUICK_SEEDS = (0, 10)
SAMPLES_PER_CLASS = 5
TARGETS = {"asr_before_min": 0.9, "asr_after_max": 0.1, "acc_drop_max": 0.05}


def purify_once(case: Row, *, name: str = "awm", per_class: int = SAMPLES_PER_CLASS) -> Row:
    """Train, purify and measure with one seed for everything; rates are fractions."""
    _, row = run(digits_trial(case["seed"], per_class=per_class), name, seed=case["seed"])
    return row


def is_within_targets(row: Row) -> bool:
    """Return whether the attack worked before, is gone after, and the accuracy is kept."""
    return bool(
        row["asr_before"] >= TARGETS["asr_before_min"]
        and row["asr_after"] < TARGETS["asr_after_max"]
        and row["acc_before"] - row["acc_after"] < TARGETS["acc_drop_max"]
    )


def main() -> None:
    """Measure every seed and conclude."""
    options = parse(__doc__)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    conclude_digits(
        "awm_digits", measure_all(({"seed": seed} for seed in seeds), purify_once, options.out)
    )


def conclude_digits(benchmark: str, rows: list[Row]) -> None:
    """Print how many seeds ended within the targets."""
    drops = [row["acc_before"] - row["acc_after"] for row in rows]
    conclude(
        benchmark,
        figures={
            "seeds": len(rows),
            "seeds_within_targets": sum(map(is_within_targets, rows)),
            "demo_seeds_within_targets": sum(
                is_within_targets(row) for row in rows if row["seed"] < 5
            ),
            "asr_before_min": min(row["asr_before"] for row in rows),
            "asr_after_mean": mean(row["asr_after"] for row in rows),
            "asr_after_max": max(row["asr_after"] for row in rows),
            "acc_drop_mean": mean(drops),
            "acc_drop_max": max(drops),
        },
        targets=TARGETS,
        met=all(map(is_within_targets, rows)),
    )


if __name__ == "__main__":
    main()
