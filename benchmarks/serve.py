"""The server under the clock and under load.

    python benchmarks/serve.py throughput              requests at once, beside offline batching of the same
    python benchmarks/serve.py load --seconds 120      64 clients that stream, leave, stall and send nonsense;
                                                       the server is killed and started again at the beginning

`throughput` counts tokens per second of the same prompts, which give the same texts: all in one call of
`model.generate`, and one request each to a server in a process of its own. They run in turn; a ratio is the
median over the turns, with the least and the most. `_cpu` is the ratio of CPU seconds, of the server's
process and of this one: where others use the machine too, it says more than the wall clock does. Alone on two
cores a server can do better than it: the event loop then runs beside the models.

`load` checks after each half that nothing is left: no response under way, no token in a KV cache, as many
threads as before, and memory that no longer grows."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

import proxytune
from proxytune import Sampling
from proxytune.demo.world import gsm_rows

READY_SECONDS = 600
ROLES = {"proxytune_format": "roles"}
"""Prompts as `generate` shows them to every model."""
KEPT_MEMORY = 1.15
"""Resident memory after the second half, as a share of that after the first, at most."""
KINDS = ("whole", "whole", "leave", "leave", "slow", "never", "nonsense", "wrong")
NONSENSE = (
    b"{",
    b"\xff\xff",
    b"null",
    b"[" * 5000,
    b'{"model": 1}',
    b'{"model": "demo", "prompt": "a", "x": 1}',
)


@dataclass
class ServerProcess:
    """A server in a process of its own, on a free port."""

    system: str
    options: Sequence[str] = ()
    port: int = 0
    process: subprocess.Popen[str] | None = None
    started: int = 0

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "proxytune", "serve", "--system", self.system, "--roles", "proxy"]
        root = str(Path(__file__).resolve().parent.parent)
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *self.options],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
        )  # fmt: skip
        assert self.process.stderr is not None
        until = time.monotonic() + READY_SECONDS
        line, said = "", ""
        while "serving" not in line:
            line = self.process.stderr.readline()
            said += line
            if not line or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {said}")
        self.port = int(line.rsplit(":", 1)[1])
        self.started += 1
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self.process is not None
        return self.process.pid

    @property
    def model(self) -> str:
        """What it calls the proxy."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models") as found:
            name: str = json.load(found)["data"][0]["id"]
        return name

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it by a signal."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.communicate(timeout=60)

    def metrics(self) -> dict[str, float]:
        """What it counts, summed over labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as found:
            lines = found.read().decode().splitlines()
        totals = Counter[str]()
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                totals[name.split("{")[0]] += float(value)  # type: ignore[assignment]
        return dict(totals)

    def facts(self) -> dict[str, float]:
        """What must come back to where it was."""
        assert self.process is not None
        found, here = self.metrics(), psutil.Process(self.process.pid)
        return {
            **{name: found[f"proxytune_{name}"] for name in ("running", "waiting", "kv_tokens")},
            "threads": here.num_threads(),
            "files": here.num_fds(),
            "memory_mb": round(here.memory_info().rss / 2**20, 1),
        }


def prompts(count: int) -> list[str]:
    """Questions of the demo world."""
    return [
        f"Answer the following question.\n\nQuestion: {row['question']}" for row in gsm_rows("test", count)
    ]


async def post(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request. -> its connection, nothing of the answer read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def answer(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    reader, writer = await post(port, json.dumps(body).encode())
    try:
        content = await reader.read()
        found: dict[str, Any] = json.loads(content.split(b"\r\n\r\n", 1)[1])
        return found
    finally:
        writer.close()


async def streamed(port: int, body: dict[str, Any]) -> str:
    """The text of a streamed answer."""
    reader, writer = await post(port, json.dumps({**body, "stream": True}).encode())
    pieces = []
    try:
        async for line in reader:
            if line.startswith(b"data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(pieces)
    finally:
        writer.close()


# Throughput


def throughput(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of a server, as a share of offline batching."""
    asked = prompts(given.requests)
    sampling = Sampling(max_new_tokens=given.tokens)
    server = ServerProcess(given.system)
    server.start()
    bodies = [
        {"model": server.model, "prompt": prompt, "max_tokens": given.tokens, "temperature": 0,
         **ROLES}
        for prompt in asked
    ]  # fmt: skip
    rows = list[dict[str, float]]()
    try:
        with proxytune.load(given.system) as model:
            expected = model.generate(asked, sampling=sampling)  # the warm-up of both
            asyncio.run(_together(server.port, bodies, stream=False))
            tokens = sum(len(completion.token_ids) for completion in expected)
            for _ in range(given.repeats):
                row: dict[str, float] = {"tokens": tokens}
                with Clock(row, "offline", os.getpid()):
                    model.generate(asked, sampling=sampling)
                for kind in ("whole", "streamed"):
                    with Clock(row, kind, server.pid):
                        texts = asyncio.run(_together(server.port, bodies, stream=kind == "streamed"))
                    row[f"{kind}_same"] = sum(a == b.text for a, b in zip(texts, expected, strict=True))
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    finally:
        server.stop()
    ratios = {
        name: _spread([row[f"offline{of}"] / row[name] for row in rows])
        for of in ("", "_cpu")
        for name in (f"whole{of}", f"streamed{of}")
    }
    return {"ratios": ratios, "rows": rows, "requests": len(asked)}


