"""One client script against two servers: ours, and llama.cpp's (the package xllamacpp), on the same model.

    python benchmarks/peer.py FILE.gguf CHECKPOINT        SmolLM2, as GGUF and as the checkpoint made of it
    python benchmarks/peer.py --url http://127.0.0.1:8000 --model demo       any server alone

Every probe is a request that clients send, and what is kept of its answer is what a client would act on: the
status, which fields are there, how a stream ends. Where the two differ belongs in docs/server.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx2

from benchmarks.serve import ServerProcess

Json = dict[str, Any]
PROMPT = "The capital of France is"
JSON_TYPE = {"content-type": "application/json"}
CHAT = [{"role": "user", "content": "Say hello in one word."}]
ENDED = [*CHAT, {"role": "assistant", "content": "He"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SYSTEM = """\
base: {{model: {folder}, dtype: float32, chat: tokenizer}}
expert: {{model: {folder}, dtype: float32, chat: tokenizer}}
antiexpert: {{model: {folder}, dtype: float32, chat: tokenizer}}
"""


class Asker:
    """Asks one server, and keeps of an answer what a client would act on."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def post(self, path: str, **body: object) -> httpx2.Response:
        """A request with a body; greedy and short unless it says otherwise."""
        usual: Json = {"model": self.model, "temperature": 0, "max_tokens": 4}
        return httpx2.post(f"{self.url}{path}", json=usual | body, timeout=120)

    def completion(self, **body: object) -> str:
        """Of /v1/completions: the status, the ends, the text."""
        found = self.post("/v1/completions", **{"prompt": PROMPT, **body})
        return said(found, lambda whole: [(c["finish_reason"], c["text"][:40]) for c in whole["choices"]])

    def keys(self, *fields: str, **body: object) -> str:
        """Of /v1/completions: which of these fields its first choice has, with the lengths of lists."""
        found = self.post("/v1/completions", **{"prompt": PROMPT, **body})
        return said(found, lambda whole: shape(whole["choices"][0], fields))

    def chat(self, **body: object) -> str:
        """Of /v1/chat/completions: the status, the end, the text."""
        found = self.post("/v1/chat/completions", **{"messages": CHAT, **body})
        return said(
            found,
            lambda whole: [(c["finish_reason"], c["message"]["content"][:40]) for c in whole["choices"]],
        )

    def stream(self, path: str, **body: object) -> str:
        """How a stream begins and ends."""
        found = self.post(path, stream=True, **body)
        lines = [line[6:] for line in found.text.splitlines() if line.startswith("data: ")]
        if found.status_code != 200 or not lines:
            return said(found, lambda whole: whole)
        last = lines[-1] if lines[-1] == "[DONE]" else "an event"
        before = [json.loads(line) for line in lines if line != "[DONE]"]
        ends = [c["finish_reason"] for one in before for c in one["choices"] if c["finish_reason"]]
        kind = found.headers["content-type"].split(";")[0]
        return f"200 {kind}; ends {ends}, usage {usages(before)}, then {last}"


def usages(events: list[Json]) -> str:
    """Where in a stream the token counts are."""
    return "in the last event" if events and events[-1].get("usage") else "nowhere"


def said(found: httpx2.Response, read: Callable[[Json], object]) -> str:
    """The status, and what is read from a good answer or said in an error."""
    try:
        content = found.json()
    except ValueError:
        return f"{found.status_code} {found.text[:60]!r}"
    if found.status_code != 200:
        error = content.get("error", content)
        kind = error.get("type", "") if isinstance(error, dict) else type(error).__name__
        return f"{found.status_code} {kind}"
    return f"200 {read(content)}"


