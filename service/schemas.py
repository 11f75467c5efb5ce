"""What the service answers, as it stands in ``/openapi.json``."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.artefacts import TRIGGERS, candidates_among, from_row, trigger_images_among
from common.db import Job, State
from common.spec import JobSpec
from service import problems


class _Schema(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Progress(_Schema):
    """How far a job is."""

    phase: str = Field(examples=["purify"])
    fraction: float | None = Field(description="Done part of the whole job, 0 to 1.")
    step: int
    total: int = Field(description="Steps of the present phase; 0 when it has none.")
    eta_seconds: float | None


class ModelView(_Schema):
    """The uploaded model."""

    name: str
    sha256: str
    bytes: int
    format: str
    architecture: str
    architecture_args: dict[str, Any]


class SamplesView(_Schema):
    """An uploaded sample file; ``classes`` is null when it has no labels."""

    sha256: str
    bytes: int
    count: int
    classes: int | None


class InputView(_Schema):
    """What was uploaded."""

    model: ModelView
    samples: SamplesView
    evaluation: SamplesView | None
    triggered: SamplesView | None
    mean: list[float] | None
    std: list[float] | None
    path: str | None


class MeasuredBefore(_Schema):
    """Fractions measured on the uploaded model; null when not measured."""

    accuracy: float | None = None
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None


class MeasuredAfter(MeasuredBefore):
    """Fractions measured on the purified model; null when not measured."""

    agreement: float | None = Field(
        None, description="Evaluation images that both models answer alike."
    )
    fidelity: float | None = None


class Metrics(_Schema):
    """ACC, ASR, RA, agreement and fidelity."""

    before: MeasuredBefore = MeasuredBefore()
    after: MeasuredAfter = MeasuredAfter()


class ProblemView(_Schema):
    """An RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable; act on this one.")
    hint: str = Field(description="One sentence that names the fix.")
    request_id: str


class Links(_Schema):
    """Absolute addresses; null when there is nothing under them now."""

    self: str
    model: str | None
    model_sha256: str | None
    candidates: list[str] | None = Field(
        description="Every candidate of the run as a model, in the report's order."
    )
    triggers: str | None = Field(description="The recovered triggers as arrays.")
    trigger_images: list[str] | None = Field(
        description="A picture of each trigger, in the report's order."
    )
    report: str | None
    cancel: str | None


class JobView(_Schema):
    """One job."""

    id: str
    object: Literal["job"] = "job"
    state: State
    verdict: Literal["clean", "backdoored", "inconclusive"] | None
    remediation: Literal["purified", "unchanged", "refused"] | None
    progress: Progress
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    input: InputView
    method: str
    params: dict[str, Any] = Field(description="Every parameter of the method, fully resolved.")
    seed: int
    priority: int
    metrics: Metrics
    output: dict[str, Any] | None = Field(description="Name, sha256 and bytes of the result.")
    gate: None = Field(None, description="Not evaluated yet.")
    error: ProblemView | None
    attempt: int
    request_id: str
    metadata: dict[str, Any]
    links: Links


class JobList(_Schema):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: Sequence[JobView]
    has_more: bool


class DryRun(_Schema):
    """What a job would be; nothing was queued or stored."""

    object: Literal["dry_run"] = "dry_run"
    input: InputView
    architecture_check: Literal["fits", "checked by the worker"] = Field(
        description="Whether the state dict fits is known here for the built-in architectures alone."
    )
    method: str
    params: dict[str, Any]
    seed: int


class ArchitectureView(_Schema):
    """An architecture that a state dict can be loaded into."""

    name: str
    description: str
    arguments: dict[str, Any] = Field(description="JSON schema of `architecture_args`.")
    built_in: bool = Field(description="Else a worker announced it, and checks what is sent.")


class MethodView(_Schema):
    """A purification method."""

    name: str
    description: str
    parameters: dict[str, Any] = Field(description="JSON schema of `params`.")
    default: bool


class Catalogue(_Schema):
    """A list of what can be asked for."""

    object: Literal["list"] = "list"
    data: Sequence[ArchitectureView] | Sequence[MethodView]


