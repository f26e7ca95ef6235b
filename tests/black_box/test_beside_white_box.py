"""A base behind an API beside the same base here: with the whole vocabulary visible they are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune import comparison, results
from proxytune.api_spec import ApiSpec
from proxytune.black_box.token_bytes import TokenBytes
from proxytune.config import Sampling, load_system
from proxytune.decoding import Decoder
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import ApiOptions, DecodeOptions, RunOptions
from proxytune.records import Example
from proxytune.runs.alpha_sweep import parse_alphas, sweep
from proxytune.runs.decoders import AnyDecoder, client_of, decoder_for
from proxytune.runs.evaluation import Evaluation
from proxytune.tasks import get_task, read_source
from tests.support.command_line import proxytune
from tests.support.logprob_endpoint import LogprobEndpoint, serving_logprobs

WHOLE = 10**6
GREEDY = Sampling(max_new_tokens=8)
QUIET = DecodeOptions(progress=False)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(load_system("demo"))


@pytest.fixture(scope="module")
def served(models: Models) -> Iterator[LogprobEndpoint]:
    with serving_logprobs(models.get("base")) as state:
        yield state


@pytest.fixture
def server(served: LogprobEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LogprobEndpoint:
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "cache"))
    served.form, served.most = "content", WHOLE
    served.seen.clear()
    return served


@pytest.fixture(scope="module")
def questions() -> tuple[Example, ...]:
    return read_source(get_task("gsm"), "generated", 2).examples


def box(models: Models, server: LogprobEndpoint, **spec: object) -> Models:
    """The demo's system with its base behind the endpoint; the experts that are loaded serve on."""
    base = ApiSpec.model_validate({"api": server.url, "model": "m", "top_logprobs": WHOLE, **spec})
    made = Models(models.system.model_copy(update={"base": base, "name": "box"}))
    for name in ("antiexpert", "expert"):
        made._loaded[name] = models.get(name)
    return made


def decoder(made: Models, role: str = "proxy", defer: float | None = None) -> AnyDecoder:
    return decoder_for(made, role, QUIET, client=client_of(made.system, ApiOptions()), defer=defer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "prompt_as"), [("content", "text"), ("names", "text"), ("llama.cpp", "ids")]
)
@pytest.mark.every(3)
def test_free_generation_is_the_same(
    form: str, prompt_as: str, models: Models, server: LogprobEndpoint, questions: tuple[Example, ...]
) -> None:
    server.form = form  # type: ignore[assignment]
    white = {c.example_id: c for c in Decoder(models, "proxy").stream(questions, GREEDY, task="gsm")}
    made = decoder(box(models, server, prompt_as=prompt_as))
    found = {c.example_id: c for c in made.stream(questions, GREEDY, task="gsm")}
    for name, expected in white.items():
        assert found[name].token_ids == expected.token_ids and found[name].text == expected.text
        assert found[name].logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert found[name].took.api_calls == len(expected.token_ids)
    drawn = Sampling(max_new_tokens=4, temperature=1.0, seed=3)
    [mine], [other] = (
        list(d.stream(questions[:1], drawn, task="gsm")) for d in (made, Decoder(models, "proxy"))
    )
    assert mine.token_ids == other.token_ids, "the noise is ours"


def test_the_base_alone_is_the_same(
    models: Models, server: LogprobEndpoint, questions: tuple[Example, ...]
) -> None:
    stopped = GREEDY.model_copy(update={"stop": ("+",)})
    for sampling in (GREEDY, stopped):
        white = {c.example_id: c.text for c in Decoder(models, "base").stream(questions, sampling)}
        found = {
            c.example_id: c.text for c in decoder(box(models, server), "base").stream(questions, sampling)
        }
        assert found == white
    assert len(server.seen) == 4, "a request for each response"


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_multiple_choice_is_the_same(
    route: str, models: Models, server: LogprobEndpoint, tmp_path: Path
) -> None:
    options = RunOptions(mode="choices", limit=6)
    [white, seen] = [
        Evaluation(made.system, "truthfulqa_mc", options, QUIET, loaded=made).run("proxy", tmp_path / name)[0]
        for made, name in ((models, "white"), (box(models, server, route=route), "box"))
    ]
    a, b = (results.read_rows(tmp_path / name) for name in ("white", "box"))
    for mine, other in zip(a, b, strict=True):
        assert mine["parsed_output"] == other["parsed_output"] == other["visible_output"]
        if route == "completions":  # a chat endpoint adds the letters without a space
            gaps = [x - y for x, y in zip(mine["logprobs"], other["logprobs"], strict=True)]
            assert max(gaps) - min(gaps) < 1e-3, "the same but for a constant"
    assert len(server.seen) == 6 and seen.cost.api_calls == 6
    assert seen.score == white.score and not comparison.comparable([white, seen])
    assert "temperature" in server.seen[0] and ("messages" in server.seen[0]) == (route == "chat")


def test_a_sweep_does_not_ask_again(models: Models, server: LogprobEndpoint, tmp_path: Path) -> None:
    """One request per item, whatever the alphas; another sweep asks nothing."""
    made = box(models, server)
    asked = Evaluation(made.system, "truthfulqa_mc", RunOptions(mode="choices", limit=4), QUIET, loaded=made)
    _, runs = sweep(asked, parse_alphas("0,0.5,1"), tmp_path / "sweep")
    assert len(server.seen) == 4 and sum(run.cost.api_calls for run in runs) == 4
    again = Evaluation(made.system, "truthfulqa_mc", RunOptions(mode="choices", limit=4), QUIET, loaded=made)
    sweep(again, parse_alphas("0.2,2"), tmp_path / "again")
    assert len(server.seen) == 4


