"""
The body of a request as it comes in: how fast, and whether all of it has.

A body that comes too slowly ends in a problem. Only the time that the service *waits* for the client
counts, so that a slow disk of ours cuts nobody off.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from common.errors import TooSlow


class Body:
    """The body of one request."""

    def __init__(
        self,
        headers: Headers,
        receive: Receive,
        *,
        min_bytes_per_second: float,
        window_seconds: float,
    ) -> None:
        length = headers.get("content-length", "0")
        self.is_whole = "transfer-encoding" not in headers and length.strip("0") == ""
        self._receive = receive
        self._min_bytes = min_bytes_per_second * window_seconds
        self._window_seconds = window_seconds
        self._window_left = window_seconds
        self._window_bytes = 0

    async def receive(self) -> Message:
        """
        Return the next message of the request.

        Raises:
            TooSlow: The body comes slower than it must.
        """
        clock = asyncio.get_running_loop().time
        while not self.is_whole:
            started, message = clock(), None
            try:
                async with asyncio.timeout(self._window_left):
                    message = self._taken(await self._receive())
            except TimeoutError:
                pass
            self._window_left -= clock() - started
            if self._window_left <= 0 and not self.is_whole:
                self._open_window()
            if message is not None:
                return message
        return await self._receive()

    def _taken(self, message: Message) -> Message:
        if not message.get("more_body", False):  # its end, or the connection's
            self.is_whole = True
        self._window_bytes += len(message.get("body", b""))
        return message

    def _open_window(self) -> None:
        came, self._window_bytes = self._window_bytes, 0
        self._window_left = self._window_seconds
        if came < self._min_bytes:
            raise TooSlow(
                f"{came} bytes came in {self._window_seconds:g} seconds; "
                f"{self._min_bytes:g} are the least."
            )
