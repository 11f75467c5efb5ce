"""
What a child leaves in its folder, which is as little to be trusted as what the child was given.

Nothing is followed, nothing is read beyond its limit, and what is not a result is a crash.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import PROBLEMS, InternalError, JobCrashed, Problem
from worker.child import RESULT

_CHUNK_BYTES = 1 << 20
_MAX_RESULT_BYTES = 16 << 20
"""Size of a report: a thousand layers and a thousand epochs take less than 1 MiB."""


class ChildResult(BaseModel):
    """What a child may leave; anything else is a crash."""

    model_config = ConfigDict(extra="forbid", strict=True)

    verdict: str | None = None
    remediation: str | None = None
    report: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None


def read_result(folder: Path) -> ChildResult | None:
    """Return what the child left, or ``None`` if that is not a result."""
    try:
        with _open_plain(folder / RESULT) as file:
            text = file.read(_MAX_RESULT_BYTES + 1)
        if len(text) > _MAX_RESULT_BYTES:
            return None
        return ChildResult.model_validate_json(text)
    except (OSError, ValidationError):
        return None


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
    with _open_plain(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if size > limit:
                raise InternalError("The written model is implausibly large.")
    return digest.hexdigest(), size


def _open_plain(path: Path) -> BinaryIO:
    """Open a plain file; a link or a device that a child put there is an ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path.name} is not a plain file")
    return file
