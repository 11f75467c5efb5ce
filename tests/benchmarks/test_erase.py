"""Law: the tables say what was measured, and nothing about what was not."""

from benchmarks.erase import COLUMNS, tables
from benchmarks.harness import Row
from benchmarks.subjects import SUBJECTS


def row(checkpoint: str, seed: int, asr_after: float | None, acc_after: float = 0.75) -> Row:
    """Return a row of AWM with one image per class."""
    attacked = asr_after is not None
    return {
        "method": "awm",
        "checkpoint": checkpoint,
        "per_class": 1,
        "seed": seed,
        "acc_before": 0.8,
        "acc_after": acc_after,
        "asr_before": 1.0 if attacked else None,
        "asr_after": asr_after,
        "ra_before": 0.0 if attacked else None,
        "ra_after": 0.5 if attacked else None,
        "fidelity": 0.9,
        "seconds": 2.0,
    }


def test_a_row_that_was_not_measured_stays_empty() -> None:
    """Every method and every checkpoint has its line, in every table."""
    shown = tables([row("CIFAR-10 BadNets", 0, 0.25)]).splitlines()
    for method in COLUMNS:
        assert sum(line.startswith(f"| `{method}`") for line in shown) == 3
    for checkpoint in SUBJECTS:
        assert sum(line.startswith(f"| {checkpoint} |") for line in shown) == 3
    assert "| `ibau` |  |  |  |  |  |" in shown
    assert any(line.startswith("| `awm` (1 of 21 runs) | 0.900 |") for line in shown)
    assert "| CIFAR-10 BadNets | 80.0 / 100.0 |  | 75.0 / 25.0 |  |  |  |  |" in shown


def test_mean_worst_and_spread_are_over_the_right_rows() -> None:
    """The worst is over all; the spread is between the seeds of one checkpoint, not between these."""
    rows = [
        row("CIFAR-10 BadNets", 0, 0.10),
        row("CIFAR-10 BadNets", 1, 0.12),
        row("GTSRB l0-inv", 0, 0.50),
        row("GTSRB l0-inv", 1, 0.50),
        row("ResNet-18 clean", 0, None, acc_after=0.60),
    ]
    summary = next(
        line for line in tables(rows).splitlines() if line.startswith("| `awm` (5 of 21")
    )
    mean, worst, spread = summary.split("|")[3].split("/")
    assert (mean.strip(), worst.strip()) == ("30.5", "50.0")
    assert spread.strip() == "0.7"  # the mean of 1.41 and 0
    assert summary.split("|")[4].split("/")[1].strip() == "20.0"
    assert "| ResNet-18 clean | 80.0 / – |  | 60.0 / – |  |  |  |  |" in tables(rows).splitlines()
