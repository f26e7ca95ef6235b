"""Our own server as the base of a system: the proxy's tokens are those of the models side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.config import Sampling, load_system
from proxytune.decoding import Decoder
from proxytune.models import Models
from proxytune.options import ApiOptions, DecodeOptions, ServeOptions
from proxytune.runs.decoders import client_of, decoder_for
from proxytune.tasks import get_task, read_source
from tests.support.servers import served


@pytest.mark.slow
def test_the_demo_is_steered_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path))
    models = Models(load_system("demo"))
    questions = read_source(get_task("gsm"), "generated", 2).examples
    greedy = Sampling(max_new_tokens=8)
    expected = {c.example_id: c.token_ids for c in Decoder(models, "proxy").stream(questions, greedy)}
    with served(models, ServeOptions(port=0)) as found:
        base = ApiSpec(api=f"{found.url}/v1", model="demo/base", top_logprobs=20)
        system = models.system.model_copy(update={"base": base, "name": "box"})
        client = client_of(system, ApiOptions())
        decoder = decoder_for(Models(system), "proxy", DecodeOptions(progress=False), client=client)
        answers = {c.example_id: c.token_ids for c in decoder.stream(questions, greedy)}
        found.wait_idle()
    assert answers == expected