def test_few_visible_tokens(models: Models, server: LogprobEndpoint, questions: tuple[Example, ...]) -> None:
    """Only visible tokens are chosen; alpha 0 is the base."""
    made = decoder(box(models, server, top_logprobs=3))
    zero = {c.example_id: c.text for c in made.stream(questions, GREEDY, alpha=parse_alphas("0")[0])}
    assert zero == {c.example_id: c.text for c in Decoder(models, "base").stream(questions, GREEDY)}
    one = decoder(box(models, server, top_logprobs=1))
    for completion in one.stream(questions[:1], GREEDY):
        assert completion.text == zero[completion.example_id], "nothing else can be chosen"


@pytest.mark.parametrize("gamma", [0.5, 0.999])
def test_deferral_is_its_definition(
    gamma: float, models: Models, server: LogprobEndpoint, questions: tuple[Example, ...]
) -> None:
    """The base's first choice where it has gamma, the expert's elsewhere, position by position."""
    example = questions[0]
    made = decoder(box(models, server), defer=gamma)
    [found] = made.stream([example], GREEDY)
    context = Decoder(models, "proxy").contexts(example.prompt)
    base, expert = models.get("base"), models.get("expert")
    tokens: list[int] = []
    by_expert = 0
    for _ in range(GREEDY.max_new_tokens):
        seen = base.logits([*context["base"], *tokens])[: base.size].softmax(-1)
        unsure = float(seen.max()) < gamma
        view = expert.logits([*context["expert"], *tokens])[: base.size] if unsure else seen
        by_expert += unsure
        tokens.append(int(view.argmax()))
        if tokens[-1] == base.tokenizer.eos_token_id:
            break
    ended = found.finish_reason == "eos"
    assert found.token_ids == tuple(tokens[:-1] if ended else tokens)
    assert found.took.deferred == by_expert and found.took.api_calls == len(server.seen)
    assert gamma == 0.5 or by_expert > 0
    assert any("another distribution" in remark for remark in made.remarks)


def test_on_the_command_line(server: LogprobEndpoint, tmp_path: Path) -> None:
    """`generate` says what it spent, `check` what the endpoint can do."""
    yaml = tmp_path / "box.yaml"
    yaml.write_text(
        f"base: {{api: {server.url}, model: m, top_logprobs: 5}}\n"
        "antiexpert: {model: 'demo://antiexpert', dtype: float32}\n"
        "expert: {model: 'demo://expert', dtype: float32, chat: llama2}\n"
    )
    said = proxytune("generate", "Question: 2+3?", "-s", yaml, "--max-new-tokens", 3)
    assert said.exit_code == 0 and said.stdout.strip() and "spent: 3 calls" in said.stderr
    deferred = proxytune("generate", "Question: 2+3?", "-s", yaml, "--max-new-tokens", 3, "--defer", 0.3)
    assert deferred.exit_code == 0 and "another distribution" in deferred.stderr
    checked = proxytune("check", yaml, "--json")
    found = json.loads(checked.stdout)
    assert checked.exit_code == 0 and found["ok"] and found["speculation"] == "no: the base is behind an API"
    texts = [one["text"] for one in found["findings"] if one["about"] == "base"]
    assert [text.partition(":")[0] for text in texts[1:]] == ["/completions", "/chat/completions"]
    assert "multiple choice, generate and deferral" in texts[0]
    server.form = "none"
    blind = proxytune("check", yaml)
    assert blind.exit_code == 2 and "shows no log-probabilities" in blind.stderr.splitlines()[-1]


def test_the_bytes_of_tokens(models: Models) -> None:
    tokenizer = models.tokenizer("base")
    tokens = TokenBytes.of(tokenizer, len(tokenizer.get_vocab()))
    for text in ("Question: how many?\n\nAnswer: 3+4=7", " \u00e9t\u00e9 \u20ac \U0001f60a"):
        assert tokens.text(tokenizer.encode(text, add_special_tokens=False)) == text.encode()
    assert tokens.eos is not None and tokens.ids[b"</s>"] == [tokens.eos]


def test_a_token_that_the_experts_lack(
    models: Models, server: LogprobEndpoint, questions: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """strict: an error that names it; intersect: it is left out, with a remark."""
    monkeypatch.setattr(
        server, "_name", lambda token: f"never{token}" if token % 2 else server_name(server, token)
    )
    server.form = "names"
    with pytest.raises(UserError, match="is no token of the expert"):
        list(decoder(box(models, server)).stream(questions[:1], GREEDY))
    lenient = box(models, server)
    lenient.system = lenient.system.model_copy(update={"vocab": "intersect"})
    made = decoder(lenient)
    [found] = made.stream(questions[:1], GREEDY)
    assert any("were left out" in remark for remark in made.remarks) and math.isfinite(found.logprob)


def server_name(server: LogprobEndpoint, token: int) -> str:
    return server.tokens.data[token].decode("utf-8", "replace")
