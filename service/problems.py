"""Problems as HTTP answers: one table of statuses, and RFC 9457 documents."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from common import errors
from common.errors import Fault, NotYet, Problem, Refused

MEDIA_TYPE = "application/problem+json"

STATUSES: Mapping[type[Problem], int] = {
    Refused: 422,
    NotYet: 503,
    Fault: 500,
    errors.Unauthorised: 401,
    errors.InsufficientScope: 403,
    errors.HostNotAllowed: 421,
    errors.OriginNotAllowed: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.MalformedRequest: 400,
    errors.NotMultipart: 400,
    errors.TooSlow: 408,
    errors.TooLarge: 413,
    errors.TargetTooLong: 414,
    errors.HeadTooLarge: 431,
    errors.QuotaExceeded: 429,
    errors.TooManyRequests: 429,
    errors.InsufficientStorage: 507,
    errors.NoSuchCandidate: 404,
    errors.NoSuchTrigger: 404,
    errors.NoModel: 409,
    errors.NoReport: 409,
    errors.AlreadyEnded: 409,
    errors.Expired: 410,
    errors.RangeNotSatisfiable: 416,
    errors.NoSpace: 507,
    errors.Unavailable: 503,
}
"""The status of each problem; one that is not named here has that of its nearest base."""


def status_of(problem: type[Problem]) -> int:
    """Return the HTTP status of a kind of problem."""
    return next(STATUSES[kind] for kind in problem.__mro__ if kind in STATUSES)


def document(problem: Problem, *, instance: str, request_id: str) -> dict[str, Any]:
    """Return the problem as RFC 9457 has it, with our code, hint and request id."""
    return {
        "type": f"urn:weightwash:problem:{problem.code}",
        "title": problem.title,
        "status": status_of(type(problem)),
        "detail": problem.detail,
        "instance": instance,
        "code": problem.code,
        "hint": problem.hint,
        "request_id": request_id,
    }


def stored_document(stored: Mapping[str, Any], *, instance: str, request_id: str) -> dict[str, Any]:
    """Return the same object for a problem that a worker stored in ``job.error``."""
    kind = errors.PROBLEMS.get(str(stored.get("code")), errors.InternalError)
    problem = kind(str(stored.get("detail", "")) or None, hint=str(stored.get("hint", "")))
    return document(problem, instance=instance, request_id=request_id)


def answer(
    problem: Problem,
    *,
    instance: str,
    request_id: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the problem as a response."""
    own: dict[str, str] = {"Cache-Control": "no-store", **(headers or {})}
    if isinstance(problem, NotYet):
        own["Retry-After"] = str(problem.retry_after_seconds)
    if isinstance(problem, errors.Unauthorised):
        own["WWW-Authenticate"] = 'Bearer realm="weightwash"'
    if isinstance(problem, errors.InsufficientScope):  # RFC 6750, section 3.1
        own["WWW-Authenticate"] = (
            f'Bearer realm="weightwash", error="insufficient_scope", scope="{problem.scope}"'
        )
    if isinstance(problem, errors.Unavailable | errors.QuotaExceeded):
        own["Retry-After"] = "5"
    return Response(
        json.dumps(document(problem, instance=instance, request_id=request_id)) + "\n",
        status_of(type(problem)),
        headers=own,
        media_type=MEDIA_TYPE,
    )
