"""Law: the tables say what was measured, and nothing about what was not."""

import pytest

from benchmarks import zoo
from benchmarks.erase import COLUMNS, TARGETS, THOROUGHLY, figures, seeds, tables
from benchmarks.harness import Row
from benchmarks.subjects import SUBJECTS

TABLES = 3  # with 1, 5 and 50 images per class


def row(
    checkpoint: str,
    seed: int,
    asr_after: float | None,
    *,
    acc_after: float = 0.75,
    method: str = "awm",
    fidelity: float = 0.9,
    verdict: str | None = None,
    device: str = "cpu",
) -> Row:
    """Return a row with one image per class; of a clean model where there is no ASR."""
    attacked = asr_after is not None
    return {
        "method": method,
        "checkpoint": checkpoint,
        "per_class": 1,
        "seed": seed,
        "acc_before": 0.8,
        "acc_after": acc_after,
        "asr_before": 1.0 if attacked else None,
        "asr_after": asr_after,
        "ra_before": 0.0 if attacked else None,
        "ra_after": 0.5 if attacked else None,
        "fidelity": fidelity,
        "seconds": 2.0,
        "device": device,
        **({} if verdict is None else {"verdict": verdict}),
    }


def section(rows: list[Row], title: str) -> list[str]:
    """Return the lines below a title, up to the next one."""
    return tables(rows).split(f"**{title}")[1].split("**1 ")[0].split("**5 ")[0].splitlines()


def test_a_row_that_was_not_measured_stays_empty() -> None:
    """Every method and every checkpoint has its line, in every table."""
    rows = [row("CIFAR-10 BadNets", 0, 0.25)]
    shown = tables(rows).splitlines()
    for method in COLUMNS:
        parts = 2 if method in THOROUGHLY else 1
        assert sum(line.startswith(f"| `{method}`") for line in shown) == parts * TABLES
    for checkpoint in (*SUBJECTS, *zoo.TEST):
        assert sum(line.startswith(f"| {checkpoint} |") for line in shown) == TABLES
    public = section(rows, "1 image per class**, public checkpoints")
    assert "| `ibau` | 3 |  |  |  |  |  |" in public
    assert any(line.startswith("| `awm` (1 of 35 runs) | 5 | 0.900 |") for line in public)
    assert "| CIFAR-10 BadNets | 80.0 / 100.0 |  | 75.0 / 25.0 |  |  |  |  |" in public


def test_models_trained_for_it_have_tables_of_their_own() -> None:
    """They are not mixed with the public ones, and only two methods stand there."""
    rows = [row("ResNet-18 WaNet", 0, 0.25), row("GTSRB l0-inv", 0, 0.75)]
    trained = section(rows, "1 image per class**, models trained for it")
    assert "| ACC / ASR % | before | `auto` | `awm` |" in trained
    assert "| ResNet-18 WaNet | 80.0 / 100.0 |  | 75.0 / 25.0 |" in trained
    summary = next(line for line in trained if line.startswith("| `awm`"))
    assert summary.startswith("| `awm` (1 of 35 runs) | 5 | 0.900 | 25.0 / 25.0 / – |")
    assert "GTSRB l0-inv" not in "".join(trained)


def test_two_methods_have_five_seeds_and_the_others_three() -> None:
    """With more images per class everyone has one."""
    assert {method: len(seeds(method, 1)) for method in COLUMNS} == {
        method: 5 if method in {"auto", "awm"} else 3 for method in COLUMNS
    }
    assert {len(seeds(method, count)) for method in COLUMNS for count in (5, 50)} == {1}


def test_mean_worst_and_spread_are_over_the_right_rows() -> None:
    """The worst is over all; the spread is between the seeds of one checkpoint, not between these."""
    rows = [
        row("CIFAR-10 BadNets", 0, 0.10),
        row("CIFAR-10 BadNets", 1, 0.12),
        row("GTSRB l0-inv", 0, 0.50),
        row("GTSRB l0-inv", 1, 0.50),
        row("ResNet-18 clean", 0, None, acc_after=0.60),
    ]
    shown = tables(rows).splitlines()
    summary = next(line for line in shown if line.startswith("| `awm` (5 of 35"))
    mean, worst, spread = summary.split("|")[4].split("/")
    assert (mean.strip(), worst.strip()) == ("30.5", "50.0")
    assert spread.strip() == "0.7"  # the mean of 1.41 and 0
    assert summary.split("|")[5].split("/")[1].strip() == "20.0"
    assert "| ResNet-18 clean | 80.0 / – |  | 60.0 / – |  |  |  |  |" in shown


def test_verdicts_are_counted_beside_what_is_left() -> None:
    """A method that gives none shows none."""
    rows = [
        row("CIFAR-10 BadNets", 0, 0.05, method="auto", verdict="backdoored"),
        row("CIFAR-10 BadNets", 1, 0.05, method="auto", verdict="backdoored"),
        row("CIFAR-10 BadNets", 2, 0.05, method="auto", verdict="inconclusive"),
        row("CIFAR-10 BadNets", 0, 0.25),
    ]
    assert (
        "| CIFAR-10 BadNets | 80.0 / 100.0 | 75.0 / 5.0 (2 backdoored, 1 inconclusive) | 75.0 / 25.0 "
        "|  |  |  |  |"
    ) in tables(rows).splitlines()


def test_figures_hold_what_auto_reached_with_one_image_per_class() -> None:
    """Neither other methods nor more images count, and verdicts are counted where there are any."""
    rows = [
        row("CIFAR-10 BadNets", 0, 0.04, method="auto", fidelity=0.9, verdict="backdoored"),
        row("CIFAR-10 BadNets", 1, 0.06, method="auto", fidelity=1.0, verdict="clean"),
        row("CIFAR-10 BadNets", 2, 0.02, method="auto", fidelity=0.8),
        row("ResNet-18 clean", 0, None, acc_after=0.79, method="auto", verdict="backdoored"),
        row("ResNet-18 clean", 1, None, acc_after=0.80, method="auto", verdict="inconclusive"),
        row("CIFAR-10 BadNets", 0, 0.70, fidelity=0.3),
        row("CIFAR-10 BadNets", 0, 1.0, method="auto", fidelity=0.0) | {"per_class": 5},
    ]
    found = figures(rows)
    assert found["awm_fidelity_mean"] == 0.3
    assert found["ibau_fidelity_mean"] is None
    assert {name: found[name] for name in TARGETS} == pytest.approx(
        {
            "auto_fidelity_mean": 0.9,
            "auto_asr_after_max": 0.06,
            "auto_acc_lost_mean": (3 * 0.05 + 0.01 + 0.0) / 5,
            "auto_clean_acc_lost_max": 0.01,
            "auto_clean_called_backdoored": 1,
            "auto_backdoored_called_clean_share": 0.5,
        }
    )


def test_without_rows_of_auto_no_target_is_measured() -> None:
    """Unmeasured is none, never 0."""
    found = figures([row("CIFAR-10 BadNets", 0, 0.25)])
    assert all(found[name] is None for name in TARGETS)


def test_seconds_name_the_devices_they_were_taken_on() -> None:
    """Only those of one device compare."""
    rows = [row("CIFAR-10 BadNets", 0, 0.25), row("CIFAR-10 BadNets", 1, 0.25, device="cuda")]
    public = section(rows, "1 image per class**, public checkpoints")
    assert any(line.endswith("| 2.0 (cpu, cuda) |") for line in public)
