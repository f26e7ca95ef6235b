"""What stands before the routes: who may ask, how much they may send, and how often that happened. Plain
ASGI, so that nothing lies between a stream and its client."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.options import ServeOptions
from proxytune.server.faults import RequestFault
from proxytune.server.work.meters import Meters

OPEN = frozenset({"/", "/health", "/docs", "/openapi.json"})
"""Routes without a key: they show nothing but that there is a server, and how it is asked."""
LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
BODY_SECONDS = 30
"""In which the body of a request must be here."""


@dataclass(frozen=True)
class ApiKey:
    """The key that requests must bring: only its digest is kept."""

    digest: bytes

    @classmethod
    def of(cls, key: str) -> ApiKey:
        """The key of this text."""
        return cls(hashlib.sha256(key.encode()).digest())

    def opens(self, header: bytes | None) -> bool:
        """Whether an Authorization header brings the key; compared in constant time."""
        scheme, _, given = (header or b"").partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self.digest)
        return same and scheme.lower() == b"bearer"


class Guard:
    """Refuses what must not come to the routes, and counts all requests."""

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        meters: Meters,
        key: ApiKey | None,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        """`open_paths` need no key, beside OPEN: what is loaded by the page at `/`."""
        self.app, self.options, self.meters, self.key = app, options, meters, key
        self.open = OPEN | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            await self.app(scope, _again(body, receive), watch)
        except RequestFault as fault:
            refusal = JSONResponse(fault.body, fault.status, dict(fault.headers))
            await refusal(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.meters.requests.labels(route, str(status)).inc()
            self.meters.seconds.labels(route).observe(time.monotonic() - began)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.options.host in LOCAL:
            # a page of another site may have its name point here: only this machine's names are answered
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in LOCAL:
                raise RequestFault(
                    403, f"this server answers to 127.0.0.1 and localhost, not to '{host[:100]}'"
                )
        if self.key is None or scope["path"] in self.open:
            return
        if not self.key.opens(headers.get(b"authorization")):
            raise RequestFault(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
            )

    async def _body(self, scope: Scope, receive: Receive) -> Sequence[Message]:
        """The whole body, if it is small enough and comes in time."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.options.max_body:
            raise self._too_large()
        messages, size = list[Message](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    messages.append(message)
                    size += len(message.get("body", b""))
                    if size > self.options.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return messages
        except TimeoutError:
            raise RequestFault(408, f"the body was not here after {BODY_SECONDS} seconds") from None

    def _too_large(self) -> RequestFault:
        most = self.options.max_body
        return RequestFault(
            413, f"the body is larger than {most} bytes: see --max-body", code="body_too_large"
        )


def _again(messages: Sequence[Message], receive: Receive) -> Receive:
    """Messages that were taken, and then what comes after them."""
    left = iter(messages)

    async def get() -> Message:
        found = next(left, None)
        return await receive() if found is None else found

    return get
