"""Jobs: create, list, read, cancel, delete."""

import asyncio
import hashlib
import re
import time
from contextlib import AsyncExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from common import jobs
from common.db import Job, State
from common.errors import InvalidField
from common.jobs import Filter, Idempotency
from service import downloads
from service.admission import admit
from service.auth import Principal
from service.context import (
    Admin,
    Context,
    Here,
    JobId,
    Reader,
    Submitter,
    base_url,
    in_thread,
    json_answer,
    known_form,
    wants_text,
)
from service.intake import accept, announced_bytes, check_room
from service.openapi import CREATE_JOB, PROBLEM_RESPONSES
from service.schemas import DryRun, JobList, JobView, input_view, job_view, progress_line
from service.uploads import received_form

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,6})")
_RETRY_SECONDS = 2
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.05, 1.0

Wait = Annotated[
    int | None,
    Query(ge=0, description="Seconds to wait for the job's end; `Prefer: wait=N` does the same."),
]

router = APIRouter(responses=PROBLEM_RESPONSES)


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    summary="Purify a model",
    openapi_extra=CREATE_JOB,
    responses={
        200: {
            "description": "It ended within `?wait=`, or this was a dry run.",
            "model": JobView | DryRun,
        },
        202: {"description": "Accepted; poll `Location`."},
    },
)
async def create_job(  # noqa: D103 - the summary above says it
    request: Request,
    here: Here,
    caller: Submitter,
    background: BackgroundTasks,
    wait: Wait = None,
    dry_run: Annotated[bool, Query(description="Check everything, queue nothing.")] = False,
) -> Response:
    idempotency_key = _idempotency_key(request)
    await run_in_threadpool(
        check_room,
        here,
        caller,
        announced_bytes(request),
        idempotency_key=idempotency_key,
        dry_run=dry_run,
    )
    async with AsyncExitStack() as held:
        held.enter_context(here.slots.taken(caller.tenant))
        form = await held.enter_async_context(received_form(request, here.settings, here.uploads))
        admitted = await run_in_threadpool(admit, form, here.settings, here.database)
        if dry_run:
            return json_answer(
                DryRun(
                    input=input_view(admitted.spec),
                    architecture_check="checked by the worker"
                    if admitted.is_checked_by_worker
                    else "fits",
                    method=admitted.spec.method,
                    params=admitted.spec.params,
                    seed=admitted.spec.seed,
                )
            )
        idempotency = idempotency_key and Idempotency(
            token=caller.family, key=idempotency_key, fingerprint=form.fingerprint
        )
        job, is_replay = await run_in_threadpool(
            accept, here, caller, form, admitted, idempotency or None, _request_id(request)
        )
    if not is_replay and _wait_seconds(request, wait):
        await run_in_threadpool(here.bell.ring, job.id)  # who waits for the end needs it begun
    elif not is_replay:
        # After the answer is out: a broker that is away costs the client nothing.
        background.add_task(here.bell.ring, job.id)
    job = await _wait_for_end(request, here, caller, job.id, wait)
    is_terminal = State(job.state).is_terminal
    response = await _job_response(request, here, job, status=200 if is_terminal else 202)
    response.headers["Location"] = f"{base_url(request, here)}/jobs/{job.id}"
    if is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    if wants_text(request):
        response = Response(
            response.headers["Location"] + "\n",
            response.status_code,
            headers={
                name: response.headers[name]
                for name in ("Location", "Retry-After", "Idempotent-Replayed")
                if name in response.headers
            },
            media_type="text/plain",
        )
    response.background = background
    return response


