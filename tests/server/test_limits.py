"""What a server does when it is asked too much, by the wrong people, or by clients that go away; and what a
fault ends."""

from __future__ import annotations

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import load_system
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, ServeOptions
from tests.support.checkout import environment
from tests.support.require import require_demo, require_or_skip

try:
    import httpx2

    from proxytune.server.keys import read_key
    from proxytune.server.run import listening, served_roles
    from proxytune.server.work.jobs import ServedJob
    from proxytune.server.work.service import ServedAnswer
    from tests.support.servers import Served, served
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")

LONG: dict[str, Any] = {
    "model": "demo", "prompt": "Question: Where do the Fusas live?", "max_tokens": 1500, "min_tokens": 1500,
    "temperature": 0.9, "seed": 1, "stream": True,
}  # fmt: skip
SHORT = {"model": "demo", "prompt": "a", "max_tokens": 2, "temperature": 0}
KEY = "sk-proxytune-test"


@pytest.fixture(scope="module")
def models() -> Models:
    require_demo()
    return Models(load_system("demo"))


@pytest.fixture(scope="module")
def here(models: Models) -> Iterator[Served]:
    options = ServeOptions(port=0, roles="proxy", max_waiting=2, max_body=20_000)
    with served(models, options, decode=DecodeOptions(batch=2)) as found:
        yield found


def post(here: Served, body: object) -> httpx2.Response:
    return httpx2.post(f"{here.url}/v1/completions", json=body, timeout=60)


def test_who_goes_away_frees_everything(here: Served) -> None:
    """A client that leaves in the middle of a stream, before its first event, and while it waits for a whole
    answer: its sequences end, and their KV is free."""
    with httpx2.stream("POST", f"{here.url}/v1/completions", json=LONG, timeout=60) as stream:
        next(stream.iter_lines())
    here.wait_idle()
    for n in (1, 3):
        with httpx2.stream("POST", f"{here.url}/v1/completions", json={**LONG, "n": n}, timeout=60):
            pass
        here.wait_idle()
        with pytest.raises(httpx2.TimeoutException):  # of one read, which a stream would not reach
            body = {**LONG, "n": n, "stream": False}
            httpx2.post(f"{here.url}/v1/completions", json=body, timeout=0.05)
        here.wait_idle()
    until = time.monotonic() + 10
    while left := [thing for thing in gc.get_objects() if type(thing) in (ServedAnswer, ServedJob)]:
        assert time.monotonic() < until, left  # the last handlers take a moment to return
        gc.collect()


def test_429_under_pressure(here: Served) -> None:
    """Two decode, two wait; the fifth is told to come again, and is answered when it does."""
    streams = [httpx2.stream("POST", f"{here.url}/v1/completions", json=LONG, timeout=60) for _ in range(2)]
    opened = [stream.__enter__() for stream in streams]
    assert [found.status_code for found in opened] == [200, 200]
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{here.url}/v1/completions", json={**LONG, "n": 2, "stream": False}, timeout=0.15)
    refused = post(here, {**SHORT, "n": 3})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert post(here, {**SHORT, "n": 5}).status_code == 400  # it never fits
    for stream in streams:
        stream.__exit__(None, None, None)
    here.wait_idle()
    assert post(here, {**SHORT, "n": 3}).status_code == 200


def test_sizes(here: Served) -> None:
    big = json.dumps({**SHORT, "prompt": "a" * 30_000}).encode()
    kind = {"content-type": "application/json"}
    assert httpx2.post(f"{here.url}/v1/completions", content=big, headers=kind).status_code == 413

    def parts() -> Iterator[bytes]:  # without a length that would say it
        for at in range(0, len(big), 1000):
            yield big[at : at + 1000]

    found = httpx2.post(f"{here.url}/v1/completions", content=parts(), headers=kind)
    assert found.status_code == 413 and "20000 bytes" in found.json()["error"]["message"]
    here.wait_idle()


