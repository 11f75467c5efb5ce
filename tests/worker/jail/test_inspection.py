"""A real prisoner in real jails: each wall holds its own attempts by itself, and all hold all."""

from pathlib import Path

import pytest

from tests.support.jail import needs
from worker.jail.inspection import imprison, inspect
from worker.jail.verdict import all_probes
from worker.sandbox import LAYERS, Layer, Stage

HELD = {
    Layer.LIMITS: {"large-file", "many-files"},
    Layer.LANDLOCK: {
        "read-other-job",
        "write-outside",
        "worker-environment",
        "worker-memory",
        "exec",
    },
    Layer.SECCOMP: {
        "bpf",
        "change-mode",
        "connect",
        "exec",
        "fork",
        "io-uring",
        "kernel-module",
        "kexec",
        "keyring",
        "mount",
        "namespace",
        "perf-event",
        "ptrace",
        "read-across",
        "signal",
        "socket-inet",
        "socket-pair",
        "socket-unix",
        "userfaultfd",
    },
}


def through(folder: Path, layers: frozenset[Layer]) -> set[str]:
    """Return what got through the walls *layers*, of everything that was tried."""
    answers = imprison(folder, Stage.CONVERT, layers=layers)
    assert set(answers) == set(all_probes())
    assert None not in answers.values()
    return {probe for probe, got_through in answers.items() if got_through}


def test_the_prisoner_can_do_what_he_tries(tmp_path: Path) -> None:
    """Without a wall the attempts get through: what holds them is the walls, not a want of trying."""
    found = through(tmp_path, frozenset())
    assert found >= {
        *("large-file", "many-files", "memory", "read-other-job", "write-outside", "connect"),
        *("signal", "socket-inet", "socket-unix", "socket-pair", "fork", "change-mode", "exec"),
    }


@pytest.mark.parametrize(
    "layer", [pytest.param(layer, marks=needs(layer)) for layer in HELD], ids=list(HELD)
)
def test_each_wall_holds_by_itself(tmp_path: Path, layer: Layer) -> None:
    """A wall alone stops what it is there for."""
    assert not through(tmp_path, frozenset({layer})) & HELD[layer]


@needs(Layer.MEMORY)
def test_memory_is_capped_by_itself(tmp_path: Path) -> None:
    """Address space over the cap is not given."""
    assert "memory" not in through(tmp_path, frozenset({Layer.MEMORY, Layer.LIMITS}))


@needs(Layer.LANDLOCK)
@needs(Layer.SECCOMP)
@needs(Layer.MEMORY)
def test_all_walls_hold_everything_in_every_stage(tmp_path: Path) -> None:
    """Nothing gets through the jail of a job, and nothing of the inspection stays."""
    verdict = inspect(tmp_path, gpu=False)
    assert (verdict.leaking, verdict.open) == ((), ())
    assert set(verdict.layers.values()) == {"holds"}
    assert not list(tmp_path.iterdir())


@needs(Layer.SECCOMP)
def test_wall_that_is_not_put_up_leaks(tmp_path: Path) -> None:
    """A wall that the platform has and that does not stand refuses jobs, whatever is required."""
    verdict = inspect(tmp_path, gpu=False, layers=LAYERS - {Layer.SECCOMP})
    assert "fork" in verdict.leaking
    assert verdict.layers[Layer.SECCOMP].startswith("leaks: ")
    for required in (True, False):
        assert "fork" in (verdict.problem(required=required) or "")
