"""What every endpoint works with, and the few things that all of them do alike."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from common.blobs import BlobStore
from common.db import Database
from common.errors import NotFound
from common.queue import Doorbell
from common.settings import Settings
from common.throttle import Throttle
from service import auth
from service.auth import Principal, Scope
from service.slots import UploadSlots

T = TypeVar("T")

log = structlog.get_logger(__name__)

_JOB_ID = re.compile(r"job_[0-9a-f]{24}")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the endpoints work with; one per application."""

    settings: Settings
    database: Database
    store: BlobStore
    bell: Doorbell
    throttle: Throttle
    uploads: Path
    slots: UploadSlots
    stopping: threading.Event  # set when the process was asked to stop: nobody is kept waiting then


def _context(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


Here = Annotated[Context, Depends(_context)]


# For the OpenAPI document alone: the header is read below, where a wrong one gets our own answer.
_BEARER = HTTPBearer(
    auto_error=False,
    bearerFormat="ww_…",
    description="Needed where the service asks for tokens. A token has scopes, none of which implies "
    "another: `submit` makes and cancels jobs, `read` sees them and downloads what they leave, `admin` "
    "deletes it. A token that lacks the one that stands at an operation gets `403 insufficient-scope`.",
)


async def _principal(
    request: Request,
    here: Here,
    needed: SecurityScopes,
    _documented: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> Principal:
    header = request.headers.get("authorization")
    caller = await run_in_threadpool(_admit, here, header)
    for scope in needed.scopes:
        caller.require(Scope(scope))
    return caller


def _admit(here: Context, authorization: str | None) -> Principal:
    """Return who is calling, and count the request as theirs."""
    caller = auth.LOCAL
    if here.settings.requires_tokens:
        with here.database.read() as session:
            caller = auth.authenticate(session, authorization)
    here.throttle.spend(caller.tenant)
    if not caller.is_use_recorded:
        try:
            with here.database.write() as session:
                auth.record_use(session, caller.token)
        except SQLAlchemyError as exc:  # nobody is turned away over a note in the margin
            log.warning("use-not-recorded", error=str(exc).splitlines()[0])
    return caller


# There is no caller without a scope: whoever adds a route has to say what it takes.
Submitter = Annotated[Principal, Security(_principal, scopes=[Scope.SUBMIT.value])]
Reader = Annotated[Principal, Security(_principal, scopes=[Scope.READ.value])]
Admin = Annotated[Principal, Security(_principal, scopes=[Scope.ADMIN.value])]


def known_form(job_id: str) -> str:
    """
    Return *job_id* if it looks like one: a database need not be asked for anything else.

    Raises:
        NotFound: No job was ever called this; Postgres would choke on some of it, such as NUL.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound(f"There is no job {job_id[:80]!r}.")
    return job_id


JobId = Annotated[str, Depends(known_form)]


async def in_thread(database: Database, use: Callable[[Session], T], *, write: bool = False) -> T:
    """Run *use* with a session, in a thread: the event loop never waits for the database."""

    def run() -> T:
        with database.write() if write else database.read() as session:
            return use(session)

    return await run_in_threadpool(run)


def base_url(request: Request, here: Context) -> str:
    """Return what every link begins with."""
    return str(here.settings.public_url or request.base_url).rstrip("/")


def json_answer(body: Any, *, status: int = 200) -> Response:
    """Return a JSON answer that ends with a newline, as a terminal likes it."""
    text = body.model_dump_json() if isinstance(body, BaseModel) else json.dumps(body)
    return Response(
        text + "\n",
        status,
        headers={"Cache-Control": "no-store"},
        media_type="application/json",
    )


def wants_text(request: Request) -> bool:
    """Return whether the client prefers one line to JSON."""
    return request.headers.get("accept", "").split(",")[0].split(";")[0].strip() == "text/plain"
