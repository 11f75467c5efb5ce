"""The application: routes, the edge around them, and every error as a problem document."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from common import __version__
from common.blobs import blob_store
from common.db import Database
from common.errors import (
    Fault,
    InternalError,
    InvalidField,
    MethodNotAllowed,
    NotFound,
    NotMultipart,
    Problem,
    Unavailable,
)
from common.folders import ProcessFolder, sweep_dead_folders
from common.queue import doorbell
from common.settings import Settings
from common.sweeper import Sweeper
from common.throttle import Throttle
from service import problems
from service.context import Context
from service.edge import Edge
from service.endpoints import about, jobs, results
from service.housekeeping import Housekeeper
from service.slots import UploadSlots

_DESCRIPTION = """
Purify neural networks that you did not train: POST a checkpoint with a few clean samples, poll, and
download a checkpoint that loads exactly where the old one did.
"""

_ENDPOINTS = (jobs, results, about)

log = structlog.get_logger(__name__)


def create_app(settings: Settings, stopping: threading.Event | None = None) -> FastAPI:
    """
    Return the application; it opens its database and its store when it starts.

    Args:
        stopping: Set by the server when it begins to stop; it ends the waits of long polls.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.resolved_database_url)
        store = blob_store(settings.resolved_blob_url)
        bell = doorbell(settings.broker_url)
        sweep_dead_folders(settings.upload_dir)
        uploads = ProcessFolder(settings.upload_dir)
        housekeeper = Housekeeper(Sweeper(settings, database, store, bell), settings)
        app.state.context = Context(
            settings=settings,
            database=database,
            store=store,
            bell=bell,
            throttle=Throttle(database, max_requests_per_minute=settings.max_requests_per_minute),
            uploads=uploads.path,
            slots=UploadSlots(
                most=settings.max_uploads, most_per_tenant=settings.max_uploads_per_tenant
            ),
            stopping=stopping or threading.Event(),
        )
        housekeeper.start()
        try:
            yield
        finally:
            housekeeper.stop()
            uploads.close()
            database.close()

    app = FastAPI(
        title="Weightwash",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,  # about.py answers it, with a newline at its end like everything here
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    for module in _ENDPOINTS:
        app.include_router(module.router)
    app.add_middleware(Edge, settings=settings)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(SQLAlchemyError, _answer_database)
    return app


def _answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    if isinstance(problem, Fault):
        log.error("fault", code=problem.code, detail=problem.detail)
    return problems.answer(
        problem,
        instance=request.url.path,
        request_id=request.state.request_id,
        headers=headers,
    )


async def _answer_problem(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Problem)
    return _answer(request, exc)


async def _answer_validation(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    where = " ".join(map(str, first["loc"]))
    return _answer(request, InvalidField(f"{where}: {first['msg']}."))


async def _answer_http(request: Request, exc: Exception) -> Response:
    """Answer what the framework itself refuses."""
    assert isinstance(exc, HTTPException)
    headers = dict(exc.headers or {})
    match exc.status_code:
        case 404:
            return _answer(
                request,
                NotFound(
                    f"There is nothing at {request.url.path[:200]!r}.",
                    hint="GET /openapi.json lists every address.",
                ),
            )
        case 405:
            return _answer(request, MethodNotAllowed(), headers | _allowed(request.url.path))
        case _:
            return _answer(request, NotMultipart(str(exc.detail)))


def _allowed(path: str) -> dict[str, str]:
    """Name every verb of *path*: the framework names only those of the first route that has it."""
    verbs = {
        verb
        for module in _ENDPOINTS
        for route in module.router.routes
        if isinstance(route, APIRoute) and route.path_regex.fullmatch(path)
        for verb in route.methods or ()
    }
    return {"allow": ", ".join(sorted(verbs))} if verbs else {}


async def _answer_database(request: Request, exc: Exception) -> Response:
    log.error("database-failed", exc_info=exc)
    if isinstance(exc, OperationalError | PoolTimeout):
        return _answer(request, Unavailable("The database does not answer."))
    return _answer(request, InternalError())
