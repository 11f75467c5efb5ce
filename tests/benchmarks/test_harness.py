"""Law: a conclusion is about what was measured."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import conclude_by, is_met, markdown, measure_all, or_none, recorded

TARGETS = {"fidelity": ">= 0.95", "asr": "<= 0.1"}


def concluded(capsys: pytest.CaptureFixture[str], **figures: float | None) -> dict[str, object]:
    """Return the line that a benchmark ends with."""
    conclude_by("some", figures=figures, targets=TARGETS)
    line: dict[str, object] = json.loads(capsys.readouterr().out)
    return line


def test_a_target_is_met_at_its_limit() -> None:
    """Both limits are inclusive."""
    assert is_met(0.95, ">= 0.95")
    assert not is_met(0.949, ">= 0.95")
    assert is_met(0, "<= 0")
    assert not is_met(1, "<= 0")


def test_every_measured_target_has_to_be_met(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures without a target are shown and decide nothing."""
    assert concluded(capsys, fidelity=0.96, asr=0.1, seconds=7.0) == {
        "benchmark": "some",
        "figures": {"fidelity": 0.96, "asr": 0.1, "seconds": 7.0},
        "targets": TARGETS,
        "unmeasured": [],
        "met": True,
    }
    assert concluded(capsys, fidelity=0.96, asr=0.2)["met"] is False


def test_what_was_not_measured_is_named_and_decides_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its figure is null."""
    line = concluded(capsys, fidelity=0.96, asr=None)
    assert line["figures"] == {"fidelity": 0.96, "asr": None}
    assert line["unmeasured"] == ["asr"]
    assert line["met"] is True


def test_what_is_recorded_is_what_was_measured(tmp_path: Path) -> None:
    """Without the lines that say on which machine, and nothing where there is no file."""
    out = tmp_path / "rows.jsonl"
    rows = measure_all([{"seed": 1}, {"seed": 2}], lambda case: {"asr": case["seed"] / 10}, out)
    assert recorded(out) == rows
    assert len(out.read_text().splitlines()) == 3
    assert recorded(tmp_path / "other.jsonl") == []


def test_each_row_stands_below_the_machine_that_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor of the same name without the same units is another machine."""
    out = tmp_path / "rows.jsonl"

    def measure(seed: int, units: str, computed: torch.dtype | None) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
        monkeypatch.setattr(harness, "autocast_type", lambda *_: computed)
        measure_all([{"seed": seed}], lambda _: {}, out)

    measure(1, "AVX512", torch.bfloat16)
    measure(2, "AVX512", torch.bfloat16)
    measure(3, "AVX512", None)
    measure(4, "AVX2", None)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    shown = [line.get("seed", (line.get("vectors"), line.get("bfloat16"))) for line in lines]
    assert shown == [("AVX512", True), 1, 2, ("AVX512", False), 3, ("AVX2", False), 4]


def test_a_table_has_a_line_for_its_head_and_one_for_each_row() -> None:
    """Between the two stands the line that makes it one."""
    assert markdown(["a", "b"], [["1", ""], ["2", "3"]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 |  |",
        "| 2 | 3 |",
    ]


def test_an_aggregate_of_nothing_is_none() -> None:
    """Never 0."""
    assert or_none(statistics.mean, [1, 2]) == 1.5
    assert or_none(sum, []) is None
