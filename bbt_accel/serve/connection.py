"""HTTP connections that cannot be kept without being used, so that a new one always reaches the
server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""A process may usually have 1024 open files."""
SEND_BUFFER = 2**18
"""Bytes of the system's own buffer, which would grow to megabytes and hide for as long what a slow
client reads.
"""


class Connection(H11Protocol):
    """uvicorn's, closed when its client sends no complete header, or does not read, for `idle`
    seconds, or when it has not read a response after `longest` seconds.

    Between two requests it is kept for `timeout_keep_alive` seconds. The time does not begin again
    with a part of a header. Beyond `MAX_CONNECTIONS`, the one that has waited longest for a request
    is closed. The body's time is limited by the application, which knows what it waits for.
    """

    idle, longest = 10.0, 300.0
    timer: asyncio.TimerHandle | None = None
    since = deadline = 0.0  # when the timer was set, and when the response must be read
    unread = 0  # bytes of it that were not sent when the timer was set
    kept = False  # whether nothing of the next request has arrived

    @property
    def waits(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER
        )
        self._within(transport.close)
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [
                one
                for one in self.connections
                if isinstance(one, Connection) and one.waits and one is not self
            ]
            min(waiting, key=lambda one: one.since, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.kept:
            self._within(self.transport.close)
        super().data_received(data)
        if (
            not self.waits and not self.flow.write_paused
        ):  # a client may send more requests and read no response
            self._in_time()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        """For the next request, where no further one has arrived already."""
        if (
            self.waits and self.flow.write_paused
        ):  # a close would wait until the client has read everything
            self._within(self._abort_if_stuck)
        elif (
            self.waits and self.conn.their_state is h11.SEND_BODY
        ):  # it was answered before its body had arrived
            self._within(self.transport.close)
        elif self.waits:
            self._within(self.transport.close, self.timeout_keep_alive)
            self.kept = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self.deadline = self.loop.time() + self.longest
        self._within(self._abort_if_stuck)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait() if self.waits else self._in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._in_time()

    def _abort_if_stuck(self) -> None:
        """Go on while the client reads: a long response may take it longer than `idle`."""
        reads = self.transport.get_write_buffer_size() < self.unread
        if not reads or self.loop.time() > self.deadline:
            self.transport.abort()
            return
        since = self.since
        self._within(self._abort_if_stuck)
        self.since = since

    def _within(self, otherwise: Callable[[], None], seconds: float | None = None) -> None:
        self._in_time()
        self.since, self.unread = self.loop.time(), self.transport.get_write_buffer_size()
        self.timer = self.loop.call_later(self.idle if seconds is None else seconds, otherwise)

    def _in_time(self) -> None:
        self.kept = False
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
