"""Requests that cannot be answered, and clients that do not listen: one status each, and others go on."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator

import pytest
import torch

from proxytune.config import System
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, ServeOptions
from tests.support import tiny
from tests.support.chat_templates import CHOOSY, TURNS
from tests.support.require import require_or_skip

try:
    import httpx2

    from tests.support.servers import Served, served
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")

BROKEN = "~"
"""Its embedding holds no numbers."""
STALLED = 1.0


@pytest.fixture(scope="module")
def here(trio: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A proxy whose expert has a template that refuses animals, and whose base cannot read a letter."""
    folder = tmp_path_factory.mktemp("faulty")
    base = tiny.build("llama", 1, max_position_embeddings=8192)
    talking = tiny.save(folder / "expert", tiny.build("llama", 2, max_position_embeddings=8192),
                        tiny.tokenizer(CHOOSY + TURNS))  # fmt: skip
    small = tiny.spec(tiny.save(folder / "antiexpert", tiny.build("llama", 3, max_position_embeddings=8192)))
    system = System(
        name="faulty",
        base=tiny.spec(tiny.save(folder / "base", base)),
        expert=tiny.spec(talking, "tokenizer"),
        antiexpert=small,
    )
    models, options = Models(system), ServeOptions(port=0, stalled_seconds=STALLED, roles="proxy")
    [broken] = tiny.tokenizer().encode(BROKEN, add_special_tokens=False)
    with torch.no_grad():  # once it is loaded: a checkpoint with such weights is refused
        models.get("base").module.get_input_embeddings().weight[broken] = math.nan
    with served(models, options, decode=DecodeOptions(batch=64)) as found:
        yield found


def post(here: Served, path: str = "completions", **body: object) -> httpx2.Response:
    usual = {"model": "faulty", "max_tokens": 4, "min_tokens": 4, "temperature": 0}
    return httpx2.post(f"{here.url}/v1/{path}", json=usual | body, timeout=60)


def test_logits_that_are_no_numbers(here: Served) -> None:
    """Whole, streamed, and scored: 500 with the reason. A response beside it in the same request ends with
    it, one of another request does not, and the next is answered as ever."""
    well = post(here, prompt="abc").json()
    for body in ({}, {"stream": True}, {"echo": True, "logprobs": 1}, {"n": 2, "temperature": 1, "seed": 1}):
        failed = post(here, prompt=f"a{BROKEN}c", **body)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "NaN or infinite" in failed.json()["error"]["message"]
    assert post(here, prompt=["abc", f"a{BROKEN}c"]).status_code == 500
    assert post(here, prompt="abc").json()["choices"] == well["choices"]
    here.wait_idle()


def test_a_template_that_raises(here: Served) -> None:
    """400 with the words of the template, before anything is decoded, and a stream is not begun."""
    for body in ({}, {"stream": True}):
        said = [{"role": "user", "content": "a zebra?"}]
        refused = post(here, "chat/completions", messages=said, **body)
        assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"
        assert "chat template of the expert fails: no animals" in refused.json()["error"]["message"]
    kind = [{"role": "user", "content": "why?"}]
    assert post(here, "chat/completions", messages=kind).status_code == 200
    here.wait_idle()


@pytest.mark.slow
def test_a_client_that_never_reads(here: Served) -> None:
    """Its answer is more than the buffers on its way hold. It is cut off, its sequences end, and others are
    answered meanwhile and after."""
    asked = {"model": "faulty", "prompt": "abc", "max_tokens": 6000, "min_tokens": 6000, "n": 40,
             "stream": True, "proxytune_trace": True}  # fmt: skip
    content = json.dumps(asked).encode()
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", int(here.url.rsplit(":", 1)[1])))
        head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        stuck.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
        batch = here.server.service.batches["proxy"]
        until, running = time.monotonic() + 60, 0
        while running < 40 and time.monotonic() < until:  # on a slow machine it may be cut off soon after
            time.sleep(0.01)
            running = max(running, batch.running)
        assert running == 40 and post(here, prompt="abc").status_code == 200
        here.wait_idle(60)
        assert batch.counts()["generated_tokens"] < 40 * 6000
    assert post(here, prompt="abc").status_code == 200
