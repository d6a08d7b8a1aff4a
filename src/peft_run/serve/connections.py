"""HTTP connections that must say what they want in time: half a request would hold one for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class Connection(H11Protocol):
    """uvicorn's, closed where the headers of a request are not whole after HEADER_SECONDS."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.expect()
        elif self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()

    def expect(self) -> None:
        """Whole headers, from now on."""
        if self.timer is None:
            self.timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)