@router.get("/jobs", response_model=JobList, summary="List jobs, newest first")
async def list_jobs(  # noqa: D103
    request: Request,
    here: Here,
    caller: Reader,
    state: State | None = None,
    verdict: Literal["clean", "backdoored", "inconclusive"] | None = None,
    sha256: Annotated[
        str | None, Query(pattern="^[0-9a-f]{64}$", description="Digest of the uploaded model.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
) -> Response:
    if after is not None:
        known_form(after)
    wanted = Filter(state=state, verdict=verdict, sha256=sha256)

    def fetch(session: Session) -> JobList:
        found, has_more = jobs.page(session, caller.tenant, wanted, limit=limit, after=after)
        base = base_url(request, here)
        views = [job_view(job, base, is_expired=jobs.is_expired(session, job)) for job in found]
        return JobList(data=views, has_more=has_more)

    listed = await in_thread(here.database, fetch)
    response = json_answer(listed)
    if listed.has_more:
        following = request.url.include_query_params(after=listed.data[-1].id)
        base = base_url(request, here)
        response.headers["Link"] = f'<{base}/jobs?{following.query}>; rel="next"'
    return response


@router.get(
    "/jobs/{job_id}",
    response_model=JobView,
    summary="Read a job",
    responses={304: {"description": "It is as `If-None-Match` says."}},
)
async def read_job(  # noqa: D103
    request: Request, here: Here, caller: Reader, job_id: JobId, wait: Wait = None
) -> Response:
    job = await _wait_for_end(request, here, caller, job_id, wait)
    if wants_text(request):
        response = Response(progress_line(job) + "\n", media_type="text/plain")
        if not State(job.state).is_terminal:
            response.headers["Retry-After"] = str(_RETRY_SECONDS)
        return response
    return await _job_response(request, here, job, status=200)


@router.post("/jobs/{job_id}/cancel", response_model=JobView, summary="Cancel a job")
async def cancel_job(  # noqa: D103
    request: Request, here: Here, caller: Submitter, job_id: JobId
) -> Response:
    job = await in_thread(
        here.database,
        lambda session: jobs.cancel(
            session,
            caller.tenant,
            job_id,
            retention_seconds=here.settings.retention_seconds,
        ),
        write=True,
    )
    return await _job_response(request, here, job, status=200)


@router.delete("/jobs/{job_id}", status_code=204, summary="Delete a job's files")
async def delete_job(here: Here, caller: Admin, job_id: JobId) -> Response:  # noqa: D103
    await in_thread(
        here.database,
        lambda session: jobs.purge(
            session,
            caller.tenant,
            job_id,
            retention_seconds=here.settings.retention_seconds,
        ),
        write=True,
    )
    return Response(status_code=204)


async def _wait_for_end(
    request: Request, here: Context, caller: Principal, job_id: str, wait: int | None
) -> Job:
    """Return the job when it has ended, when the time is up, or when the client has gone."""
    asked = _wait_seconds(request, wait)
    until = time.monotonic() + min(asked, here.settings.max_wait_seconds)
    pause = _FIRST_LOOK_SECONDS
    while True:
        job = await in_thread(here.database, lambda s: jobs.get(s, caller.tenant, job_id))
        left = until - time.monotonic()
        if State(job.state).is_terminal or left <= 0 or here.stopping.is_set():
            return job
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, _LAST_LOOK_SECONDS)
        if await request.is_disconnected():
            return job


def _wait_seconds(request: Request, wait: int | None) -> int:
    if wait is not None:
        return wait
    preferred = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return int(preferred.group(1)) if preferred else 0


async def _job_response(request: Request, here: Context, job: Job, *, status: int) -> Response:
    expired = await in_thread(here.database, lambda s: jobs.is_expired(s, job))
    response = json_answer(
        job_view(job, base_url(request, here), is_expired=expired), status=status
    )
    etag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
    if request.method == "GET" and downloads.etag_matches(
        request.headers.get("if-none-match"), etag
    ):
        response = Response(status_code=304)
    response.headers["ETag"] = etag
    if not State(job.state).is_terminal:
        response.headers["Retry-After"] = str(_RETRY_SECONDS)
    return response


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidField("An Idempotency-Key has 1 to 255 printable ASCII characters.")
    return key


def _request_id(request: Request) -> str:
    return str(request.state.request_id)
