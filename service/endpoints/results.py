"""What a job leaves: the purified model, the other candidates, the triggers, the report."""

from itertools import zip_longest
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from common import jobs
from common.artefacts import (
    TRIGGERS,
    Artefact,
    candidate_name,
    candidates_among,
    from_row,
    trigger_image_name,
    trigger_images_among,
)
from common.blobs import artefact_key
from common.db import Job, State
from common.errors import (
    Expired,
    InternalError,
    InvalidField,
    NoModel,
    NoReport,
    NoSuchCandidate,
    NoSuchTrigger,
    RangeNotSatisfiable,
    StillRunning,
)
from common.spec import JobSpec
from service import downloads, problems
from service.auth import Principal
from service.context import Context, Here, JobId, Reader, base_url, in_thread, json_answer
from service.downloads import Download
from service.openapi import PROBLEM_RESPONSES, TRIGGER_ARRAYS, TRIGGER_PICTURE
from service.schemas import Links, job_view, progress_line

Candidate = Annotated[
    int | None,
    Query(
        ge=0,
        description="Another result of the run: its place in the report's `evidence.candidates`, from 0. "
        "Without it the chosen one is sent. Only `auto` makes candidates.",
    ),
]

router = APIRouter(responses=PROBLEM_RESPONSES)


@router.head("/jobs/{job_id}/model", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/model",
    summary="Download the purified model",
    response_class=Response,
    responses={
        200: {"description": "The model.", "content": {"application/octet-stream": {}}},
        206: {"description": "The range of it that was asked for."},
        304: {"description": "It is as `If-None-Match` says."},
    },
)
async def read_model(  # noqa: D103
    request: Request,
    here: Here,
    caller: Reader,
    job_id: JobId,
    format: Annotated[  # noqa: A002 - the name clients use
        Literal["pt", "safetensors"] | None, Query(description="The uploaded format is kept.")
    ] = None,
    candidate: Candidate = None,
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    spec = JobSpec.model_validate(job.spec)
    if format is not None and format != spec.model.format:
        raise InvalidField(
            f"The model was uploaded as {spec.model.format} and is not converted to {format}."
        )
    return await _send(request, here, _model(job, candidate))


@router.get(
    "/jobs/{job_id}/model.sha256",
    summary="The model's digest, for sha256sum -c",
    response_class=Response,
    responses={200: {"description": "One line.", "content": {"text/plain": {}}}},
)
async def read_model_digest(  # noqa: D103
    here: Here, caller: Reader, job_id: JobId, candidate: Candidate = None
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    model = _model(job, candidate)
    return Response(f"{model.artefact.sha256}  {model.name}\n", media_type="text/plain")


@router.head("/jobs/{job_id}/triggers.npz", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/triggers.npz",
    summary="Download the recovered triggers",
    response_class=Response,
    responses={
        200: {
            "description": TRIGGER_ARRAYS,
            "content": {"application/octet-stream": {}},
        },
        206: {"description": "The range of it that was asked for."},
        304: {"description": "It is as `If-None-Match` says."},
    },
)
async def read_triggers(  # noqa: D103
    request: Request, here: Here, caller: Reader, job_id: JobId
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    return await _send(request, here, _trigger_file(job, TRIGGERS, "triggers.npz"))


@router.head("/jobs/{job_id}/triggers/{number}.png", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/triggers/{number}.png",
    summary="See a recovered trigger",
    response_class=Response,
    responses={
        200: {
            "description": TRIGGER_PICTURE,
            "content": {"image/png": {}},
        },
        206: {"description": "The range of it that was asked for."},
        304: {"description": "It is as `If-None-Match` says."},
    },
)
async def read_trigger_image(  # noqa: D103
    request: Request,
    here: Here,
    caller: Reader,
    job_id: JobId,
    number: Annotated[
        int, Path(ge=0, description="Its place in the report's `evidence.triggers`, from 0.")
    ],
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    image = _trigger_file(
        job, trigger_image_name(number), f"trigger{number}.png", media_type="image/png"
    )
    return await _send(request, here, image)


@router.get(
    "/jobs/{job_id}/report.json",
    summary="The report",
    response_class=Response,
    responses={200: {"description": "The report.", "content": {"application/json": {}}}},
)
async def read_report(  # noqa: D103
    request: Request, here: Here, caller: Reader, job_id: JobId
) -> Response:
    def fetch(session: Session) -> dict[str, Any]:
        job = _ended(session, caller, job_id)
        if job.report is None:
            raise NoReport(f"The job ended as {job.state}.")
        view = job_view(job, base_url(request, here), is_expired=False)
        about = view.model_dump(
            mode="json",
            include={"state", "verdict", "remediation", "input", "method", "params", "seed"},
        )
        report = _with_links(job.report, view.links)
        return {"object": "report", "job": job.id, **about, "output": view.output, **report}

    report = await in_thread(here.database, fetch)
    return json_answer(report)


async def _send(request: Request, here: Context, download: Download) -> Response:
    try:
        return await run_in_threadpool(
            downloads.send,
            download,
            here.store,
            request.headers,
            with_body=request.method != "HEAD",
        )
    except RangeNotSatisfiable as problem:
        return problems.answer(
            problem,
            instance=request.url.path,
            request_id=request.state.request_id,
            headers={"Content-Range": f"bytes */{download.artefact.bytes}"},
        )


def _model(job: Job, candidate: int | None) -> Download:
    """
    Return the job's model, or another candidate of its run.

    Raises:
        NoSuchCandidate: It has none of this number.
    """
    key, sha256, size = job.output_key, job.output_sha256, job.output_bytes
    if key is None or sha256 is None or size is None or job.finished_at is None:
        raise InternalError("A job that succeeded has no output.")
    spec = JobSpec.model_validate(job.spec)
    if candidate is None:
        return Download(
            name=spec.download_name,
            key=key,
            artefact=Artefact(sha256=sha256, bytes=size),
            modified=job.finished_at,
        )
    found = candidates_among(from_row(job.artefacts))
    if candidate >= len(found):
        raise NoSuchCandidate(_describe(len(found), spec.method))
    return Download(
        name=spec.candidate_download_name(candidate),
        key=key,
        differences_key=artefact_key(key, candidate_name(candidate)),
        artefact=found[candidate],
        modified=job.finished_at,
    )


def _trigger_file(
    job: Job, name: str, ending: str, *, media_type: str = "application/octet-stream"
) -> Download:
    """
    Return a file of the recovered triggers.

    Raises:
        NoSuchTrigger: The job has none of this name.
    """
    if job.output_key is None or job.finished_at is None:
        raise InternalError("A job that succeeded has no output.")
    spec, artefacts = JobSpec.model_validate(job.spec), from_row(job.artefacts)
    if name not in artefacts:
        count = len(trigger_images_among(artefacts))
        raise NoSuchTrigger(
            f"There are pictures of {count} triggers, 0 to {count - 1}."
            if count
            else f"The run of the method {spec.method} recovered no trigger."
        )
    return Download(
        name=spec.name_beside(ending),
        key=artefact_key(job.output_key, name),
        artefact=artefacts[name],
        modified=job.finished_at,
        media_type=media_type,
    )


def _describe(candidates: int, method: str) -> str:
    if candidates:
        return f"The run has {candidates} candidates, 0 to {candidates - 1}."
    return (
        f"The run of the method {method} has no candidates: only auto makes them, "
        "where it changes the model."
    )


def _with_links(report: dict[str, Any], links: Links) -> dict[str, Any]:
    """Return *report* with the address of each candidate and of each trigger's picture."""
    evidence = dict(report.get("evidence") or {})
    for entries, name, addresses in (
        ("candidates", "model", links.candidates),
        ("triggers", "image", links.trigger_images),
    ):
        if addresses:
            found = evidence.get(entries, [])
            pairs = zip_longest(found, addresses[: len(found)])
            evidence[entries] = [{**entry, name: address} for entry, address in pairs]
    return {**report, "evidence": evidence} if evidence else report


def _ended(session: Session, caller: Principal, job_id: str) -> Job:
    """Return a job that has ended and whose files are still kept."""
    job = jobs.get(session, caller.tenant, job_id)
    if not State(job.state).is_terminal:
        raise StillRunning(f"The job is {progress_line(job)}.")
    if jobs.is_expired(session, job):
        raise Expired
    return job


def _ended_with_model(session: Session, caller: Principal, job_id: str) -> Job:
    job = _ended(session, caller, job_id)
    if job.state != State.SUCCEEDED:
        reason = (job.error or {}).get("detail", "")
        raise NoModel(f"The job ended as {job.state}: {reason}")
    return job
