"""Jails for tests: chosen walls, and a job's process on files that never passed the gate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.spec import JobSpec
from worker import sandbox
from worker.leavings import ChildResult
from worker.process import Child
from worker.sandbox import LAYERS, Layer, Stage

LIMITS = {"file_bytes": 64 << 20, "memory_bytes": 1 << 30, "cpu_seconds": 120}


def needs(layer: Layer) -> pytest.MarkDecorator:
    """Skip a test where the platform lacks *layer*, and say why."""
    why = sandbox.missing().get(layer)
    return pytest.mark.skipif(why is not None, reason=f"{layer}: {why}")


@contextmanager
def converter(folder: Path, *, layers: frozenset[Layer] = LAYERS) -> Iterator[Child]:
    """Start the process that parses uploads, behind the walls *layers* alone."""
    child = Child.start(folder, Stage.CONVERT, layers=layers)
    try:
        yield child
    finally:
        child.kill()


def convert(
    child: Child,
    files: Mapping[str, bytes],
    spec: JobSpec,
    *,
    seconds: float = 120,
) -> ChildResult | None:
    """
    Let *child* convert *files*, by role, none of which any gate has seen.

    Return its answer, or ``None`` if it died, or gave none.
    """
    for role, content in files.items():
        (child.inbox / role).write_bytes(content)
    child.give({"step": "convert", "spec": spec.model_dump(mode="json"), "limits": LIMITS})
    assert child.wait(seconds), "the process has neither answered nor ended"
    return child.result()
