"""
The two processes of a job, and what goes from one to the other.

    uploads → convert → bare tensors → purify → changed tensors → pack → the model

``convert`` and ``pack`` are orders to the one that reads what a client sent; ``purify`` goes to the
other, which sees no uploaded byte. Every file between them passes through the supervisor's hands: opened
as a plain file in the folder that it made, counted, copied, and looked at.
"""

import signal
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import structlog

from common.artefacts import candidate_name
from common.errors import InternalError, JobCrashed, NoStateDict, Refused, TooSlowToRead
from common.formats import safetensors
from common.formats.model import ModelFile, TensorInfo, inspect_model
from common.spec import JobSpec, SamplesInput
from worker.child import OUTPUT
from worker.interchange import CHANGED, NAMES, SETS, WEIGHTS, changed_name
from worker.jail.limits import CONVERT_SECONDS
from worker.leavings import ChildResult, as_problem
from worker.process import Child
from worker.sandbox import Stage
from worker.trial_files import MAX_TRIAL_BYTES, TRIAL

_TICK_SECONDS = 0.1
_SPARE_BYTES = 1 << 20  # headers and names around the tensors
_MEMORY_PER_MODEL_BYTE = 24
"""Copies of a model in memory while it is packed: itself, its changes, its originals, its check, and the
changes of sixteen candidates."""
_MEMORY_PER_VALUE = 32
"""Bytes of memory for a value of an image while it is converted: eight copies as float32."""

log = structlog.get_logger(__name__)

Check = Callable[[], None]


class Pair:
    """
    Two fresh processes for one job.

    They may be started before there is a job: they then wait, with everything imported.
    """

    def __init__(self, folder: Path, *, gpu: bool) -> None:
        """Start both, with homes below *folder*."""
        self.converter = Child.start(folder, Stage.CONVERT)
        self.purifier = Child.start(folder, Stage.PURIFY, gpu=gpu)
        self._busy = self.converter

    @property
    def progress(self) -> dict[str, Any]:
        """The newest progress of whichever is at work."""
        return self._busy.progress

    @property
    def broken(self) -> Child | None:
        """The process that has ended before it had an order, if one has."""
        return next((c for c in (self.converter, self.purifier) if not c.is_alive), None)

    def kill(self) -> None:
        """End both, and remove their homes."""
        self.converter.kill()
        self.purifier.kill()

    def convert(self, spec: JobSpec, *, cpu_seconds: int, check: Check) -> None:
        """
        Let the uploads in the converter's inbox become the purifier's inbox.

        Raises:
            Refused: An upload is not what the specification says, or takes too long to read.
            InternalError: The conversion left something else than it must.
        """
        self._order(
            self.converter, "convert", spec, cpu_seconds, check=check, seconds=CONVERT_SECONDS
        )
        limits = {WEIGHTS: _largest_model(spec), NAMES: 16 << 20}
        sets = {name: _spare(4 * _values(spec.roles[name])) for name in SETS if name in spec.roles}
        for name, limit in (limits | sets).items():
            self.converter.take(name, self.purifier.inbox / name, limit=limit)
        for name in (WEIGHTS, *sets):
            _require_safetensors(self.purifier.inbox / name)

    def purify(
        self, spec: JobSpec, *, device: str, threads: int, cpu_seconds: int, check: Check
    ) -> ChildResult:
        """
        Purify what was converted; return what it came to, and end the purifier.

        Raises:
            Problem: What the process met.
        """
        result = self._order(
            self.purifier,
            "purify",
            spec,
            cpu_seconds,
            check=check,
            device=device,
            threads=threads,
        )
        self.purifier.stop()
        return result

    def pack(
        self, spec: JobSpec, *, folder: Path, candidates: int, cpu_seconds: int, check: Check
    ) -> ChildResult:
        """
        Let the purifier's changes become the model and its candidates, and end the converter.

        Raises:
            Problem: What the process met.
        """
        names = [CHANGED, *(changed_name(number) for number in range(candidates))]
        for name in names:
            self.purifier.take(name, self.converter.inbox / name, limit=_largest_model(spec))
            _require_safetensors(self.converter.inbox / name)
        result = self._order(self.converter, "pack", spec, cpu_seconds, check=check)
        self.converter.stop()
        for name in (OUTPUT, *(candidate_name(number) for number in range(candidates))):
            self.converter.take(name, folder / name, limit=_largest_model(spec))
        _require_the_same(folder / OUTPUT, self.purifier.inbox / WEIGHTS, spec)
        return result

    def take_trial(self, folder: Path) -> None:
        """Copy the numbers of the triggers' trial to *folder*."""
        self.purifier.take(TRIAL, folder / TRIAL, limit=MAX_TRIAL_BYTES)

    def _order(
        self,
        child: Child,
        step: str,
        spec: JobSpec,
        cpu_seconds: int,
        *,
        check: Check,
        seconds: float | None = None,
        **more: Any,
    ) -> ChildResult:
        """Let *child* do one step; return how it answered."""
        self._busy = child
        floats = sum(_values(file) for file in spec.roles.values())
        limits = {
            "file_bytes": max(_largest_model(spec), _spare(4 * floats), MAX_TRIAL_BYTES),
            "memory_bytes": _MEMORY_PER_MODEL_BYTE * spec.model.bytes + _MEMORY_PER_VALUE * floats,
            "cpu_seconds": cpu_seconds,
        }
        order = {"step": step, "spec": spec.model_dump(mode="json"), "limits": limits, **more}
        child.give(order)
        started = None
        while not child.wait(_TICK_SECONDS):
            check()
            if started is None and child.has_begun:  # before that, it imports torch
                started = time.monotonic()
            if seconds and started and time.monotonic() - started > seconds:
                raise TooSlowToRead(f"Reading the files took longer than {seconds:.0f} s.")
        result = child.result()
        if result is None:
            child.stop()
            log.error("child-crashed", exit_status=child.exit_status, last_words=child.last_words)
            raise JobCrashed(_describe_death(child.exit_status))
        if result.problem is not None:
            raise as_problem(result.problem)
        return result


