"""
What a child leaves beside the model, checked and measured by the supervisor before it is stored.

It lies in the child's folder under the names of ``common/artefacts.py``.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from common import differences
from common.artefacts import TRIGGERS, Artefact, candidate_name, trigger_image_name
from common.errors import InternalError
from common.spec import JobSpec
from worker import trial_files
from worker.child import OUTPUT
from worker.contact_sheet import contact_sheet, png
from worker.leavings import ClaimedCandidate, Evidence, open_plain

_CHUNK_BYTES = 1 << 20


def check_candidates(
    folder: Path, claims: Sequence[ClaimedCandidate], *, check: Callable[[], None]
) -> dict[str, Artefact]:
    """
    Put every candidate together once, and hold it against what the child says that it verified.

    Args:
        folder: Where the model and the candidates' differences lie.
        claims: What the child says of the candidates' files.
        check: Called between two chunks; what it raises ends the work.

    Raises:
        InternalError: A candidate is not what was verified.
        OSError: A file is missing, or is no plain file.
    """
    found = {}
    for number, claimed in enumerate(claims):
        artefact = _measure(folder / OUTPUT, folder / candidate_name(number), check)
        if artefact != Artefact(sha256=claimed.sha256, bytes=claimed.bytes):
            raise InternalError("A candidate is not the one that was verified.")
        found[candidate_name(number)] = artefact
    return found


def make_trigger_files(folder: Path, evidence: Evidence, spec: JobSpec) -> dict[str, Artefact]:
    """
    Make the files of the recovered triggers out of the numbers that the child left.

    Raises:
        InternalError: They are not what an honest child leaves.
        OSError: They are missing, or lie in no plain file.
    """
    if evidence.trial is None:
        return {}
    counts = trial_files.Counts(**evidence.trial.model_dump())
    try:
        with open_plain(folder / trial_files.TRIAL) as file:
            arrays = trial_files.read(
                file,
                counts,
                image_shape=spec.samples.image_shape,
                classes=spec.classes,
                samples=spec.samples.count,
            )
    except ValueError as exc:
        raise InternalError(f"The trial of the triggers is damaged: {exc}.") from exc
    trial_files.write_npz(arrays, folder / TRIGGERS)
    names = [trigger_image_name(number) for number in range(counts.triggers)]
    for number, name in enumerate(names):
        with (folder / name).open("xb") as image:
            image.write(png(contact_sheet(arrays, number)))
    return {name: _describe(folder / name) for name in (TRIGGERS, *names)}


def _describe(path: Path) -> Artefact:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Artefact(sha256=digest.hexdigest(), bytes=path.stat().st_size)


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
