"""
What a job is asked to do: made by the service, kept in the job's row, read by the worker's child.

Everything in it has been checked by the service, and everything that touches a file is checked again by
the worker, which trusts neither.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from common.formats.model import ModelFormat


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelInput(_Value):
    """The uploaded model."""

    name: str  # as the client called it, for display and for the download's name
    sha256: str
    bytes: int
    format: ModelFormat


class SamplesInput(_Value):
    """One of the uploaded sample files."""

    sha256: str
    bytes: int
    count: int
    classes: int | None  # classes that have a sample; None without labels
    image_shape: tuple[int, int, int]  # (channels, height, width)


class JobSpec(_Value):
    """One job."""

    model: ModelInput
    samples: SamplesInput
    evaluation: SamplesInput | None = None
    triggered: SamplesInput | None = None
    architecture: str
    architecture_args: dict[str, Any]
    classes: int
    method: str
    params: dict[str, Any]  # fully resolved
    seed: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    path: str | None = None

    @property
    def download_name(self) -> str:
        """The name of the purified model: ``<uploaded stem>-clean<suffix>``."""
        return self._named("clean")

    def candidate_download_name(self, number: int) -> str:
        """Return the name of a candidate: ``<uploaded stem>-clean-candidate<number><suffix>``."""
        return self._named(f"clean-candidate{number}")

    def name_beside(self, ending: str) -> str:
        """Return the name of something else that the job leaves: ``<uploaded stem>-<ending>``."""
        return f"{self.model.name.rpartition('.')[0] or self.model.name}-{ending}"

    def _named(self, ending: str) -> str:
        stem, dot, suffix = self.model.name.rpartition(".")
        return f"{stem}-{ending}.{suffix}" if dot and stem else f"{self.model.name}-{ending}"

    @property
    def roles(self) -> dict[str, ModelInput | SamplesInput]:
        """Every uploaded file by its role."""
        files = {
            "model": self.model,
            "samples": self.samples,
            "evaluation": self.evaluation,
            "triggered": self.triggered,
        }
        return {role: file for role, file in files.items() if file is not None}
