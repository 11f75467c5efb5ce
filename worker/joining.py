"""Put together what the stages of a job say, without torch: the supervisor does it too."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import InternalError


def with_candidates(report: dict[str, Any], files: Sequence[Mapping[str, object]]) -> None:
    """
    Add to each candidate in *report* what there is to say of its file.

    Raises:
        InternalError: There are not as many files as candidates.
    """
    evidence = report.get("evidence") or {}
    described = evidence.get("candidates") or []
    if len(described) != len(files):
        raise InternalError("There are not as many candidates' files as candidates.")
    if described:
        evidence["candidates"] = [
            {**candidate, **file} for candidate, file in zip(described, files, strict=True)
        ]
