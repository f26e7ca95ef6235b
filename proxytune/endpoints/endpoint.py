"""An OpenAI-style endpoint: one call to it, whatever the server does.

A server may answer late, byte by byte, without end, or with anything but JSON. So one deadline covers all of
a call, a reply has a largest size, and what is no reply is a `CallFailed` that says why in one line.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
import urllib.parse
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from proxytune.endpoints.prices import Tokens
from proxytune.errors import UserError

if TYPE_CHECKING:
    import ssl

USUAL_URL = "https://api.openai.com/v1"
MOST_TOKENS = 10**9
"""No call has more: a larger number is no count."""
_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may mend."""


@dataclass(frozen=True)
class CallLimits:
    """How long an endpoint may take, how much it may send, and how often it is asked."""

    deadline: float = 120.0
    """Seconds for one call, from connecting to the last byte."""
    reply_bytes: int = 1 << 20
    """Of a reply, packed and unpacked."""
    retries: int = 6
    pause: float = 0.5
    """Seconds before the first retry. Each further one waits twice as long."""
    longest_pause: float = 60.0
    """Seconds before a retry at most, also where the server asks for more."""

    def pause_before(self, retry: int, asked: float | None) -> float:
        """Seconds to wait before a retry (1 is the first)."""
        return min(self.pause * 2 ** (retry - 1) if asked is None else asked, self.longest_pause)


@dataclass(frozen=True)
class Reply:
    """What the model said."""

    text: str
    """Empty where it said nothing."""
    prompt_tokens: int | None
    """As reported; None where that is missing or no count."""
    completion_tokens: int | None

    def tokens(self, most: Tokens) -> Tokens:
        """What it cost by its report, or the most that it may have cost where it reports no count."""
        return reported(self.prompt_tokens, self.completion_tokens, most)


@dataclass(frozen=True)
class Answer:
    """The JSON of a response that is one, before anything in it is read."""

    content: Any
    begins: str
    """Its first characters, fit for a message."""

    @property
    def prompt_tokens(self) -> int | None:
        """As reported; None where that is missing, zero or no count."""
        return _count(self._usage.get("prompt_tokens")) or None

    @property
    def completion_tokens(self) -> int | None:
        """As reported; None where that is missing or no count."""
        return _count(self._usage.get("completion_tokens"))

    @property
    def _usage(self) -> Mapping[str, Any]:
        usage = self.content.get("usage") if isinstance(self.content, dict) else None
        return usage if isinstance(usage, dict) else {}

    def unreadable(self, why: str) -> CallFailed:
        """The failure that it is no reply."""
        return _unreadable(why, self.begins)


