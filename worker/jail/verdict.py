"""
What the prisoner's attempts say of the walls, and whether jobs may run behind them.

An attempt that gets through is laid at the door of every wall that should have held it. A wall that is
there and leaks is a fault of ours, or an attack: no job runs. A wall that the platform does not have
lets through what it lets through: jobs run where the operator takes that (``best-effort``).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from worker.jail import landlock
from worker.jail.hostile import LAST, PROBES
from worker.sandbox import Layer

_GUARDS: Mapping[str, frozenset[Layer]] = {
    "environment": frozenset({Layer.PROCESS}),
    "descriptors": frozenset({Layer.PROCESS}),
    "core-dump": frozenset({Layer.PROCESS}),
    "large-file": frozenset({Layer.LIMITS}),
    "many-files": frozenset({Layer.LIMITS}),
    "memory": frozenset({Layer.MEMORY}),
    "read-other-job": frozenset({Layer.LANDLOCK}),
    "write-outside": frozenset({Layer.LANDLOCK}),
    "worker-environment": frozenset({Layer.LANDLOCK}),
    "worker-memory": frozenset({Layer.LANDLOCK}),
    "connect": frozenset({Layer.SECCOMP, Layer.LANDLOCK}),
    "signal": frozenset({Layer.SECCOMP, Layer.LANDLOCK}),
    "ptrace": frozenset({Layer.SECCOMP, Layer.LANDLOCK}),
    "read-across": frozenset({Layer.SECCOMP, Layer.LANDLOCK}),
    LAST: frozenset({Layer.SECCOMP, Layer.LANDLOCK}),
}
"""The walls that hold each attempt; what is not named is seccomp's alone."""


def guards(probe: str, *, landlock_abi: int) -> frozenset[Layer]:
    """Return the walls that should hold *probe*, as far as this kernel's Landlock can."""
    found = _GUARDS.get(probe, frozenset({Layer.SECCOMP}))
    since = {"connect": landlock.NETWORK_SINCE, "signal": landlock.SCOPED_SINCE}
    if landlock_abi < since.get(probe, 1):
        found -= {Layer.LANDLOCK}
    return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """
    How the walls held.

    Attributes:
        layers: What there is to say of each wall: it holds, it is missing, it leaks.
        leaking: The attempts that got through a wall that is there.
        open: The attempts that nothing here could have held.
    """

    layers: Mapping[Layer, str]
    leaking: tuple[str, ...]
    open: tuple[str, ...]

    def problem(self, *, required: bool) -> str | None:
        """Return why no job may run, or ``None`` if jobs may."""
        if self.leaking:
            return f"the sandbox leaks: {', '.join(self.leaking)}"
        if self.open and required:
            absent = [str(layer) for layer, state in self.layers.items() if state != HOLDS]
            return (
                f"the sandbox is required, and this machine lacks {', '.join(absent)}; "
                "WEIGHTWASH_SANDBOX=best-effort runs jobs without"
            )
        return None


HOLDS = "holds"


def judge(
    answers: Mapping[str, bool | None], absent: Mapping[Layer, str], *, landlock_abi: int
) -> Verdict:
    """
    Return what the attempts come to.

    Args:
        answers: Whether each attempt got through; ``None`` if the prisoner never said.
        absent: The walls that this platform lacks, and why.
    """
    leaking: list[str] = []
    unheld: list[str] = []
    leaks: dict[Layer, list[str]] = {}
    for probe, through in answers.items():
        if through is False:
            continue
        present = guards(probe, landlock_abi=landlock_abi) - absent.keys()
        (leaking if present or through is None else unheld).append(probe)
        for layer in present:
            leaks.setdefault(layer, []).append(probe)
    return Verdict(
        layers={layer: _state(layer, absent, leaks) for layer in Layer},
        leaking=tuple(leaking),
        open=tuple(unheld),
    )


def _state(layer: Layer, absent: Mapping[Layer, str], leaks: Mapping[Layer, list[str]]) -> str:
    if layer in absent:
        return f"missing: {absent[layer]}"
    if layer in leaks:
        return f"leaks: {', '.join(leaks[layer])}"
    return HOLDS


def all_probes() -> tuple[str, ...]:
    """Return every attempt that a prisoner makes."""
    return (*PROBES, LAST)
