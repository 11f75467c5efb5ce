"""
The outermost layer: what is checked of a request before any of it is parsed.

It gives every request an id, turns away foreign hosts and origins, bodies that announce themselves as
too large, and logs each answer. It is plain ASGI, because a framework would read the body first.
"""

import time
from collections.abc import Mapping
from urllib.parse import urlsplit
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import (
    HostNotAllowed,
    InternalError,
    NotMultipart,
    OriginNotAllowed,
    Problem,
    TooLarge,
)
from common.settings import LOOPBACK_HOSTS, Settings
from service import problems

_SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

log = structlog.get_logger(__name__)


class Edge:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, and log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._check(Headers(scope=scope))
            except Problem as problem:
                response = problems.answer(
                    problem,
                    instance=scope["path"],
                    request_id=request_id,
                    # The body is not read, so the connection cannot carry another request.
                    headers={"Connection": "close"},
                )
                await response(scope, receive, send_with_headers)
            else:
                await self._pass_on(scope, receive, send_with_headers)
            finally:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round(1000 * (time.perf_counter() - started), 1),
                )

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a bug here, inside the edge: the framework would answer it outside, without headers."""
        has_started = False

        async def watched_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            if has_started:
                raise  # too late for a status; the connection is cut, so nobody takes it for whole
            log.exception("bug")
            response = problems.answer(
                InternalError(), instance=scope["path"], request_id=scope["state"]["request_id"]
            )
            await response(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        if not self._settings.requires_tokens:
            _check_loopback(headers)
        length = headers.get("content-length")
        if length is None:
            return
        if not (length.isascii() and length.isdigit()):
            raise NotMultipart("Content-Length is not a number.")
        if int(length[:19]) > self._settings.max_body_bytes:
            raise TooLarge(
                f"The body has {length} bytes; {self._settings.max_body_bytes} are allowed."
            )


def _check_loopback(headers: Headers) -> None:
    """
    Keep web pages of other origins away from a service without tokens.

    A page can make a browser send a form to 127.0.0.1, or point a name of its own there (DNS
    rebinding); neither can choose the headers that are looked at here.
    """
    if _host_name(headers.get("host", "")) not in LOOPBACK_HOSTS:
        raise HostNotAllowed
    origin = headers.get("origin")
    if origin is not None and _authority(origin) != headers.get("host"):
        raise OriginNotAllowed
    if headers.get("sec-fetch-site") == "cross-site":
        raise OriginNotAllowed


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
