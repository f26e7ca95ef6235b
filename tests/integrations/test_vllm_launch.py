"""What is decided before vLLM starts: what cannot run, the alpha of every token, what the server lets in. All
of it without vLLM."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.config import System, parse_alpha
from proxytune.errors import UserError
from proxytune.integrations.vllm_plugin import launch, server
from proxytune.integrations.vllm_plugin.alpha import alphas_of, asked_of, columns, packed, row_of, unpacked
from proxytune.integrations.vllm_plugin.launch import VllmLaunch, require_vllm
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, ServeOptions
from tests.support import tiny
from tests.support.command_line import proxytune, refused


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Three tiny models in float32."""
    made = tiny.save_trio(tmp_path_factory.mktemp("trio"))
    roles = ("base", "expert", "antiexpert")
    return changed(made, **{role: {"dtype": "float32"} for role in roles})


def changed(system: System, **roles: dict[str, Any]) -> System:
    """The system with other settings of some of its models."""
    specs = {name: getattr(system, name).model_copy(update=given) for name, given in roles.items()}
    return system.model_copy(update=specs)


def asked(system: System, decode: DecodeOptions | None = None, alpha: str = "1") -> VllmLaunch:
    return VllmLaunch(Models(system), "proxy", parse_alpha(alpha), decode or DecodeOptions())


def test_a_system_that_fits(trio: System) -> None:
    made = asked(trio)
    made.check()
    told = made.overrides()["proxytune"]
    assert list(told["models"]) == ["base", "expert", "antiexpert"]
    assert told["terms"] == [["expert", "antiexpert", 1.0]] and told["size"] == tiny.VOCABULARY
    assert made.texts.window == (256, "base") and made.texts.eos == {2}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"expert": {"chat": "llama2"}}, "all models the same tokens, .* expert: chat llama2"),
        ({"base": {"dtype": "float64"}}, "`dtype: float64`; vLLM has float32 at most"),
        ({"expert": {"dtype": "bfloat16"}}, "one dtype for all models, .*expert bfloat16"),
        ({"base": {"quantization": "int8"}}, "`quantization: int8`.* stored quantised"),
        ({"base": {"device_map": "cuda:1"}}, "--tensor-parallel N"),
        ({"expert": {"model": "/x/some.gguf"}}, "is a GGUF file"),
        ({"expert": {"adapter": "/x/lora"}}, "merge it first .proxytune tune merge /x/lora"),
    ],
)
def test_one_line_for_what_vllm_cannot_take(change: dict[str, Any], reason: str, trio: System) -> None:
    with pytest.raises(UserError, match=reason):
        asked(changed(trio, **change)).check()


def test_a_soft_prompt_cannot_be_merged(trio: System, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(UserError, match="a soft prompt cannot be merged"):
        asked(changed(trio, expert={"adapter": str(tmp_path)})).check()


def test_other_vocabularies(tmp_path: Path) -> None:
    system = tiny.trio_of(tmp_path, expert=tiny.tokenizer(swapped=("a", "b")))
    system = changed(system, **{role: {"dtype": "float32"} for role in ("base", "expert", "antiexpert")})
    with pytest.raises(UserError, match="the vocabularies of the base and the expert differ at 2 of"):
        asked(system).check()
    with pytest.raises(UserError, match="`vocab: intersect`"):
        asked(system.model_copy(update={"vocab": "intersect"})).check()


def test_a_base_behind_an_api(trio: System) -> None:
    system = System.model_validate(
        {**trio.model_dump(exclude={"base"}), "base": {"api": "http://127.0.0.1:1/v1", "model": "big"}}
    )
    with pytest.raises(UserError, match=r"behind an API .* --engine vllm needs its weights"):
        asked(system).check()


def test_drafts_have_one_alpha(trio: System) -> None:
    with pytest.raises(UserError, match=r"alpha 'first:4' with --speculate 3"):
        asked(trio, DecodeOptions(speculate=3), alpha="first:4").check()
    with pytest.raises(UserError, match="what can draft for the proxy is expert, lookup"):
        asked(trio, DecodeOptions(speculate=3, drafter="expert2"))._drafting()


def test_vllm_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch, trio: System) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package 'vllm'"):
        require_vllm()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for version, reason in (("0.28.1", ">=0.32,<0.34, and this is 0.28.1"), ("0.40.0", "this is 0.40.0")):
        monkeypatch.setattr(launch, "_versions", lambda version=version: iter([version]))
        with pytest.raises(UserError, match=reason):
            require_vllm()
    monkeypatch.setattr(launch, "_versions", lambda: iter(["0.33.0"]))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    with pytest.raises(UserError, match="install proxytune into this environment again"):
        require_vllm()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("words", [["eval", "gsm"], ["serve"], ["sweep-alpha", "gsm", "--alphas", "0,1"]])
