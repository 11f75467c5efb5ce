"""
What a child leaves in its folder, which is as little to be trusted as what the child was given.

Nothing is followed, nothing is read beyond its limit, and what is not a result is a crash.
"""

import hashlib
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

    candidates: Annotated[list[ClaimedCandidate], Field(max_length=MAX_CANDIDATES)] = []
    triggers: list[dict[str, Any]] = []
    trial: ClaimedTrial | None = None


class ChildResult(BaseModel):
    """What a child may leave; anything else is a crash."""

    model_config = ConfigDict(extra="forbid", strict=True)

    verdict: Literal["clean", "backdoored", "inconclusive"] | None = None
    remediation: Literal["purified", "unchanged", "refused"] | None = None
    report: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None

    @property
    def evidence(self) -> Evidence:
        """What the report says of files beside the model."""
        return Evidence.model_validate((self.report or {}).get("evidence") or {})


def read_result(folder: Path) -> ChildResult | None:
    """Return what the child left, or ``None`` if that is not a result."""
    try:
        with open_plain(folder / RESULT) as file:
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


def digest_output(path: Path, *, limit: int) -> tuple[str, int]:
    """Return digest and size of the output, which may not be a link or larger than *limit*."""
    digest = hashlib.sha256()
    size = 0
    with open_plain(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if size > limit:
                raise InternalError("The written model is implausibly large.")
    return digest.hexdigest(), size


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file; a link or a device that a child put there is an ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path.name} is not a plain file")
    return file
