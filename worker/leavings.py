"""
What a child leaves in its folder, which is as little to be trusted as what the child was given.

Nothing is followed, nothing is read beyond its limit, and what is not a result is a crash.
"""

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from common.artefacts import MAX_CANDIDATES, MAX_TRIGGERS
from common.errors import PROBLEMS, InternalError, JobCrashed, Problem
from worker.child import RESULT
from worker.trial_files import MAX_SAMPLES

_CHUNK_BYTES = 1 << 20
_MAX_RESULT_BYTES = 16 << 20
"""Size of a report: a thousand layers and a thousand epochs take less than 1 MiB."""


_Fraction = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_METRICS = TypeAdapter(dict[Literal["before", "after"], dict[str, _Fraction | None]])


class ClaimedCandidate(BaseModel):
    """What a child says of the file of a candidate that it wrote and verified."""

    model_config = ConfigDict(strict=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class ClaimedTrial(BaseModel):
    """How much a child says that it tried."""

    model_config = ConfigDict(strict=True, extra="forbid")

    triggers: Annotated[int, Field(ge=1, le=MAX_TRIGGERS)]
    samples: Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
    shown: Annotated[int, Field(ge=0, le=MAX_SAMPLES)]

    @model_validator(mode="after")
    def _show_no_more_than_was_tried(self) -> Self:
        if self.shown > self.samples:
            raise ValueError("more samples are shown than were tried")
        return self


class Evidence(BaseModel):
    """The parts of a report's evidence that files belong to."""

    model_config = ConfigDict(strict=True)

    candidates: Annotated[list[dict[str, Any]], Field(max_length=MAX_CANDIDATES)] = []
    triggers: list[dict[str, Any]] = []
    trial: ClaimedTrial | None = None


class ChildResult(BaseModel):
    """What a child may leave; anything else is a crash."""

    model_config = ConfigDict(extra="forbid", strict=True)

    verdict: Literal["clean", "backdoored", "inconclusive"] | None = None
    remediation: Literal["purified", "unchanged", "refused"] | None = None
    report: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None
    files: Annotated[list[ClaimedCandidate], Field(max_length=MAX_CANDIDATES)] | None = None

    @property
    def evidence(self) -> Evidence:
        """What the report says of files beside the model."""
        return Evidence.model_validate((self.report or {}).get("evidence") or {})


def read_result(folder: int) -> ChildResult | None:
    """Return what the child left in the open *folder*, or ``None`` if that is not a result."""
    try:
        with open_plain(RESULT, folder=folder) as file:
            text = file.read(_MAX_RESULT_BYTES + 1)
        if len(text) > _MAX_RESULT_BYTES:
            return None
        return _parse(text)
    except (OSError, ValueError, KeyError, RecursionError):
        return None


def _parse(text: bytes) -> ChildResult:
    result = ChildResult.model_validate(json.loads(text, parse_constant=_refuse_constant))
    if result.report is not None:
        _METRICS.validate_python(result.report["metrics"])
    _ = result.evidence  # what is no evidence is no result either
    return result


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which no database takes as JSON."""
    raise ValueError(name)


def as_problem(stored: dict[str, Any]) -> Problem:
    """Turn a child's problem back into its class; an unknown code is a crash."""
    known = PROBLEMS.get(str(stored.get("code")))
    if known is None:
        return JobCrashed("The job's process reported a problem that does not exist.")
    return known(str(stored.get("detail"))[:2000])


def copy_plain(name: str, target: Path, *, limit: int, folder: int) -> None:
    """
    Copy the plain file *name* in the open *folder* to the new file *target*.

    Raises:
        InternalError: It is larger than *limit*.
        OSError: It is missing, or no plain file.
    """
    copied = 0
    with open_plain(name, folder=folder) as source, target.open("xb") as copy:
        while chunk := source.read(_CHUNK_BYTES):
            copied += len(chunk)
            if copied > limit:
                raise InternalError(f"A job's process left an implausibly large {name}.")
            copy.write(chunk)


def open_plain(name: str | Path, *, folder: int | None = None) -> BinaryIO:
    """
    Open a plain file; a link or a device that a child put there is an ``OSError``.

    Args:
        folder: An open folder in which *name* lies, whatever has taken its place since.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(name, flags, dir_fd=folder)
    file = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    # A second name would be another file's, which the child could not read itself.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        file.close()
        raise OSError(f"{Path(name).name} is not a plain file")
    return file