class Health(_Schema):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(_Schema):
    """One part that a working service needs."""

    ok: bool
    detail: str


class WorkerView(_Schema):
    """
    A worker that was heard of lately.

    ``problem`` says why it takes no jobs. ``sandbox`` says of each wall of its jobs' jail whether it
    ``holds``, is ``missing: `` for a reason, or ``leaks: `` what; it is null until that was tried.
    """

    name: str
    device: str
    problem: str | None
    sandbox: dict[str, str] | None


class Readiness(_Schema):
    """Whether jobs are accepted and will be worked on."""

    ready: bool
    checks: dict[str, Check]
    workers: list[WorkerView]


def job_view(job: Job, base_url: str, *, is_expired: bool) -> JobView:
    """Return the job as clients see it."""
    spec = JobSpec.model_validate(job.spec)
    state = State(job.state)
    address = f"{base_url}/jobs/{job.id}"
    has_model = state is State.SUCCEEDED and not is_expired
    artefacts = from_row(job.artefacts) if has_model else {}
    has_report = job.report is not None and not is_expired
    return JobView(
        id=job.id,
        state=state,
        verdict=job.verdict,
        remediation=job.remediation,
        progress=Progress.model_validate(job.progress),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        expires_at=job.expires_at,
        input=input_view(spec),
        method=spec.method,
        params=spec.params,
        seed=spec.seed,
        priority=job.priority,
        metrics=Metrics.model_validate((job.report or {}).get("metrics", {})),
        output={
            "name": spec.download_name,
            "sha256": job.output_sha256,
            "bytes": job.output_bytes,
        }
        if state is State.SUCCEEDED
        else None,
        error=_stored_problem(job, address),
        attempt=job.attempt,
        request_id=job.request_id,
        metadata=job.client_metadata,
        links=Links(
            self=address,
            model=f"{address}/model" if has_model else None,
            model_sha256=f"{address}/model.sha256" if has_model else None,
            candidates=[
                f"{address}/model?candidate={number}"
                for number in range(len(candidates_among(artefacts)))
            ]
            or None,
            triggers=f"{address}/triggers.npz" if TRIGGERS in artefacts else None,
            trigger_images=[
                f"{address}/triggers/{number}.png"
                for number in range(len(trigger_images_among(artefacts)))
            ]
            or None,
            report=f"{address}/report.json" if has_report else None,
            cancel=None if state.is_terminal else f"{address}/cancel",
        ),
    )


def input_view(spec: JobSpec) -> InputView:
    """Return what was uploaded."""
    samples = {
        role: SamplesView.model_validate(file.model_dump(exclude={"image_shape"}))
        for role, file in spec.roles.items()
        if role != "model"
    }
    return InputView(
        model=ModelView(
            **spec.model.model_dump(),
            architecture=spec.architecture,
            architecture_args=spec.architecture_args,
        ),
        samples=samples["samples"],
        evaluation=samples.get("evaluation"),
        triggered=samples.get("triggered"),
        mean=None if spec.mean is None else list(spec.mean),
        std=None if spec.std is None else list(spec.std),
        path=spec.path,
    )


def progress_line(job: Job) -> str:
    """Return the job in one line, such as ``running 43% purify step 9/21 eta 35s``."""
    progress = Progress.model_validate(job.progress)
    if job.state == State.QUEUED:
        return "queued"
    if job.state != State.RUNNING:
        code = (job.error or {}).get("code")
        return f"{job.state} {code}" if code else str(job.state)
    parts = [f"running {100 * (progress.fraction or 0):.0f}% {progress.phase}"]
    if progress.total:
        parts.append(f"step {progress.step}/{progress.total}")
    if progress.eta_seconds is not None:
        parts.append(f"eta {progress.eta_seconds:.0f}s")
    return " ".join(parts)


def _stored_problem(job: Job, instance: str) -> ProblemView | None:
    if job.error is None:
        return None
    return ProblemView.model_validate(
        problems.stored_document(job.error, instance=instance, request_id=job.request_id)
    )