def test_the_commands_say_what_to_install(words: list[str], tmp_path: Path) -> None:
    out = [] if words[0] == "serve" else ["--out", tmp_path / "run"]
    refused(proxytune(*words, "--engine", "vllm", *out), "needs the package 'vllm'", "docs/vllm.md")


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    refused(proxytune("eval", "gsm", "--tensor-parallel", 2), "of --engine vllm")
    refused(proxytune("eval", "gsm", "--engine", "vllm", "--ray"), "proxytune's engine")
    refused(proxytune("eval", "gsm", "--engine", "vllm", "--trace"), "stores no --trace")


# Alpha


@pytest.mark.parametrize("text", ["0.7", "first:3", "warmup:4:2", "linear:0:2:5", "linear:2:0:1"])
def test_alpha_of_every_position(text: str) -> None:
    """The token at position p decides the one at p + 1; the response begins after ten tokens."""
    schedule = parse_alpha(text)
    positions = torch.arange(30)
    rows = torch.tensor([row_of(schedule, 10)]).expand(30, -1)
    expected = [schedule.at(max(0, p + 1 - 10)) for p in range(30)]
    assert alphas_of(rows, positions).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alpha_among_hidden_states_keeps_its_bits(dtype: torch.dtype) -> None:
    alphas = torch.tensor([0.0, 0.1, 1 / 3, -2.5, 10.0])
    hidden = torch.cat([torch.randn(5, 7).to(dtype), packed(alphas, dtype)], dim=-1)[[4, 0, 2, 1, 3]]
    assert torch.equal(unpacked(hidden[:, -columns(dtype) :]), alphas[[4, 0, 2, 1, 3]])


def test_what_a_request_may_ask() -> None:
    assert asked_of(None, allow_negative=False) == (None, None)
    assert asked_of({"alpha": "first:4", "alpha_from": 3}, allow_negative=False) == (
        parse_alpha("first:4"),
        3,
    )
    for bad in ({"alpha": "much"}, {"alpha": 11}, {"alpha": -1}, {"alpha_from": "x"}, {"alpha_from": -1}):
        with pytest.raises(UserError):
            asked_of(bad, allow_negative=False)
    assert asked_of({"alpha": -1}, allow_negative=True)[0] == parse_alpha(-1)


# The server


def served(body: bytes) -> tuple[int, dict[str, Any]]:
    """What comes of a request: 200 and the body that reached vLLM, or the answer of the middleware."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached = await receive()
        assert dict(scope["headers"])[b"content-length"] == str(len(reached["body"])).encode()
        sent.extend([{"status": 200}, {"body": reached["body"]}])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1")]}
    asyncio.run(server.AlphaMiddleware(app)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_alpha_goes_where_vllm_keeps_it() -> None:
    assert served(b'{"prompt": "a", "alpha": 0.5}') == (200, {"prompt": "a", "vllm_xargs": {"alpha": 0.5}})
    assert served(b'{"prompt": "a"}') == (200, {"prompt": "a"})
    for bad in ({"alpha": 11}, {"alpha": -1}, {"vllm_xargs": {"alpha": "much"}}):
        status, answer = served(json.dumps(bad).encode())
        assert status == 400 and "alpha" in answer["error"]["message"]


def test_what_vllms_server_has_no_option_for(trio: System) -> None:
    made = asked(trio)
    with pytest.raises(UserError, match="--max-waiting is of proxytune's own server"):
        server.command_of(made, ServeOptions(max_waiting=3))
    with pytest.raises(UserError, match="vLLM serves one role at a time"):
        server.command_of(made, ServeOptions(roles="base,proxy"))
