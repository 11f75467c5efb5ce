"""What attempts that got through mean for jobs."""

import pytest

from worker.jail.verdict import all_probes, guards, judge
from worker.sandbox import Layer

ABI = 7
HELD: dict[str, bool | None] = dict.fromkeys(all_probes(), False)
NO_LANDLOCK = {Layer.LANDLOCK: "not in this kernel"}
NO_SECCOMP = {Layer.SECCOMP: "not installed"}


def test_walls_that_hold_let_jobs_run() -> None:
    """Where nothing gets through, jobs run, and every wall is said to hold."""
    verdict = judge(HELD, {}, landlock_abi=ABI)
    assert verdict.problem(required=True) is None
    assert set(verdict.layers.values()) == {"holds"}


@pytest.mark.parametrize("probe", all_probes())
@pytest.mark.parametrize("answer", [True, None])
def test_one_attempt_that_gets_through_stops_all_jobs(probe: str, answer: bool | None) -> None:
    """With every wall there, one leak is enough, and so is a prisoner who falls silent."""
    verdict = judge({**HELD, probe: answer}, {}, landlock_abi=ABI)
    assert verdict.leaking == (probe,)
    for required in (True, False):
        assert probe in (verdict.problem(required=required) or "")
    for layer in guards(probe, landlock_abi=ABI):
        assert verdict.layers[layer] == f"leaks: {probe}"


def test_missing_wall_stops_jobs_only_where_it_is_required() -> None:
    """What no wall here could have held is shown, and is the operator's decision."""
    verdict = judge({**HELD, "read-other-job": True}, NO_LANDLOCK, landlock_abi=0)
    assert verdict.layers[Layer.LANDLOCK] == "missing: not in this kernel"
    assert verdict.problem(required=False) is None
    assert "landlock" in (verdict.problem(required=True) or "")


def test_missing_wall_excuses_no_other() -> None:
    """An attempt that a second wall should have held is that one's leak."""
    verdict = judge({**HELD, "exec": True}, NO_SECCOMP, landlock_abi=ABI)
    assert verdict.layers[Layer.LANDLOCK] == "leaks: exec"
    assert verdict.problem(required=False) is not None


def test_old_landlock_is_not_blamed_for_what_it_cannot_do() -> None:
    """Before its fourth version Landlock knows no network, before its sixth no signals."""
    answers = {**HELD, "connect": True, "signal": True}
    verdict = judge(answers, NO_SECCOMP, landlock_abi=2)
    assert verdict.open == ("connect", "signal")
    assert verdict.problem(required=False) is None
    assert judge(answers, NO_SECCOMP, landlock_abi=4).leaking == ("connect",)
    assert judge(answers, NO_SECCOMP, landlock_abi=6).leaking == ("connect", "signal")


@pytest.mark.parametrize("abi", range(8))
def test_every_attempt_has_a_wall(abi: int) -> None:
    """No attempt is made that nothing is meant to stop."""
    assert all(guards(probe, landlock_abi=max(abi, 1)) for probe in all_probes())
