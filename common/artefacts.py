"""
The files that a job leaves beside its model: their names, and what the job's row holds of each.

A candidate is kept as its differences from the model (``differences.py``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_CANDIDATES = 21
"""Candidates of a run: of ``auto`` ten strengths at most, for each of two parts, and one more."""

MAX_TRIGGERS = 16
"""Triggers that there are files of: a run with its presets recovers one to eight for each suspect."""

TRIGGERS = "triggers.npz"
"""The recovered triggers, and what they do to the samples."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Digest and size of a file as it is served: of a whole candidate, not of its differences."""

    sha256: str
    bytes: int


def candidate_name(number: int) -> str:
    """Return the name of a candidate, counted from 0 as the report lists them."""
    return f"candidate-{number}"


def trigger_image_name(number: int) -> str:
    """Return the name of a trigger's picture, counted from 0 as the report lists them."""
    return f"trigger-{number}.png"


def as_row(artefacts: Mapping[str, Artefact]) -> dict[str, Any]:
    """Return what the job's row holds of *artefacts*."""
    return {name: asdict(artefact) for name, artefact in artefacts.items()}


def from_row(stored: Mapping[str, Any] | None) -> dict[str, Artefact]:
    """Return what ``as_row`` stored; a job of before there were any has none."""
    return {name: Artefact(**values) for name, values in (stored or {}).items()}


def candidates_among(artefacts: Mapping[str, Artefact]) -> list[Artefact]:
    """Return the candidates, in their order."""
    return _among(artefacts, map(candidate_name, range(MAX_CANDIDATES)))


def trigger_images_among(artefacts: Mapping[str, Artefact]) -> list[Artefact]:
    """Return the triggers' pictures, in their order."""
    return _among(artefacts, map(trigger_image_name, range(MAX_TRIGGERS)))


def _among(artefacts: Mapping[str, Artefact], names: Iterable[str]) -> list[Artefact]:
    return [artefacts[name] for name in names if name in artefacts]
