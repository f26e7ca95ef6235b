"""A server that misbehaves: every way in which an endpoint can fail to answer as it should, by name."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.endpoint import KEY

Outcome = Literal["fails", "judged", "no verdict"]
"""One line that says why; the verdicts all the same; or nothing to judge by."""


@dataclass
class Call:
    """One request, and the connection on which to misbehave."""

    connection: socket.socket
    number: int
    """1 is the first request that the server saw."""
    closing: threading.Event
    """The server is to stop: whoever dawdles stops, too."""

    def send(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        for part in parts:
            self.connection.sendall(part)

    def endlessly(self, part: bytes, seconds: float = 0.0) -> None:
        """Send the same until the client has enough."""
        while not self.closing.wait(seconds):
            self.send(part)

    def reset(self) -> None:
        """Close with RST in place of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@dataclass(frozen=True)
class Kind:
    """A misbehaviour."""

    act: Callable[[Call], None]
    outcome: Outcome = "fails"
    hangs: bool = False
    """Whether only a deadline ends it: tests give it a short one."""
    once: bool = False
    """Whether it is not retried."""


def head(status: str, *fields: str) -> bytes:
    """The first lines of a response."""
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode("latin-1")


def answer(body: bytes, *fields: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A whole response."""
    return head(status, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *fields) + body


def completion(message: Any = "A", usage: Any = None, **other: Any) -> dict[str, Any]:
    """A reply as it should be, apart from what is given."""
    words = {"role": "assistant", "content": message}
    counted = {"prompt_tokens": 100, "completion_tokens": 1} if usage is None else usage
    return {"choices": [{"index": 0, "message": words}], "usage": counted, **other}


GOOD = json.dumps(completion()).encode()


def says(body: bytes | Any, *fields: str, kind: str = "application/json", **how: Any) -> Kind:
    """A response of status 200 with this body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Kind(lambda call: call.send(answer(data, *fields, kind=kind)), **how)


def refuses(status: str, *fields: str, body: bytes | None = None, **how: Any) -> Kind:
    """A response of another status, with the key and escape sequences in its message."""
    error = {"error": {"message": f"no {KEY} \x1b[31m today\n\n{'x' * 5000}", "type": "y"}}
    data = json.dumps(error).encode() if body is None else body
    return Kind(lambda call: call.send(answer(data, *fields, status=status)), **how)


def sends(*parts: bytes, **how: Any) -> Kind:
    """These bytes, after which the connection is closed."""
    return Kind(lambda call: call.send(*parts), **how)


def repeats(first: bytes, then: bytes, seconds: float = 0.0, **how: Any) -> Kind:
    """The first bytes, and then the others without end."""

    def act(call: Call) -> None:
        call.send(first)
        call.endlessly(then, seconds)

    return Kind(act, **how)


def recovers(kind: Kind) -> Kind:
    """Two calls go wrong, the later ones are answered."""
    return Kind(lambda call: kind.act(call) if call.number <= 2 else call.send(answer(GOOD)), "judged")


def silent(call: Call) -> None:
    call.closing.wait()


CHUNKED = head("200 OK", "Content-Type: application/json", "Transfer-Encoding: chunked")
OPEN_ENDED = head("200 OK", "Content-Type: application/json", "Connection: close")
BOMB = gzip.compress(bytes(50_000_000))

KINDS: dict[str, Kind] = {
    # the body is no JSON
    "empty": says(b""),
    "plain text": says(b"Service ready."),
    "html": says(b"<html><body>Please log in</body></html>", kind="text/html"),
    "cut json": says(GOOD[:-20]),
    "events": says(b"data: " + GOOD + b"\n\ndata: [DONE]\n\n", kind="text/event-stream"),
    "invalid utf-8": says(GOOD.replace(b'"A"', b'"\xff\xfe\x80"')),
    "deeply nested": says(b"[" * 200_000),
    "a number of a million digits": says(b'{"choices": ' + b"9" * 900_000 + b"}"),
    # the JSON is not what it should be
    "null": says(None),
    "a list": says([GOOD.decode()]),
    "a number": says(7),
    "a string": says("A"),
    "no fields": says({}),
    "an error with status 200": says({"error": {"message": f"overloaded {KEY}", "code": 529}}),
    "choices null": says({"choices": None}),
    "no choices": says({"choices": []}),
    "choices an object": says({"choices": {"0": completion()["choices"][0]}}),
    "a choice of null": says({"choices": [None]}),
    "no message": says({"choices": [{"text": "A"}]}),
    "message null": says({"choices": [{"message": None}]}),
    "message a string": says({"choices": [{"message": "A"}]}),
    "no content": says({"choices": [{"message": {"role": "assistant"}}]}),
    "content a list": says(completion([{"type": "text", "text": "A"}])),
    "content a number": says(completion(1)),
    "content an object": says(completion({"text": "A"})),
    "content null": says(completion(None), outcome="no verdict"),
    "content empty": says(completion(""), outcome="no verdict"),
    "content of surrogates": says(completion("\ud800\x1b[2J A"), outcome="no verdict"),
    "a surrogate before the word": says(completion("\ud800\x1b A"), outcome="judged"),
    "content without end": says(completion("no " * 200_000), outcome="no verdict"),
    # usage is not what it should be
    "usage null": says({**completion(), "usage": None}, outcome="judged"),
    "usage a list": says({**completion(), "usage": [1, 2]}, outcome="judged"),
    "usage in words": says(completion(usage={"prompt_tokens": "many"}), outcome="judged"),
    "usage negative": says(
        completion(usage={"prompt_tokens": -10**9, "completion_tokens": -1}), outcome="judged"
    ),
    "usage no number": says(
        GOOD.replace(b"100", b"NaN").replace(b": 1}", b": Infinity}"), outcome="judged"
    ),
    "usage a truth value": says(
        completion(usage={"prompt_tokens": True, "completion_tokens": 1.5}), outcome="judged"
    ),
    # odd, and still to be read
    "another content type": says(GOOD, kind="text/html; charset=koi8-r", outcome="judged"),
    "utf-16": says(json.dumps(completion()).encode("utf-16"), outcome="judged"),
    "a byte order mark": says(b"\xef\xbb\xbf" + GOOD, outcome="judged"),
    "gzip": says(gzip.compress(GOOD), "Content-Encoding: gzip", outcome="judged"),
    "closes in place of a length": sends(OPEN_ENDED, GOOD, outcome="judged"),
    # encodings
    "gzip that is none": says(GOOD, "Content-Encoding: gzip"),
    "gzip cut": says(gzip.compress(GOOD)[:-12], "Content-Encoding: gzip"),
    "a gzip bomb": says(BOMB, "Content-Encoding: gzip"),
    "an unknown encoding": says(GOOD, "Content-Encoding: rot13"),
    # statuses
    "400": refuses("400 Bad Request", once=True),
    "400 in words of its own": refuses("400 Bad Request", body=b"\xff<html>", once=True),
    "401": refuses("401 Unauthorized", once=True),
    "402": refuses("402 Payment Required", once=True),
    "403": refuses("403 Forbidden", once=True),
    "404": refuses("404 Not Found", body=b"", once=True),
    "405": refuses("405 Method Not Allowed", once=True),
    "408": refuses("408 Request Timeout"),
    "409": refuses("409 Conflict"),
    "413": refuses("413 Payload Too Large", once=True),
    "418": refuses("418 \x1b[31mteapot", once=True),
    "422": refuses("422 Unprocessable Entity", once=True),
    "429": refuses("429 Too Many Requests"),
    "429 for a century": refuses("429 Too Many Requests", "Retry-After: 3153600000"),
    "429 before now": refuses("429 Too Many Requests", "Retry-After: -5"),
    "429 at a date": refuses("429 Too Many Requests", "Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"),
    "429 at no time": refuses("429 Too Many Requests", "Retry-After: nan", "Retry-After-Ms: soon"),
    "500": refuses("500 Internal Server Error"),
    "502 in html": refuses("502 Bad Gateway", body=b"<html>bad gateway</html>"),
    "503": refuses("503 Service Unavailable", body=b""),
    "504": refuses("504 Gateway Timeout"),
    "529": refuses("529 Overloaded"),
    "999": refuses("999 Nonsense", once=True),
    "204": sends(head("204 No Content")),
    "101": sends(head("101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")),
    "a redirect elsewhere": refuses("302 Found", "Location: http://127.0.0.1:9/steal", once=True),
    "a redirect to itself": refuses("307 Temporary Redirect", "Location: /v1/chat/completions", once=True),
    "a redirect to nowhere": refuses("301 Moved Permanently", once=True),
    "a redirect to a file": refuses("302 Found", "Location: file:///etc/passwd", once=True),
    # connections
    "closes at once": sends(),
    "resets": Kind(Call.reset),
    "closes in the head": sends(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "closes in the body": sends(head("200 OK", "Content-Length: 5000"), GOOD),
    "closes in a chunk": sends(CHUNKED, b"ff\r\n", GOOD[:40]),
    "chunks of nonsense": sends(CHUNKED, b"zz\r\n", GOOD),
    "a chunk of negative size": sends(CHUNKED, b"-5\r\n", GOOD, b"\r\n0\r\n\r\n"),
    "a chunk of enormous size": repeats(CHUNKED + b"f" * 15 + b"\r\n", b"x" * 65536),
    "a negative length": sends(head("200 OK", "Content-Length: -1"), GOOD),
    "two lengths": sends(head("200 OK", "Content-Length: 3", "Content-Length: 5"), GOOD),
    "a length in words": sends(head("200 OK", "Content-Length: many"), GOOD),
    "no http": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a status in words": sends(b"HTTP/1.1 fine\r\n\r\n"),
    "http 0.9": sends(GOOD),
    "zeros in the head": sends(b"HTTP/1.1 200 OK\r\nX: \x00\x00\r\n\r\n", GOOD),
    # too much
    "400 MB": repeats(head("200 OK", "Content-Length: 400000000"), b" " * 65536),
    "a body without end": repeats(OPEN_ENDED, b" " * 65536),
    "chunks without end": repeats(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "an error without end": repeats(head("500 Internal Server Error"), b"error " * 10000),
    "a head without end": repeats(b"HTTP/1.1 200 OK\r\n", b"X-Filler: " + b"x" * 1000 + b"\r\n"),
    # too slow
    "silence": Kind(silent, hangs=True),
    "a drip of a body": repeats(head("200 OK", "Content-Length: 5000"), b" ", 0.05, hangs=True),
    "a drip of chunks": repeats(CHUNKED, b"1\r\n \r\n", 0.05, hangs=True),
    "a drip of a head": repeats(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05, hangs=True),
    "a drip of an error": repeats(head("503 Service Unavailable"), b"x", 0.05, hangs=True),
    "always about to continue": repeats(b"", head("100 Continue"), 0.05, hangs=True),
    # what passes
    "recovers from html": recovers(says(b"<html>")),
    "recovers from a 500": recovers(refuses("500 Internal Server Error")),
    "recovers from resets": recovers(Kind(Call.reset)),
}  # fmt: skip


@dataclass
class Misbehaving:
    """A server on this machine, and what it saw."""

    url: str = ""
    kind: Kind = field(default_factory=lambda: KINDS["empty"])
    calls: int = 0


def _serve(
    state: Misbehaving, connection: socket.socket, lock: threading.Lock, closing: threading.Event
) -> None:
    """Read one request, and answer it as the kind does."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(30)
        reader = connection.makefile("rb")
        length = 0
        while (line := reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        reader.read(length)
        with lock:
            state.calls += 1
            number = state.calls
        state.kind.act(Call(connection, number, closing))


@contextlib.contextmanager
def misbehaving() -> Iterator[Misbehaving]:
    """A server of which `kind` says how it misbehaves."""
    state, lock, closing = Misbehaving(), threading.Lock(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    state.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    serving: list[threading.Thread] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                thread = threading.Thread(target=_serve, args=(state, connection, lock, closing), daemon=True)
                thread.start()
                serving.append(thread)

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield state
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *serving):
            thread.join()
