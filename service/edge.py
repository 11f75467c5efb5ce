"""
The outermost layer: what is checked of a request before any of it is parsed.

It gives every request an id, turns away foreign hosts and origins, requests that can be read in two
ways, and bodies that announce themselves as too large; it watches how fast a body comes, and logs each
answer: the path without its query, no header, no body. It is plain ASGI, because a framework would read
the body first.
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
    MalformedRequest,
    NotMultipart,
    OriginNotAllowed,
    Problem,
    TooLarge,
)
from common.settings import LOOPBACK_HOSTS, Settings
from service import problems
from service.bodies import Body

_SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# With two of one of these, whoever stands before us may have looked at the other one.
_SINGLE_HEADERS = (
    "authorization",
    "content-length",
    "content-type",
    "expect",
    "host",
    "idempotency-key",
    "if-range",
    "origin",
    "range",
    "sec-fetch-site",
    "transfer-encoding",
)
_MAX_LOGGED_PATH = 200

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
        given = Headers(scope=scope)
        body = Body(
            given,
            receive,
            min_bytes_per_second=self._settings.min_transfer_bytes_per_second,
            window_seconds=self._settings.transfer_window_seconds,
        )

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if not body.is_whole:  # nothing else can be read off this connection
                    headers["Connection"] = "close"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._check(given)
            except Problem as problem:
                response = problems.answer(
                    problem,
                    instance=scope["path"],
                    request_id=request_id,
                    headers={"Connection": "close"},
                )
                await response(scope, body.receive, send_with_headers)
            else:
                await self._pass_on(scope, body.receive, send_with_headers)
            finally:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:_MAX_LOGGED_PATH],
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
        for name in _SINGLE_HEADERS:
            if len(headers.getlist(name)) > 1:
                raise MalformedRequest(f"The header {name} is there more than once.")
        if headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise MalformedRequest("The only Transfer-Encoding is chunked.")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise MalformedRequest("A body has a Transfer-Encoding or a Content-Length, not both.")
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
