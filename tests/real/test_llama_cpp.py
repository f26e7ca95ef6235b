"""llama.cpp's server, which nobody here wrote, as a base behind an API: SmolLM2's 4-bit file, steered by the
same model here."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.black_box.client import ApiClient, Question
from proxytune.black_box.probing import probe
from proxytune.black_box.token_bytes import TokenBytes
from proxytune.config import ModelSpec, Sampling, System
from proxytune.models import Models
from proxytune.options import ApiOptions, DecodeOptions
from proxytune.records import Example, Prompt
from proxytune.runs.decoders import client_of, decoder_for
from tests.support import real
from tests.support.require import require_or_skip

pytestmark = [pytest.mark.real, pytest.mark.slow]

SERVER = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = 4096, 2, 1, 1
server = xllamacpp.Server(p)
time.sleep(3600)
"""
SECONDS = 120
"""That the server may take to be there."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the file that the checkpoint was made from."""
    if importlib.util.find_spec("xllamacpp") is None:
        require_or_skip("llama.cpp", "xllamacpp is not installed: it has wheels for Linux on x86-64")
    file = real.checkpoint("smollm2", "float32").parent / "smollm2.gguf"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(file), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def _wait_for(address: str) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"llama.cpp's server was not there after {SECONDS} s")


@pytest.fixture(scope="module")
def models(url: str) -> Models:
    small = ModelSpec(model=str(real.checkpoint("smollm2", "float32")), dtype="float32")
    base = ApiSpec(api=url, model="smollm2", top_logprobs=20)
    return Models(System(name="box", base=base, antiexpert=small, expert=small))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path))


def test_what_it_can_do(models: Models) -> None:
    assert models.system.endpoint is not None
    found = {one.route: one for one in probe(ApiClient(models.system.endpoint))}
    assert found["completions"].works and found["chat"].works
    assert "20 tokens of a position with ids" in found["completions"].text


def test_its_tokens_are_the_checkpoint_s(models: Models) -> None:
    """All 49,152 of them are shown, and each is found: special ones, without a text, by their ids."""
    assert models.system.endpoint is not None
    client = ApiClient(models.system.endpoint.model_copy(update={"top_logprobs": 60000}))
    [reply] = client.ask([Question(client.item("a"), "The capital of France is")])
    tokenizer = models.tokenizer("expert")
    tokens = TokenBytes.of(tokenizer, len(tokenizer.get_vocab()))
    position = reply.positions[0]
    assert len(position.tokens) == 49152 and tokens.same_ids(position)
    assert all(tokens.find(token, same_ids=True) == [token.id] for token in position.tokens)


def test_every_way_of_decoding(models: Models) -> None:
    """Expert and antiexpert are one model, so the proxy is the base: token by token and all at once."""
    prompts = [Prompt(plain=text, user=text) for text in ("The capital of France is", "1, 2, 3,")]
    examples = [Example(str(number), prompt) for number, prompt in enumerate(prompts)]
    settings = Sampling(
        max_new_tokens=3
    )  # the fourth all but ties, and this server's rounding hangs on its cache
    client = client_of(models.system, ApiOptions(parallel=2))
    texts = []
    for role, defer in (("base", None), ("proxy", None), ("proxy", 1e-6)):
        made = decoder_for(models, role, DecodeOptions(progress=False), client=client, defer=defer)  # type: ignore[arg-type]
        texts.append({c.example_id: c.text for c in made.stream(examples, settings)})
    assert texts[0] == texts[1] == texts[2] and texts[0]["0"].startswith(" Paris")