def test_one_fault_ends_one_response(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token whose text cannot be read, and a step that fails: others go on, and so does the server."""
    batch = here.server.service.batches["proxy"]
    whole = post(here, {**LONG, "stream": False, "max_tokens": 60, "min_tokens": 60}).json()
    broken = threading.Event()

    def hear(response: Any, chosen: Any) -> None:
        if response.generated == 3 and not broken.is_set():
            broken.set()
            raise ValueError("no text")
        return real(response, chosen)

    kind = type(batch).__module__.replace("batch.batch", "batch.responses")
    real = sys.modules[kind].GrowingResponse.hear
    monkeypatch.setattr(f"{kind}.GrowingResponse.hear", hear)
    found = post(here, {**LONG, "stream": False, "max_tokens": 60, "min_tokens": 60})
    assert found.status_code == 500 and "cannot be read" in found.json()["error"]["message"]
    again = post(here, {**LONG, "stream": False, "max_tokens": 60, "min_tokens": 60}).json()
    assert again["choices"] == whole["choices"]
    monkeypatch.undo()

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batch._engine, "_step", fail)
    for body in (SHORT, {**SHORT, "stream": True}):
        monkeypatch.setattr(batch._engine, "_step", fail)
        failed = post(here, body)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert post(here, SHORT).status_code == 200
    here.wait_idle()


def test_keys(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(models, ServeOptions(port=0, roles="base"), key=KEY) as found:
        url, body = f"{found.url}/v1/completions", {**SHORT, "model": "demo/base"}
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            refused = httpx2.post(url, json=body, headers=header)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.post(url, json=body, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx2.get(f"{found.url}/health").status_code == 200
        assert httpx2.get(f"{found.url}/metrics").status_code == 401
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(ServeOptions(api_key_file=str(file))) == KEY
    for text in ("", "short", "two words of it"):
        monkeypatch.setenv("PROXYTUNE_API_KEY", text)
        with pytest.raises(UserError, match="PROXYTUNE_API_KEY holds no key"):
            read_key(ServeOptions())
    with pytest.raises(UserError, match="No such file"):
        read_key(ServeOptions(api_key_file=str(tmp_path / "none")))


def test_addresses_and_roles() -> None:
    with listening(ServeOptions(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            listening(ServeOptions(port=port))
    with pytest.raises(UserError, match="no such address"):
        listening(ServeOptions(host="no.such.host.invalid"))
    demo = load_system("demo")
    assert served_roles(demo, None)[0] == "proxy" and set(served_roles(demo, None)) == set(demo.roles)
    assert served_roles(demo, "base, proxy") == ("proxy", "base")
    with pytest.raises(UserError, match="Unknown role 'bass'"):
        served_roles(demo, "bass")


@pytest.mark.slow
def test_sigterm_lets_responses_finish() -> None:
    """The process: SIGTERM while one stream is short and one too long. The short one ends well, the long one
    with a reason; then the process ends, and the port is free."""
    require_demo()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "proxytune", "serve", "--port", str(port), "--roles", "proxy"]
    process = subprocess.Popen(
        [*command, "--shutdown-seconds", "4"], env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while "serving demo at" not in (line := process.stderr.readline()):
            assert line, "the server ended"
        url, lines = f"http://127.0.0.1:{port}/v1/completions", dict[str, list[str]]()

        def read(name: str, tokens: int, n: int) -> None:
            body = {**LONG, "max_tokens": tokens, "min_tokens": tokens, "n": n}
            with httpx2.stream("POST", url, json=body, timeout=60) as stream:
                lines[name] = [line for line in stream.iter_lines() if line]

        readers = [threading.Thread(target=read, args=("short", 30, 1)),
                   threading.Thread(target=read, args=("long", 1900, 40))]  # fmt: skip
        for reader in readers:
            reader.start()
        while httpx2.get(f"http://127.0.0.1:{port}/metrics").text.find('running{model="proxy"} 41') < 0:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
    assert lines["short"][-1] == "data: [DONE]" and '"length"' in lines["short"][-2]
    assert lines["long"][-1] == "data: [DONE]" and "the server shuts down" in lines["long"][-2]
    with listening(ServeOptions(port=port)):
        pass
