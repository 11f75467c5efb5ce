"""
Connections: what a client may do with a socket before, between and behind its requests.

uvicorn reads a request's head without a bound, and waits for it and for whoever reads an answer for ever.
Here every head has a size and a time, every connection a place among a limited number, every answer a
rate at which it must be taken. What is refused is refused as a problem document, like anywhere else.
The rate at which a *body* comes is watched by the edge, which knows when the service waits for it.

This is the one place that stands on uvicorn's protocol class; ``tests/service/test_connections.py`` holds
it to its laws over raw sockets.
"""

import asyncio
import fcntl
import struct
import termios
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast
from uuid import uuid4

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import Busy, HeadTooLarge, MalformedRequest, Problem, TargetTooLong, TooSlow
from common.settings import Settings
from service import problems

# A client that is still sending gets its answer only if it is read on for a moment: a socket that is
# closed with unread bytes in it takes the answer back.
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 16 << 20
_BODY_HEADERS = (b"content-length", b"transfer-encoding")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The settings of a connection."""

    max_connections: int
    max_head_bytes: int
    max_headers: int
    max_target_bytes: int
    head_timeout_seconds: float
    min_transfer_bytes_per_second: int
    transfer_window_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the limits that *settings* say."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


def limited(settings: Settings) -> type[HttpToolsProtocol]:
    """Return the protocol class for uvicorn, with the limits of *settings*."""
    return type("LimitedConnection", (Connection,), {"limits": Limits.of(settings)})


class _HeadRefused(Exception):
    """The parser is left by it; the problem stands beside it."""


class _Lingering:
    """A transport that ends in two steps: the answer goes out, and what still comes in is thrown away."""

    def __init__(self, transport: asyncio.Transport, connection: "Connection") -> None:
        self._transport = transport
        self._connection = connection
        self._is_ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, unless the connection is gone: the answer to a pipelined request may not know it yet."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close at once where the client has nothing more to send, and a moment later where it has."""
        if not self._connection.is_sending or not self._transport.can_write_eof():
            self._transport.close()
        elif not self.is_closing():
            self._is_ending = True
            self._transport.write_eof()
            self._transport.resume_reading()
            self._connection.loop.call_later(_LINGER_SECONDS, self._transport.abort)

    def is_closing(self) -> bool:
        """Whether it ends."""
        return self._is_ending or self._transport.is_closing()


class Connection(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[Limits]

    _problem: Problem | None = None  # why the head that is being read is refused
    _is_over = False  # an answer that ends the connection is on its way; nothing more is read
    _awaits_head = True
    _head_bytes = 0
    _discarded_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _drain_timer: asyncio.TimerHandle | None = None
    _undrained = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is a place for it."""
        super().connection_made(cast("asyncio.Transport", _Lingering(transport, self)))
        if len(self.connections) > self.limits.max_connections:
            self._refuse(Busy("Too many connections are open."))
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, within the limits of a head while one is being read."""
        if self._is_over or self.transport.is_closing():
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        if self._awaits_head:
            self._head_bytes += len(data)
            self._start_head_timer()
        super().data_received(data)
        if self._awaits_head and self._head_bytes > self.limits.max_head_bytes:
            self._refuse(HeadTooLarge())

    # The parser's callbacks, in the order of a request

    def on_message_begin(self) -> None:
        """Start to wait for a head."""
        super().on_message_begin()
        self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address."""
        super().on_url(url)
        if len(self.url) > self.limits.max_target_bytes:
            self._leave_parser(TargetTooLong())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        super().on_header(name, value)
        if len(self.headers) > self.limits.max_headers:
            self._leave_parser(HeadTooLarge(f"More than {self.limits.max_headers} headers."))

    def on_headers_complete(self) -> None:
        """Check the whole head, and let the request begin."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_head_bytes:
            self._leave_parser(HeadTooLarge())
        upgrades = self.parser.should_upgrade()
        if upgrades and any(name in _BODY_HEADERS for name, _ in self.headers):
            self._leave_parser(  # the parser would take the body for another protocol's
                MalformedRequest(
                    "A request with a body asks for an upgrade of the protocol.",
                    hint="Send it as HTTP/1.1, without the header Upgrade.",
                )
            )
        self._stop_head_timer()
        self._awaits_head = False
        super().on_headers_complete()
        if upgrades:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Be ready for the next head."""
        super().on_message_complete()
        self._awaits_head = True
        self._head_bytes = 0

    # Refusals

    @property
    def is_sending(self) -> bool:
        """Whether the client is in the middle of a request, as far as is known."""
        return self._is_over or (self.cycle is not None and self.cycle.more_body)

    def _leave_parser(self, problem: Problem) -> None:
        self._problem = problem
        raise _HeadRefused

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read."""
        self._refuse(self._problem or MalformedRequest(msg))

    def _refuse(self, problem: Problem) -> None:
        """Answer outside any request, and end the connection."""
        if self._is_over:
            return
        self._is_over = True
        self._stop_head_timer()
        log.info("refused", code=problem.code)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._awaits_head or cycle.response_started:
                # An earlier request is at work, or its answer on the way: it is let come to its end.
                cycle.keep_alive = False
                return
            # It is this request's own body that cannot be read: the application has lost its client.
            cycle.disconnected = True
            cycle.message_event.set()
        self._unset_keepalive_if_required()
        self.transport.write(_answer(problem))
        self.transport.close()

    # Time

    def _start_head_timer(self) -> None:
        if self._head_timer is None and not self._is_over:
            self._head_timer = self.loop.call_later(
                self.limits.head_timeout_seconds, self._on_late_head
            )

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_late_head(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_head_timer()  # it is we who keep the client waiting, with an earlier request
        else:
            self._refuse(TooSlow("The request's headers did not come in time."))

    def pause_writing(self) -> None:
        """Begin to watch how fast the client takes what it asked for."""
        super().pause_writing()
        self._start_drain_timer()

    def resume_writing(self) -> None:
        """Stop watching: there is room again."""
        self._stop_drain_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Watch the rest of an answer that is still to be taken."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_drain_timer()

    def _start_drain_timer(self) -> None:
        if self._drain_timer is None:
            self._undrained = self._bytes_to_drain()
            self._drain_timer = self.loop.call_later(
                self.limits.transfer_window_seconds, self._check_drain
            )

    def _stop_drain_timer(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _check_drain(self) -> None:
        """End the connection of a client that does not take its answer."""
        self._drain_timer = None
        if not self.transport.get_write_buffer_size():
            return
        taken = self._undrained - self._bytes_to_drain()
        if taken < self.limits.min_transfer_bytes_per_second * self.limits.transfer_window_seconds:
            log.info("reader-too-slow")
            self.transport.abort()
        else:
            self._start_drain_timer()

    def _bytes_to_drain(self) -> int:
        """Return what the client has not yet acknowledged, here and in the kernel's own buffer."""
        buffered = self.transport.get_write_buffer_size()
        connected: Any = self.transport.get_extra_info("socket")
        try:
            found = fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:
            return buffered
        return buffered + int(struct.unpack("i", found)[0])

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        self._stop_drain_timer()


def _answer(problem: Problem) -> bytes:
    """Return a whole HTTP answer: there is no request that the application could answer."""
    request_id = f"req_{uuid4().hex}"
    response = problems.answer(
        problem, instance="", request_id=request_id, headers={"X-Request-Id": request_id}
    )
    head = b"HTTP/1.1 %d \r\n" % response.status_code
    for name, value in [*response.raw_headers, (b"connection", b"close")]:
        head += name + b": " + value + b"\r\n"
    return head + b"\r\n" + bytes(response.body)