def _describe_death(exit_status: int | None) -> str:
    if exit_status == -signal.SIGKILL:
        return "The job's process was killed, as the kernel does when memory runs out."
    return f"The job's process ended with the status {exit_status}."


def _largest_model(spec: JobSpec) -> int:
    return _spare(spec.model.bytes * 2)


def _spare(size: int) -> int:
    return size + _SPARE_BYTES


def _values(file: object) -> int:
    """Return how many numbers the images of an uploaded set are."""
    return file.count * prod(file.image_shape) if isinstance(file, SamplesInput) else 0


def _require_safetensors(path: Path) -> ModelFile | None:
    """Return what *path* holds, or ``None`` if it is honest and empty."""
    try:
        return safetensors.inspect(path)
    except NoStateDict:
        return None
    except Refused as exc:
        raise InternalError(f"A job's process left a damaged file: {exc.detail}") from exc


def _require_the_same(output: Path, weights: Path, spec: JobSpec) -> None:
    """
    Hold what is offered for download against the gate, and against the tensors that were uploaded.

    Raises:
        InternalError: The gate refuses it, or a tensor has another shape or type than it had.
    """
    try:
        written, uploaded = inspect_model(output), safetensors.inspect(weights)
    except Refused as exc:
        raise InternalError(f"The written model is refused: {exc.detail}") from exc
    expected = {(uploaded.prefix + key, *_kind(info)) for key, info in uploaded.tensors.items()}
    found = {(key, *_kind(info)) for key, info in written.tensors.items()}
    if written.format is not spec.model.format or not expected <= found:
        raise InternalError("The written model has other tensors than the uploaded one.")


def _kind(tensor: TensorInfo) -> tuple[tuple[int, ...], str]:
    return tensor.shape, tensor.dtype
