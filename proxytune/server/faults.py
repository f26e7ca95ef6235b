"""What is answered where there is no answer: one line, in OpenAI's shape of an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

Kind = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
]
LONGEST = 500
"""Characters of a message: it may quote what was sent."""


class FaultBody(BaseModel):
    """The inside of an error."""

    message: str
    type: Kind
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None


class FaultResponse(BaseModel):
    """An error as it is sent."""

    error: FaultBody


class RequestFault(Exception):
    """A request that gets no answer, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: Kind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`status` is HTTP's; `retry_after` seconds, where it is worth to come again."""
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        line = " ".join(str(self).split())
        shown = line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
        safe = shown.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": safe, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers beside it."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found


def broken(message: str) -> RequestFault:
    """Something failed here, through no fault of the request."""
    return RequestFault(500, message, kind="server_error", code="internal_error")


def leaving() -> RequestFault:
    """The server is about to end."""
    return RequestFault(
        503, "the server shuts down", kind="server_error", code="shutting_down", retry_after=10
    )
