"""Answers over HTTP: what is sent piece by piece, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Found = TypeVar("Found")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(content: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json_bytes(content) + b"\n\n"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which that has not, as an escape."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class JsonAnswer(Response):
    """An answer that is sent whole."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


async def gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def attended(receive: Receive, work: Awaitable[Found]) -> Found:
    """The result of some work, as long as the client waits for it; else ClientGone, and the work is
    cancelled."""
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


class EventStream(Response):
    """Server-sent events. When the client goes away, no more of them are made."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[bool], None]) -> None:
        """`close` is called at the end, with whether the client took all of it."""
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they, or the client, are at an end."""
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(gone(receive))
        complete = False
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
            complete = sending.done()
            if complete:
                sending.result()
        finally:
            for task in (sending, watching):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
            self._close(complete)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        async for body in self._events:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
