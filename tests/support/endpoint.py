"""A server on this machine in place of a paid one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-0123456789"


@dataclass
class Endpoint:
    """How the local server answers, and what it saw."""

    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    failures: int = 0
    """Answer this many calls with 429 before the others."""
    status: int = 200
    reply: str | None = None
    """What to say; None prefers the output with GOOD in it."""
    usage: Any = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 1})
    reasons: bool = False
    """Whether the model is one that reasons, and refuses `max_tokens` and `temperature`."""


@contextmanager
def serving() -> Iterator[Endpoint]:
    """A server on this machine that speaks chat completions."""
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append(asked)
            state.keys.add(self.headers["Authorization"])
            status = state.status
            if state.failures:
                state.failures, status = state.failures - 1, 429
            if state.reasons and "max_tokens" in asked:
                return self.say(400, {"error": {"message": "Use 'max_completion_tokens' instead."}})
            if status != 200:
                return self.say(status, {"error": {"message": f"no {KEY} today", "type": "x"}})
            text = asked["messages"][1]["content"]
            first = text.index("<output_a>") < text.find("GOOD") < text.index("</output_a>")
            words = {"content": state.reply or ("A" if first else "B"), "role": "assistant"}
            choice = {"index": 0, "finish_reason": "stop", "message": words}
            self.say(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                           "choices": [choice], "usage": state.usage})  # fmt: skip

        def say(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 429:
                self.send_header("Retry-After-Ms", "1")
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
