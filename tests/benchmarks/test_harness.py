"""Law: a conclusion is about what was measured."""

import json

import pytest

from benchmarks.harness import conclude_by, is_met

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