class CallFailed(Exception):
    """A call that brought no reply."""

    def __init__(
        self, reason: str, *, again: bool, paid: bool, status: int = 0, after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        """Of HTTP; 0 where none arrived, or one that says success."""
        self.reason = reason
        self.again = again
        """Whether another try may do better."""
        self.paid = paid
        """Whether it may cost money nevertheless."""
        self.after = after
        """Seconds to wait, where the server says so."""


@dataclass(frozen=True)
class _Response:
    """What a server sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool
    """Whether the body ended before it was too large."""
    most: int
    """Bytes from which on it is."""


@dataclass(frozen=True)
class Endpoint:
    """Where chat completions are asked for. The key is never shown."""

    url: str
    key: str = field(repr=False)
    """Empty where there is none."""
    limits: CallLimits = CallLimits()
    url_from: str = "OPENAI_BASE_URL"
    """Where the address was given, for messages."""
    key_from: str = "OPENAI_API_KEY"
    """The variable that the key was in."""

    @classmethod
    def of_environment(cls, limits: CallLimits) -> Endpoint:
        """The endpoint in OPENAI_BASE_URL and OPENAI_API_KEY; local servers need no key."""
        url = os.environ.get("OPENAI_BASE_URL") or USUAL_URL
        if not is_address(url):
            raise UserError(f"OPENAI_BASE_URL={url!r:.200}: give http:// or https://, a host and a path")
        return cls(url.rstrip("/"), key_in("OPENAI_API_KEY"), limits)

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """One chat completion. Raises CallFailed."""
        answer = self.post("chat/completions", body)
        match answer.content:
            case {"choices": [{"message": {"content": str() | None as text}}, *_]}:
                return Reply(text or "", answer.prompt_tokens, answer.completion_tokens)
            case _:
                raise answer.unreadable("has no text in choices[0].message.content")

    def post(self, path: str, body: Mapping[str, Any], reply_bytes: int | None = None) -> Answer:
        """Send a body of JSON to a path below the address, and read the JSON that comes back, which has at
        most so many bytes (the limit's own by default). Raises CallFailed."""
        import httpx2

        limits = self.limits
        seconds = limits.deadline
        try:
            response = asyncio.run(
                self._post(path, json.dumps(body).encode(), reply_bytes or limits.reply_bytes)
            )
        except TimeoutError:
            raise CallFailed(f"no whole answer within {seconds:g} s", again=True, paid=True) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise CallFailed(f"no connection ({self._plain(error)})", again=True, paid=False) from None
        except (
            httpx2.InvalidURL,
            httpx2.UnsupportedProtocol,
            ImportError,
            ValueError,
            ExceptionGroup,
        ) as error:
            # a proxy in the environment that cannot be meant, or whose kind needs another package
            raise CallFailed(f"cannot ask it ({self._plain(error)})", again=False, paid=False) from None
        except httpx2.TransportError as error:
            what = f"the connection failed ({type(error).__name__}: {self._plain(error)})"
            raise CallFailed(what, again=True, paid=True) from None
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        return self._reply(response)

    async def _post(self, path: str, content: bytes, most: int) -> _Response:
        """Send a request and read the response up to its largest size, all within the deadline."""
        import httpx2

        headers = {
            "Authorization": f"Bearer {self.key or 'none'}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
        }
        address = f"{self.url}/{path}"
        async with (
            asyncio.timeout(self.limits.deadline),
            # a redirect is not followed: it would take the key elsewhere
            httpx2.AsyncClient(verify=self._trusted, timeout=None, follow_redirects=False) as client,
            client.stream("POST", address, content=content, headers=headers) as response,
        ):
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > most:
                    break
            whole = len(body) <= most
            return _Response(response.status_code, dict(response.headers), bytes(body), whole, most)

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """The certificates, read once."""
        import httpx2

        return httpx2.create_ssl_context()

    def _refusal(self, response: _Response) -> CallFailed:
        """What a status says that is no success."""
        status, said = response.status, self._message(response.body)
        if 300 <= status < 400:
            target = self._plain(response.headers.get("location", "nowhere"))
            what = f"it redirects to '{target}': {self.url_from} must name the endpoint itself"
            return CallFailed(f"{status}: {what}", again=False, paid=False)
        if status in (401, 403):
            return CallFailed(f"{status}: it refuses {self.key_from}{said}", again=False, paid=False)
        again = status in _AGAIN or 500 <= status < 600
        after = _after(response.headers)
        return CallFailed(f"status {status}{said}", again=again, paid=False, status=status, after=after)

    def _message(self, body: bytes) -> str:
        """What a server says about an error, in the forms that servers have."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = body.decode("utf-8", "replace")
        match content:
            case {"error": {"message": str(text)}} | {"error": str(text)} | {"message": str(text)}:
                pass
            case str(text):
                pass
            case _:
                text = ""
        return f" ({shown})" if (shown := self._plain(text)) else ""

    def _reply(self, response: _Response) -> Answer:
        """The JSON in a response of a status that says success."""
        body = self._unpacked(response)
        begins = self._plain(body[:4096].decode("utf-8", "replace"))[:60]
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise _unreadable("is no JSON", begins) from None
        if isinstance(content, dict) and "choices" not in content and "error" in content:
            raise CallFailed(f"its reply is an error{self._message(body)}", again=True, paid=True)
        return Answer(content, begins)

    def _unpacked(self, response: _Response) -> bytes:
        """The body, whole and unpacked: some servers pack although they are asked not to."""
        most = response.most
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        body, whole = response.body, response.whole
        if whole and encoding in ("gzip", "x-gzip", "deflate"):
            unpacking = zlib.decompressobj(wbits=47)  # either form, known by its first bytes
            try:
                body = unpacking.decompress(body, most + 1)  # a bomb goes off no further than this
            except zlib.error:
                raise _unreadable(f"is not {encoding}, as it claims") from None
            whole = len(body) <= most
            if whole and not unpacking.eof:
                raise _unreadable(f"ends within its {encoding}")
        elif whole and encoding not in ("", "identity"):
            raise _unreadable(f"is in the encoding '{self._plain(encoding)}'")
        if not whole:
            raise _unreadable(f"has more than {most:,} bytes")
        return body

    def _plain(self, text: object) -> str:
        """A server's words as part of one line of readable length: no key, nothing that a terminal obeys."""
        said = str(text).replace(self.key, "***") if self.key else str(text)
        words = " ".join(said.split())
        return "".join(letter if letter.isprintable() else "?" for letter in words[:200])


def _unreadable(why: str, begins: str = "") -> CallFailed:
    """The failure that a reply is none."""
    more = f" (it begins '{begins}')" if begins else ""
    return CallFailed(f"its reply {why}{more}", again=True, paid=True)


def reported(prompt: int | None, completion: int | None, most: Tokens) -> Tokens:
    """What a call cost by its report, or the most that it may have cost where a count is missing."""
    return most[0] if prompt is None else prompt, most[1] if completion is None else completion


def key_in(variable: str) -> str:
    """The key in a variable of the environment; empty where there is none."""
    key = os.environ.get(variable, "")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable} holds characters that no key has (a line break?): set it again")
    return key


def is_address(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parts = urllib.parse.urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return (
        named and parts.scheme in ("http", "https") and url.isascii() and url.isprintable() and " " not in url
    )


def _count(value: object) -> int | None:
    """A number of tokens, or None for what is none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, as a number or a date; None where it names no time to come."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) / unit
        except ValueError:
            date = email.utils.parsedate_tz(text)
            try:
                seconds = math.nan if date is None else email.utils.mktime_tz(date) - time.time()
            except (ValueError, OverflowError):
                seconds = math.nan
        if seconds >= 0:
            return seconds
    return None
