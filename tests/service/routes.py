"""Every route of an application, with what a request to it can name: found, not listed."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts

PUBLIC = {"/architectures", "/methods", "/healthz", "/readyz", "/openapi.json"}
"""What anybody may ask, token or not: it says nothing of any tenant."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One verb at one address."""

    method: str
    path: str
    path_parameters: frozenset[str]
    queries: frozenset[str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def guarded_routes(app: FastAPI) -> list[Route]:
    """Return every route that is not public; what changes most comes last."""
    order = ["GET", "HEAD", "PUT", "POST", "DELETE"]
    return sorted(
        (route for route in _routes(app) if route.path not in PUBLIC),
        key=lambda route: (order.index(route.method), route.path),
    )


def _routes(app: FastAPI) -> Iterator[Route]:
    for found in iter_route_contexts(app.routes):
        own = found.original_route
        # A mounted application would hide its addresses from whoever walks them here.
        assert isinstance(own, APIRoute), f"{own!r} is no route that can be tried"
        assert found.path is not None
        for method in sorted(own.methods or ()):
            yield Route(
                method=method,
                path=found.path,
                path_parameters=frozenset(
                    p.alias for d in _flat(own.dependant) for p in d.path_params
                ),
                queries=frozenset(p.alias for d in _flat(own.dependant) for p in d.query_params),
            )


def _flat(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for child in dependant.dependencies:
        yield from _flat(child)
