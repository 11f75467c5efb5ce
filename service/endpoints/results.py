"""What a job leaves: the purified model, its digest, the report."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from common import jobs
from common.db import Job, State
from common.errors import (
    Expired,
    InvalidField,
    NoModel,
    NoReport,
    RangeNotSatisfiable,
    StillRunning,
)
from common.spec import JobSpec
from service import downloads, problems
from service.auth import Principal
from service.context import Caller, Here, JobId, base_url, in_thread, json_answer
from service.openapi import PROBLEM_RESPONSES
from service.schemas import job_view, progress_line

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
    caller: Caller,
    job_id: JobId,
    format: Annotated[  # noqa: A002 - the name clients use
        Literal["pt", "safetensors"] | None, Query(description="The uploaded format is kept.")
    ] = None,
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    spec = JobSpec.model_validate(job.spec)
    if format is not None and format != spec.model.format:
        raise InvalidField(
            f"The model was uploaded as {spec.model.format} and is not converted to {format}."
        )
    try:
        return await run_in_threadpool(
            downloads.send_model,
            job,
            spec.download_name,
            here.store,
            request.headers,
            with_body=request.method != "HEAD",
        )
    except RangeNotSatisfiable as problem:
        return problems.answer(
            problem,
            instance=request.url.path,
            request_id=request.state.request_id,
            headers={"Content-Range": f"bytes */{job.output_bytes}"},
        )


@router.get(
    "/jobs/{job_id}/model.sha256",
    summary="The model's digest, for sha256sum -c",
    response_class=Response,
    responses={200: {"description": "One line.", "content": {"text/plain": {}}}},
)
async def read_model_digest(  # noqa: D103
    here: Here, caller: Caller, job_id: JobId
) -> Response:
    job = await in_thread(here.database, lambda s: _ended_with_model(s, caller, job_id))
    name = JobSpec.model_validate(job.spec).download_name
    return Response(f"{job.output_sha256}  {name}\n", media_type="text/plain")


@router.get(
    "/jobs/{job_id}/report.json",
    summary="The report",
    response_class=Response,
    responses={200: {"description": "The report.", "content": {"application/json": {}}}},
)
async def read_report(  # noqa: D103
    request: Request, here: Here, caller: Caller, job_id: JobId
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
        return {"object": "report", "job": job.id, **about, "output": view.output, **job.report}

    report = await in_thread(here.database, fetch)
    return json_answer(report)


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
