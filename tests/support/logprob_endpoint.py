"""A server over a model of ours that speaks completions and chat completions, with log-probabilities in the
forms that servers have."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

from proxytune.black_box.token_bytes import TokenBytes
from proxytune.decoding import opened
from proxytune.models import Loaded


@dataclass
class LogprobEndpoint:
    """How the server answers, and what it saw."""

    model: Loaded
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    form: Literal["content", "names", "llama.cpp", "none"] = "content"
    """content: as chat completions. names: as the older completions. llama.cpp: content with ids, in which
    special tokens have no text."""
    most: int = 10**6
    """Tokens of a position that it shows at most."""
    hides: str = ""
    """In prompts with this text it does not show the letters of options."""
    chat_only: bool = False
    fail_after: int | None = None
    """Answer with 500 after so many calls."""
    key: str | None = None
    usage: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tokens = TokenBytes.of(self.model.tokenizer, self.model.size)

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """A response of a route."""
        chat = path.endswith("/chat/completions")
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        tokenizer = self.model.tokenizer
        ids = opened(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        hidden = bool(self.hides) and self.hides in str(prompt)
        shown = asked.get("top_logprobs", 0) if chat else asked.get("logprobs", 0)
        start, positions = len(ids), []
        ended, stops = False, asked.get("stop", [])
        while len(ids) - start < asked["max_tokens"] and not ended:
            with self.lock:
                logprobs = self.model.logits(ids)[: self.model.size].double().log_softmax(-1)
            if hidden:
                logprobs[[i for letter in (b" A", b" B") for i in self.tokens.ids[letter]]] = -9999.0
            token = int(logprobs.argmax())
            positions.append((token, logprobs))
            ended = token == tokenizer.eos_token_id
            ids += [] if ended else [token]
            text = self.tokens.text(ids[start:]).decode("utf-8", "replace")
            ended = ended or any(stop in text for stop in stops)
        text = self.tokens.text(ids[start:]).decode("utf-8", "replace")
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if shown and self.form != "none":
            choice["logprobs"] = self._logprobs(positions, min(shown, self.most))
        counted = {"prompt_tokens": start, "completion_tokens": len(positions)}
        return {"object": "x", "choices": [choice], **({"usage": counted} if self.usage else {})}

    def _logprobs(self, positions: Sequence[tuple[int, torch.Tensor]], shown: int) -> dict[str, Any]:
        if self.form == "names":
            tops = [
                {self._name(int(i)): float(lp[i]) for i in lp.topk(min(shown, len(lp))).indices}
                for _, lp in positions
            ]
            names = [self._name(token) for token, _ in positions]
            return {
                "tokens": names,
                "token_logprobs": [float(lp[t]) for t, lp in positions],
                "top_logprobs": tops,
            }
        return {
            "content": [
                {
                    **self._entry(token, lp),
                    "top_logprobs": [self._entry(int(i), lp) for i in lp.topk(min(shown, len(lp))).indices],
                }
                for token, lp in positions
            ]
        }

    def _name(self, token: int) -> str:
        try:
            return self.tokens.data[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokens.data[token])

    def _entry(self, token: int, logprobs: torch.Tensor) -> dict[str, Any]:
        data = self.tokens.data[token]
        if self.form == "llama.cpp" and token in self.tokens.special:
            data = b""
        found = {
            "token": data.decode("utf-8", "replace"),
            "bytes": list(data),
            "logprob": float(logprobs[token]),
        }
        return found | ({"id": token} if self.form == "llama.cpp" else {})


@contextlib.contextmanager
def serving_logprobs(model: Loaded) -> Iterator[LogprobEndpoint]:
    """A server on this machine over a model."""
    state = LogprobEndpoint(model)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.seen.append(asked)
                count = len(state.seen)
            state.keys.add(self.headers["Authorization"])
            if state.key is not None and self.headers["Authorization"] != f"Bearer {state.key}":
                return self.say(401, {"error": {"message": "Incorrect API key provided"}})
            if state.chat_only and not self.path.endswith("/chat/completions"):
                return self.say(404, {"error": {"message": "this is a chat model"}})
            if state.fail_after is not None and count > state.fail_after:
                return self.say(500, {"error": {"message": "out of order"}})
            self.say(200, state.answer(self.path, asked))

        def say(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            with contextlib.suppress(ConnectionError):
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
