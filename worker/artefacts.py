"""
What a child leaves beside the model, checked and measured by the supervisor before it is stored.

It lies in the child's folder under the names of ``common/artefacts.py``.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from common import differences
from common.artefacts import Artefact, candidate_name
from common.errors import InternalError
from worker.child import OUTPUT
from worker.leavings import Evidence, open_plain

_CHUNK_BYTES = 1 << 20


def check_candidates(
    folder: Path, evidence: Evidence, *, check: Callable[[], None]
) -> dict[str, Artefact]:
    """
    Put every candidate together once, and hold it against what the child says that it verified.

    Args:
        folder: Where the model and the candidates' differences lie.
        check: Called between two chunks; what it raises ends the work.

    Raises:
        InternalError: A candidate is not what was verified.
        OSError: A file is missing, or is no plain file.
    """
    found = {}
    for number, claimed in enumerate(evidence.candidates):
        artefact = _measure(folder / OUTPUT, folder / candidate_name(number), check)
        if artefact != Artefact(sha256=claimed.sha256, bytes=claimed.bytes):
            raise InternalError("A candidate is not the one that was verified.")
        found[candidate_name(number)] = artefact
    return found


def _measure(model: Path, candidate: Path, check: Callable[[], None]) -> Artefact:
    digest, size = hashlib.sha256(), 0
    try:
        with (
            open_plain(model) as base,
            open_plain(candidate) as changed,
            differences.whole(base, changed) as file,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                check()
                digest.update(chunk)
                size += len(chunk)
    except ValueError as exc:
        raise InternalError(f"A candidate cannot be put together: {exc}.") from exc
    return Artefact(sha256=digest.hexdigest(), bytes=size)
