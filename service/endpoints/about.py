"""The service itself: what can be asked of it, and whether it is well."""

from collections.abc import Callable

import structlog
from fastapi import APIRouter, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from common import roster, workers
from common.catalogue.architectures import ARCHITECTURES, foreign
from common.catalogue.methods import METHODS
from common.db import Database
from migrations.migrate import is_current
from service.admission import DEFAULT_METHOD
from service.context import Here, json_answer
from service.openapi import EDGE_RESPONSES
from service.schemas import (
    ArchitectureView,
    Catalogue,
    Check,
    Health,
    MethodView,
    Readiness,
    WorkerView,
)

log = structlog.get_logger(__name__)
router = APIRouter(responses=EDGE_RESPONSES)


@router.get("/architectures", response_model=Catalogue, summary="List architectures")
def list_architectures(here: Here) -> Response:  # noqa: D103
    built_in = [
        ArchitectureView(
            name=each.name,
            description=each.description,
            arguments=each.arguments.model_json_schema(),
            built_in=True,
        )
        for each in ARCHITECTURES.values()
    ]
    with here.database.read() as session:
        announced = [
            ArchitectureView(
                name=each.name,
                description=each.description,
                arguments=foreign.schema(foreign.arguments_of(each.name)),
                built_in=False,
            )
            for each in roster.listed(session)
        ]
    return json_answer(Catalogue(data=[*built_in, *announced]))


@router.get("/methods", response_model=Catalogue, summary="List purification methods")
def list_methods() -> Response:  # noqa: D103
    return json_answer(
        Catalogue(
            data=[
                MethodView(
                    name=each.name,
                    description=each.description,
                    parameters=each.parameters.model_json_schema(),
                    default=each.name == DEFAULT_METHOD,
                )
                for each in METHODS.values()
            ]
        )
    )


@router.get("/openapi.json", include_in_schema=False)
def read_openapi(request: Request) -> Response:  # noqa: D103
    return json_answer(request.app.openapi())


@router.get("/healthz", response_model=Health, summary="Whether the process answers")
async def health() -> Response:  # noqa: D103
    return json_answer(Health())


@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Whether jobs are accepted and worked on",
    responses={503: {"description": "A part is missing.", "model": Readiness}},
)
def readiness(here: Here) -> Response:  # noqa: D103
    checks = {
        "database": _check(here.database.check),
        "schema": _check(lambda: _require_schema(here.database)),
        "blobs": _check(here.store.check),
        "worker": _check(lambda: _require_worker(here.database)),
    }
    ready = all(check.ok for check in checks.values())
    found = Readiness(ready=ready, checks=checks, workers=_workers(here.database))
    return json_answer(found, status=200 if ready else 503)


class _Missing(Exception):
    """A part does not work, in words that anybody may read."""


def _check(probe: Callable[[], str | None]) -> Check:
    """Run one probe; what an exception says may name hosts and paths, so it goes to the log alone."""
    try:
        return Check(ok=True, detail=probe() or "ok")
    except _Missing as exc:
        return Check(ok=False, detail=str(exc))
    except Exception:
        log.exception("not-ready")
        return Check(ok=False, detail="does not answer; the log says why")


def _require_schema(database: Database) -> None:
    if not is_current(database):
        raise _Missing("not the newest; run: make migrate")


def _workers(database: Database) -> list[WorkerView]:
    """Return the workers that are there; none where the database does not say."""
    try:
        with database.read() as session:
            return [
                WorkerView(
                    name=worker.name,
                    device=worker.device,
                    problem=worker.problem,
                    sandbox=worker.sandbox,
                )
                for worker in workers.present(session)
            ]
    except SQLAlchemyError:
        return []  # the checks say so


def _require_worker(database: Database) -> str:
    with database.read() as session:
        present = workers.present(session)
    able = [f"{worker.name} on {worker.device}" for worker in present if worker.problem is None]
    if not able:
        raise _Missing(
            present[0].problem
            if present and present[0].problem
            else "no worker was heard of in the last minute; start one: python -m worker poll"
        )
    return ", ".join(able)