def shape(choice: Json, fields: tuple[str, ...]) -> Json:
    """The lengths of the lists of `logprobs`, or which fields it has."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return {"logprobs": logprobs}
    return {name: len(logprobs[name]) if name in logprobs else None for name in fields}


LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "content")
PROBES: dict[str, Callable[[Asker], str]] = {
    "greedy text": lambda a: a.completion(),
    "list of texts": lambda a: a.completion(prompt=[PROMPT, "One, two,"]),
    "token ids": lambda a: a.completion(prompt=[504, 3575, 282, 4649, 314]),
    "list of token ids": lambda a: a.completion(prompt=[[504, 3575], [504, 3575, 282]]),
    "empty text": lambda a: a.completion(prompt="", max_tokens=1)[:3],
    "n = 2, seed": lambda a: str(len(a.completion(n=2, temperature=1, seed=3).split("('length'")) - 1),
    "same seed, same text": lambda a: str(
        a.completion(temperature=1, seed=3) == a.completion(temperature=1, seed=3)
    ),
    "stop string": lambda a: a.completion(stop=[" Paris"]),
    "echo": lambda a: a.completion(echo=True, max_tokens=1),
    "logprobs": lambda a: a.keys(*LISTS, logprobs=2),
    "echo and logprobs": lambda a: a.keys(*LISTS, logprobs=1, echo=True, max_tokens=1),
    "max_tokens = 0": lambda a: a.completion(max_tokens=0)[:3],
    "max_tokens = -1": lambda a: a.completion(max_tokens=-1, stop=["."])[:3],
    "stream": lambda a: a.stream("/v1/completions", prompt=PROMPT),
    "stream with usage": lambda a: a.stream(
        "/v1/completions", prompt=PROMPT, stream_options={"include_usage": True}
    ),
    "chat": lambda a: a.chat(),
    "chat stream": lambda a: a.stream("/v1/chat/completions", messages=CHAT),
    "chat, text parts": lambda a: a.chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    ),
    "chat, last is the assistant's": lambda a: a.chat(messages=ENDED)[:40],
    "chat, no messages": lambda a: a.chat(messages=[]),
    "chat, tools": lambda a: a.chat(tools=TOOLS)[:28],
    "chat, response_format json": lambda a: a.chat(response_format={"type": "json_object"})[:28],
    "logit_bias": lambda a: a.completion(logit_bias={"7042": -100})[:28],
    "presence_penalty": lambda a: a.completion(presence_penalty=1.5)[:28],
    "min_p, top_k": lambda a: a.completion(min_p=0.1, top_k=5, temperature=1, seed=1)[:3],
    "unknown field": lambda a: a.completion(no_such_field=1)[:28],
    "unknown model": lambda a: a.completion(model="no-such-model")[:28],
    "temperature as text": lambda a: a.completion(temperature="hot")[:28],
    "not JSON": lambda a: said(
        httpx2.post(f"{a.url}/v1/completions", content=b"{", headers=JSON_TYPE), str
    ),
    "token out of range": lambda a: a.completion(prompt=[10**7])[:28],
    "too long": lambda a: a.completion(prompt="word " * 9000)[:40],
    "half a surrogate pair": lambda a: said(
        httpx2.post(
            f"{a.url}/v1/completions",
            content=json.dumps({"model": a.model, "prompt": "\ud800", "max_tokens": 1}).encode(),
            headers=JSON_TYPE,
        ),
        lambda whole: "an answer",
    ),
    "models": lambda a: said(httpx2.get(f"{a.url}/v1/models"), lambda whole: sorted(whole["data"][0])[:4]),
    "health": lambda a: said(httpx2.get(f"{a.url}/health"), str),
    "tokenize": lambda a: said(httpx2.post(f"{a.url}/tokenize", json={"prompt": "Hello"}), str),
    "no such route": lambda a: said(httpx2.get(f"{a.url}/v1/nothing"), str),
}  # fmt: skip


def probe(url: str, model: str) -> dict[str, str]:
    """What a server does with every probe; the exception where it closes the connection."""
    asker, found = Asker(url, model), dict[str, str]()
    for name, ask in PROBES.items():
        try:
            found[name] = ask(asker)
        except (httpx2.HTTPError, KeyError, TypeError, IndexError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"[:60]
        print(f"{model}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


@contextmanager
def llama_cpp(file: Path) -> Iterator[str]:
    """llama.cpp's server with a GGUF file, in a process of its own. -> its address."""
    code = (
        "import sys, time, xllamacpp as x\n"
        "p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 8192; p.n_parallel = 2\n"
        "p.cpuparams.n_threads = 2; p.port = 0; p.endpoint_metrics = True; p.warmup = False\n"
        "s = x.Server(p); print('AT', s.listening_address, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            line = ""
            while not line.startswith("AT "):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit("llama.cpp's server did not start")
            yield line.removeprefix("AT ").strip()
        finally:
            process.kill()


def both(gguf: Path, checkpoint: Path) -> dict[str, tuple[str, str]]:
    """Every probe against both servers: what ours does, what llama.cpp's does."""
    with tempfile.TemporaryDirectory() as folder:
        system = Path(folder) / "smollm2.yaml"
        system.write_text(SYSTEM.format(folder=checkpoint.resolve()))
        server = ServerProcess(str(system))
        server.start()
        try:
            address = f"http://127.0.0.1:{server.port}"
            name = httpx2.get(f"{address}/v1/models").json()["data"][0]["id"]
            ours = probe(address, name)
        finally:
            server.stop()
    with llama_cpp(gguf) as url:
        theirs = probe(url, "gguf")
    return {name: (ours[name], theirs[name]) for name in PROBES}


def main() -> None:
    """Probe, and print what was found as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="GGUF CHECKPOINT")
    parser.add_argument("--url")
    parser.add_argument("--model", default="demo")
    given = parser.parse_args()
    found: object = probe(given.url, given.model) if given.url else both(*given.files)
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