def _spread(ratios: list[float]) -> dict[str, float]:
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return {"median": round(middle, 3), "least": round(low, 3), "most": round(high, 3)}


@dataclass
class Clock:
    """Seconds of a block: on the wall, and of a process on the CPU."""

    into: dict[str, float]
    name: str
    process: int

    def __enter__(self) -> None:
        self.began = time.perf_counter(), self._cpu()

    def __exit__(self, *_: object) -> None:
        wall, cpu = self.began
        self.into[self.name] = round(time.perf_counter() - wall, 3)
        self.into[f"{self.name}_cpu"] = round(self._cpu() - cpu, 3)

    def _cpu(self) -> float:
        times = psutil.Process(self.process).cpu_times()
        return float(times.user + times.system)


async def _together(port: int, bodies: Sequence[dict[str, Any]], *, stream: bool) -> list[str]:
    if stream:
        return list(await asyncio.gather(*(streamed(port, body) for body in bodies)))
    found = await asyncio.gather(*(answer(port, body) for body in bodies))
    return [one["choices"][0]["text"] for one in found]


# Load


@dataclass
class Clients:
    """Clients of every kind, until a time."""

    server: ServerProcess
    until: float
    dice: random.Random
    asked: list[str] = field(default_factory=lambda: prompts(64))
    done: Counter[str] = field(default_factory=Counter)
    """What became of the requests, by kind."""

    async def run(self, clients: int) -> None:
        """All of them at once."""
        await asyncio.gather(*(self._client() for _ in range(clients)))

    async def _client(self) -> None:
        while time.monotonic() < self.until:
            kind = self.dice.choice(KINDS)
            try:
                await asyncio.wait_for(getattr(self, f"_{kind}")(), 120)
                self.done[kind] += 1
            except (OSError, EOFError):
                self.done[f"{kind}: no connection"] += 1  # the server was killed, or is being started
                await asyncio.sleep(0.5)

    def _body(self, **given: object) -> dict[str, Any]:
        tokens = self.dice.randint(8, 200)
        return {
            "model": self.server.system,
            "prompt": self.dice.choice(self.asked),
            "max_tokens": tokens,
            "min_tokens": tokens,
            "temperature": 0.8,
            "stream": True,
            "proxytune_trace": self.dice.random() < 0.2,
            "n": self.dice.choice((1, 1, 1, 3)),
            **given,
        }

    async def _open(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await post(self.server.port, json.dumps(body).encode())
        status = (await reader.readline()).split()
        if status[1:2] == [b"429"]:
            self.done["429"] += 1
            await asyncio.sleep(0.2)
        elif status[1:2] != [b"200"]:
            raise EOFError
        return reader, writer

    async def _whole(self) -> None:
        reader, writer = await self._open(self._body())
        last = b""
        async for line in reader:
            last = line if line.startswith(b"data:") else last
        writer.close()
        if last and last.strip() != b"data: [DONE]":
            raise EOFError

    async def _leave(self) -> None:
        reader, writer = await self._open(self._body())
        for _ in range(self.dice.randint(0, 60)):
            if not await reader.readline():
                break
        writer.transport.abort()

    async def _slow(self) -> None:
        reader, writer = await self._open(self._body(max_tokens=30, min_tokens=30))
        while await reader.read(200):
            await asyncio.sleep(self.dice.random() * 0.02)
        writer.close()

    async def _never(self) -> None:
        _, writer = await post(self.server.port, json.dumps(self._body(proxytune_trace=True)).encode())
        await asyncio.sleep(self.dice.random() * 3)
        writer.transport.abort()

    async def _nonsense(self) -> None:
        reader, writer = await post(self.server.port, self.dice.choice(NONSENSE))
        status = (await reader.read()).split(b" ", 2)
        writer.close()
        if status[1:2] != [b"400"]:
            raise EOFError

    async def _wrong(self) -> None:
        """Bytes that are no HTTP, and a body that does not come."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 900\r\n\r\n{"
        writer.write(self.dice.choice((b"\x16\x03\x01\x00\xff" * 20, b"GET / HTTP/9\r\n\r\n", head)))
        await writer.drain()
        await asyncio.sleep(self.dice.random())
        writer.transport.abort()


def load(given: argparse.Namespace) -> dict[str, Any]:
    """Two halves, with a kill between them. -> what clients saw, and what was left after each half."""
    options = ["--max-waiting", str(2 * given.clients), "--kv-memory", "256MB"]  # what is full stays full
    server = ServerProcess(given.system, options)
    server.start()
    restart, done, facts = Counter[str](), Counter[str](), list[dict[str, float]]()
    dice = random.Random(given.seed)

    def half(seconds: float) -> None:
        clients = Clients(server, time.monotonic() + seconds, dice)
        asyncio.run(clients.run(given.clients))
        done.update(clients.done)
        facts.append(_settled(server))

    async def killed() -> Counter[str]:
        clients = Clients(server, time.monotonic() + given.kill_seconds, dice)
        running = asyncio.ensure_future(clients.run(given.clients))
        await asyncio.sleep(given.kill_seconds / 2)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        await asyncio.to_thread(server.start)
        await running
        return clients.done

    try:
        restart.update(asyncio.run(killed()))
        half(given.seconds / 2)
        half(given.seconds / 2)
        same = _same_as_offline(server, given.system)
    finally:
        server.stop()
    first, second = facts
    left = {name: second[name] for name in ("running", "waiting", "kv_tokens") if second[name]}
    grown = second["memory_mb"] / first["memory_mb"]
    failed = any("no connection" in kind for kind in done)
    sound = not left and second["threads"] <= first["threads"] and grown <= KEPT_MEMORY
    return {"sound": sound and same and not failed, "around_the_kill": dict(sorted(restart.items())),
            "requests": dict(sorted(done.items())), "after": facts, "same_as_offline": same,
            "exit": server.process.returncode if server.process else None}  # fmt: skip


def _settled(server: ServerProcess) -> dict[str, float]:
    """What is left once all clients have gone."""
    until = time.monotonic() + 60
    while (found := server.facts())["running"] + found["waiting"] + found["kv_tokens"]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return found


def _same_as_offline(server: ServerProcess, system: str) -> bool:
    """Whether a server that went through all this still gives what a fresh model gives."""
    [prompt] = prompts(1)
    body = {
        "model": system,
        "prompt": prompt,
        "max_tokens": 60,
        "temperature": 0,
        "proxytune_format": "roles",
    }
    found = asyncio.run(answer(server.port, body))["choices"][0]["text"]
    with proxytune.load(system) as model:
        [expected] = model.generate([prompt], sampling=Sampling(max_new_tokens=60))
    return bool(found == expected.text)


def main() -> None:
    """Run what is asked and print it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("throughput", "load"))
    parser.add_argument("--system", default="demo")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kill-seconds", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = throughput(given) if given.what == "throughput" else load(given)
    print(json.dumps(found, indent=2))
    if given.what == "load" and not found["sound"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
