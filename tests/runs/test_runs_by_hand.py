"""The parts of a run that count, name and agree: sums, notes, titles, alphas and consent, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune import results
from proxytune.api_spec import ApiSpec
from proxytune.black_box import ApiClient, Forecast
from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import ApiOptions, CodeOptions, DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Completion, Cost, Example, Prompt, RoleMemory, Took, WorkerFacts
from proxytune.results import RunFolder
from proxytune.runs import alpha_sweep, evaluation, session, spending
from proxytune.runs.alpha_sweep import SweptRun, parse_alphas
from proxytune.runs.decoders import choice, client_of, consent, decoder_for
from proxytune.runs.evaluation import Evaluation, alpha_for, asked_for, is_done, plan, planned_folder
from proxytune.runs.judging import Dialogue
from proxytune.runs.session import Session, prediction, total, whole_examples
from proxytune.runs.verdicts import lacks_verdict, open_sandbox, read_finished, with_columns
from proxytune.tasks import get_task
from tests.support.made_runs import write
from tests.support.new_runs import new, spec

API = ApiSpec(api="https://far.example/v1", model="gpt")
MODEL = ModelSpec(model="m")
WHOLE = System(name="s", base=MODEL, expert=MODEL, antiexpert=MODEL, tuned=MODEL)


# What a run took


def test_what_examples_took_is_added_up_count_by_count() -> None:
    first, second = Took(*range(1, 14)), Took(*range(100, 113))
    assert astuple(total([first, second])) == tuple(range(101, 126, 2))
    assert total([]) == Took()
    tenths = total([Took(seconds=0.1, prefill_seconds=0.7)] * 10)
    assert (tenths.seconds, tenths.prefill_seconds) == (1.0, 7.0), "the same in every order"


def test_memory_is_the_most_that_any_example_saw() -> None:
    memory = RoleMemory(weights=5, kv_peak=10)
    records = [
        {"kv_peak": {"base": 11, "expert": 99}},
        {"kv_peak": {"base": 13}},
        {},
        {"kv_peak": {"base": 12}},
    ]
    assert session._at_its_fullest("base", memory, records) == RoleMemory(weights=5, kv_peak=13)
    assert session._at_its_fullest("base", memory, records[2:3]) == memory


def test_what_a_worker_did() -> None:
    facts = WorkerFacts(host="h", pid=7, device="cpu", log="l")
    records: list[dict[str, Any]] = [
        {"worker": "h:7", "generated_tokens": 3, "seconds": 0.5, "process_peak": 10},
        {"worker": "h:8", "generated_tokens": 100, "seconds": 9.0, "process_peak": 90},
        {"worker": "h:7", "generated_tokens": 4, "seconds": 0.25, "process_peak": 20},
        {"generated_tokens": 100, "seconds": 9.0},
    ]
    done = session._did(facts, records)
    assert done.model_dump() == {
        "host": "h", "pid": 7, "device": "cpu", "log": "l", "examples": 2, "generated_tokens": 7,
        "seconds": 0.75, "process_peak": 20,
    }  # fmt: skip
    assert session._did(facts, []) == facts


def part(records: dict[str, Any], before: Cost, decoder: Any = None) -> Any:
    """A session of which only the records are known."""
    run = new()
    made = Session.__new__(Session)
    made.folder = SimpleNamespace(records=records, run=run, done=set(records))  # type: ignore[assignment]
    made.before, made.decoder = before, decoder
    return made


def test_the_cost_of_what_is_stored() -> None:
    """Of all sessions, by the records; a session that was stopped took more, which nobody knows."""
    before = Cost(
        seconds=99.0, sessions=3, process_peak=50, memory={"base": RoleMemory(weights=5, kv_peak=10)},
        workers={"h:7": WorkerFacts(host="h", pid=7, device="cpu")},
    )  # fmt: skip
    records = {
        "a": {"seconds": 1.5, "prefill_seconds": 0.5, "generated_tokens": 3, "kv_peak": {"base": 12},
              "process_peak": 60, "worker": "h:7"},
        "b": {"seconds": 0.25, "generated_tokens": 4, "drafted": 2, "process_peak": 55},
    }  # fmt: skip
    cost = part(records, before)._cost()
    assert (cost.seconds, cost.prefill_seconds, cost.generated_tokens, cost.drafted) == (1.75, 0.5, 7, 2)
    assert (cost.process_peak, cost.sessions, cost.memory["base"].kv_peak) == (60, 3, 12)
    assert (cost.workers["h:7"].examples, cost.workers["h:7"].generated_tokens) == (1, 3)
    decoder = SimpleNamespace(memory={"expert": RoleMemory(weights=1, kv_peak=2)}, workers={}, remarks=["r"])
    assert set(part(records, before, decoder)._cost().memory) == {"base", "expert"}
    assert part({}, before)._cost().process_peak == 50


def test_the_notes_of_all_sessions() -> None:
    """Those of a session that was stopped, and what this one remarked, once each."""
    continued = part({}, Cost(), SimpleNamespace(remarks=["cut", "no system message", "cut"]))
    continued.folder.run = new().model_copy(update={"notes": ("no system message", "one left out")})
    assert continued._notes() == ("no system message", "one left out", "cut")
    continued.decoder = None
    assert continued._notes() == ("no system message", "one left out")


def test_what_a_cost_cannot_say() -> None:
    known: dict[str, Any]
    unknown: dict[str, Any]
    known, unknown = {"seconds": 1.0, "generated_tokens": 1}, {"generated_tokens": 1}
    once = "continued once: what a session had under way when it was stopped is in no figure"
    for sessions, records, notes in [
        (1, {"a": known}, []),
        (2, {"a": known}, [once]),
        (4, {"a": known}, [once.replace("once", "3 times")]),
        (
            1,
            {"a": known, "b": unknown, "c": unknown},
            ["what 2 of 3 examples took is not known, but for their tokens"],
        ),
    ]:
        assert list(part(records, Cost(sessions=sessions))._unknown()) == notes
    calls = {"a": {"api_calls": 1200, "api_prompt_tokens": 34_000, "api_completion_tokens": 56}}
    assert list(part(calls, Cost())._spent()) == ["the base took 1,200 calls, 34,000 + 56 tokens"]
    assert list(part({"a": known}, Cost())._spent()) == []


def test_a_run_as_it_is_called() -> None:
    for changes, title in [
        ({"role": "proxy"}, "tiny gsm proxy"),
        ({"role": "proxy", "alpha": parse_alpha(0.5)}, "tiny gsm proxy alpha 0.5"),
        ({"role": "base", "alpha": parse_alpha(0.5)}, "tiny gsm base"),
        ({"role": "base", "forced": " x"}, "tiny gsm base (opener forced)"),
    ]:
        job: Any = SimpleNamespace(spec=spec(**changes))
        assert session._title(job) == title


# Rows


def completed(text: str, sample: int = 0, **more: Any) -> Completion:
    """A completion of two tokens."""
    return Completion("0", sample, text, (1, 2), **{"finish_reason": "eos", "logprob": -1.0, **more})


def test_the_row_of_an_example() -> None:
    task = get_task("gsm")
    example = Example("7", Prompt("p", "p"), {"question": "q", "answer": "3"})
    row = prediction(task, example, [completed(" 3"), completed("4", 1)])
    assert row == {
        "id": "7",
        "question": "q",
        "answer": "3",
        "model_output": " 3",
        "prediction": "3",
        "scores": {"exact_match": 1, "exact_match_numeric": 1},
        "responses": [
            {"text": " 3", "finish_reason": "eos", "tokens": 2},
            {"text": "4", "finish_reason": "eos", "tokens": 2},
        ],
    }
    assert next(iter(row)) == "id" and list(row)[-2:] == ["scores", "responses"]
    failed = prediction(task, example, [completed("3"), completed("", 1, finish_reason="unseen")])
    assert failed["fault"] == "unseen" and failed["scores"] == {}
    nan = float("nan")
    assert session._as_numbers({"a": [1.5, nan, (float("inf"), "x")], "b": {"c": -nan}, "d": True}) == {
        "a": [1.5, None, [None, "x"]], "b": {"c": None}, "d": True,
    }  # fmt: skip


def test_examples_are_given_as_soon_as_they_are_whole() -> None:
    examples = [Example(name, Prompt("", "")) for name in "ab"]
    taken: list[str] = []

    def stream() -> Iterator[Completion]:
        for name, sample in (("b", 1), ("a", 0), ("b", 0), ("a", 2), ("a", 1)):
            taken.append(f"{name}{sample}")
            yield Completion(name, sample, "", (), "eos", 0.0)

    found = whole_examples(stream(), examples, {"a": 3, "b": 2})
    example, completions = next(found)
    assert (example.id, [one.sample for one in completions], len(taken)) == ("b", [0, 1], 3)
    assert [(one.id, [c.sample for c in cs]) for one, cs in found] == [("a", [0, 1, 2])]


def test_columns_are_added_before_scores_and_responses() -> None:
    row = {"a": 1, "scores": {}, "b": 2, "responses": []}
    made = with_columns(row, {"c": 3, "a": 4})
    assert list(made.items()) == [("a", 4), ("b", 2), ("c", 3), ("scores", {}), ("responses", [])]
    assert list(with_columns({"a": 1}, {"scores": 5})) == ["a", "scores"]


def test_which_rows_still_lack_a_verdict() -> None:
    humaneval, toxigen, gsm = get_task("humaneval"), get_task("toxigen"), get_task("gsm")
    assert lacks_verdict(humaneval, {"completions": ["x"]})
    assert not lacks_verdict(humaneval, {"completions": ["x"], "passed": [False]})
    assert lacks_verdict(toxigen, {}) and not lacks_verdict(toxigen, {"is_toxic": 0})
    assert open_sandbox(gsm, CodeOptions()) is None
    with pytest.raises(UserError, match=r"^task 'gsm' runs no code: leave --allow-code-execution out$"):
        open_sandbox(gsm, CodeOptions(allow_code_execution=True))


def test_what_is_judged_is_a_finished_run_of_that_task(tmp_path: Path) -> None:
    row = {"answer": "1", "model_output": "1"}
    folder = write(tmp_path / "a", [row, row])
    run, rows = read_finished("gsm", folder)
    assert run.n == 2 and [one["id"] for one in rows] == ["0", "1"]
    with pytest.raises(UserError, match=rf"^'{folder}' holds a run of 'gsm', not of 'toxigen'$"):
        read_finished("toxigen", folder)
    with pytest.raises(UserError, match=r"predictions\.jsonl' line 2: no field 'model_output'"):
        read_finished("gsm", write(tmp_path / "b", [row, {"answer": "1"}]))
    text = (folder / "run.json").read_text()
    for listed in (3, 1):
        (folder / "run.json").write_text(text.replace('"n":2', f'"n":{listed}', 1))
        with pytest.raises(UserError, match=rf"has 2 whole rows and run\.json lists {listed}: it is damaged"):
            read_finished("gsm", folder)
    (folder / "run.json").write_text(text.replace('"status":"done"', '"status":"running"'))
    with pytest.raises(UserError, match="is not finished: continue it first"):
        read_finished("gsm", folder)
    assert not is_done(folder) and is_done(tmp_path / "b") and not is_done(tmp_path / "c")


# What is asked


def test_the_alpha_of_a_role() -> None:
    half = WHOLE.model_copy(update={"alpha": parse_alpha(0.5)})
    assert alpha_for(half, "proxy", None, allow_negative=False) == parse_alpha(0.5)
    assert alpha_for(half, "proxy", 0, allow_negative=False) == parse_alpha(0)
    assert alpha_for(half, "proxy", "first:2", allow_negative=False) == parse_alpha("first:2")
    for role in ("base", "expert", "antiexpert", "tuned"):
        assert alpha_for(half, role, None, allow_negative=False) is None
        with pytest.raises(
            UserError, match=f"^alpha acts on the proxy only: leave it out when running as '{role}'"
        ):
            alpha_for(half, role, 0, allow_negative=False)
    with pytest.raises(UserError, match="--allow-negative-alpha"):
        alpha_for(half, "proxy", -1, allow_negative=False)
    assert alpha_for(half, "proxy", -1, allow_negative=True) == parse_alpha(-1)


def test_what_python_callers_write_in_short() -> None:
    assert asked_for(None, None, None) == (RunOptions(), JudgeOptions())
    options, judge = RunOptions(shots=2, limit=9), JudgeOptions(judge="j", yes=True)
    assert asked_for(options, None, judge) == (options, judge)
    assert asked_for(options, 0, "none") == (RunOptions(shots=2, limit=0), JudgeOptions(judge="none"))


def test_a_plan_has_the_settings_that_were_asked_for(tmp_path: Path) -> None:
    sampling = Sampling(seed=4, temperature=0.5)
    data = {"gsm": "generated"}
    system = WHOLE.model_copy(update={"data": data, "alpha": parse_alpha(0.5), "base": API})
    options = RunOptions(
        sampling=sampling, limit=2, shots=1, trace="tokens", defer=0.25, seed=3, forced=" x", alpha="first:2"
    )
    job = plan(system, "gsm", "proxy", options)
    made = job.spec
    assert (made.task, made.role, made.alpha, made.data) == (
        "gsm",
        "proxy",
        parse_alpha("first:2"),
        "generated",
    )
    assert (made.limit, made.shots, made.trace, made.mode, made.defer, made.forced) == (
        2, 1, "tokens", "generate", 0.25, " x",
    )  # fmt: skip
    assert made.sampling == sampling.model_copy(update={"seed": 3}) and made.system == system
    assert made.data_sha256 == job.data.sha256 != "" and len(job.data.examples) == 2
    usual = job.defaults
    assert (usual.limit, usual.shots, usual.trace, usual.mode, usual.defer, usual.forced) == (
        None, 0, "off", "generate", None, None,
    )  # fmt: skip
    assert (usual.alpha, usual.sampling, usual.data) == (
        parse_alpha(0.5),
        get_task("gsm").sampling,
        "generated",
    )
    assert plan(system, "gsm", "proxy", RunOptions(sampling=sampling, limit=1)).spec.sampling.seed == 4
    bare = plan(system, "gsm", "base", RunOptions(limit=1, defer=0.25))
    assert (bare.spec.defer, bare.spec.alpha, bare.spec.sampling) == (None, parse_alpha(0.5), usual.sampling)
    assert planned_folder(system, "gsm", "proxy", RunOptions(), tmp_path) == tmp_path / "s" / "gsm" / "proxy"
    example = Example("0", Prompt("p", "p"))
    assert job.responses(example) == 1 and bare.responses(example) == 1
    samples = RunOptions(sampling=Sampling(n=3), limit=1)
    assert plan(system, "gsm", "proxy", samples).responses(example) == 3


@pytest.mark.parametrize(
    ("changes", "task", "role", "options", "says"),
    [
        (
            {},
            "truthfulqa_mc",
            "base",
            {"mode": "likelihood", "trace": "tokens"},
            "a trace is of generated tokens: leave --trace out with --mode likelihood",
        ),
        (
            {},
            "gsm",
            "proxy",
            {"defer": 0.5},
            "--defer is for a base behind an API: that of system 's' is here",
        ),
        (
            {},
            "gsm",
            "expert",
            {"trace": "agreement"},
            "--trace agreement is of --as proxy or --as tuned, not of 'expert'",
        ),
        ({"data": {"gms": "hub"}}, "gsm", "base", {}, "Unknown task 'gms'. Did you mean: gsm?"),
        ({"judges": {"gms": "x"}}, "gsm", "base", {}, "Unknown task 'gms'. Did you mean: gsm?"),
        ({"expert": None}, "gsm", "proxy", {}, "system 's' cannot run as 'proxy'"),
    ],
)
def test_plans_that_cannot_be(
    changes: dict[str, Any], task: str, role: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as raised:
        plan(WHOLE.model_copy(update=changes), task, role, RunOptions(**options))
    assert str(raised.value).startswith(says)


def test_the_options_of_each_role() -> None:
    """alpha and deferral are the proxy's; of agreement the others are traced plainly."""
    options = RunOptions(alpha=0.5, defer=0.25, trace="agreement", limit=3)
    made = Evaluation(WHOLE, "gsm", options)
    assert made._options_of("proxy") == options
    plain = options.model_copy(update={"alpha": None, "defer": None})
    assert made._options_of("tuned") == plain
    for role in ("base", "expert", "antiexpert"):
        assert made._options_of(role) == plain.model_copy(update={"trace": "tokens"})
    tokens = Evaluation(WHOLE, "gsm", RunOptions(trace="tokens"))._options_of("base")
    assert tokens.trace == "tokens" and Evaluation(WHOLE, "gsm")._options_of("base").trace == "off"


# Sweeps


def test_how_many_alphas_a_sweep_may_have() -> None:
    assert alpha_sweep.MAX_ALPHAS == 100
    assert len(parse_alphas("0:9.9:0.1")) == 100
    with pytest.raises(
        UserError, match=r"^--alphas '0:10:0\.1' names 101 alphas: give 1 to 100, as 0:2:0\.2 or"
    ):
        parse_alphas("0:10:0.1")
    with pytest.raises(UserError, match=r"^--alphas '0:10\.1:0\.1' is no range: write FROM:TO:STEP"):
        parse_alphas("0:10.1:0.1")
    assert [alpha.text for alpha in parse_alphas("1:1:0.5,2:3:2")] == ["1", "2"]
    assert [alpha.text for alpha in parse_alphas("0:0.3:0.1")] == ["0", "0.1", "0.2", "0.3"]


def swept(*todo: str) -> list[SweptRun]:
    """Alphas 0, 1, ... and which examples each of them lacks; two responses for each."""
    asked: Any = SimpleNamespace(job=SimpleNamespace(responses=lambda example: 2))
    return [
        SweptRun(parse_alpha(i), asked, {name: Example(name, Prompt("", "")) for name in names})
        for i, names in enumerate(todo)
    ]


class Heard:
    """A decoder that only hears what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def sweep(self, pairs: Any, sampling: Sampling, **more: Any) -> Iterator[Any]:
        self.asked.append(
            ([(example.id, [a.text for a in alphas]) for example, alphas in pairs], sampling, more)
        )
        return iter(())

    def likelihood_sweep(self, examples: Any, texts: Any, alphas: Any) -> Iterator[Any]:
        self.asked.append(([example.id for example in examples], texts, [alpha.text for alpha in alphas]))
        return iter(())


def test_examples_that_lack_the_same_alphas_go_together() -> None:
    examples = [Example(name, Prompt("", "")) for name in "abcd"]
    heard: Any = Heard()
    parts = swept("dab", "bc", "d")
    made = spec(role="proxy", trace="tokens", forced="x", sampling=Sampling(n=2))
    job: Any = SimpleNamespace(
        spec=made, data=SimpleNamespace(examples=examples), task=SimpleNamespace(continuations=None)
    )
    assert list(alpha_sweep._stream(heard, parts, job)) == []
    assert heard.asked == [
        (
            [("a", ["0"]), ("b", ["0", "1"]), ("c", ["1"]), ("d", ["0", "2"])], Sampling(n=2),
            {"task": "gsm", "trace": "tokens", "forced": "x"},
        )
    ]  # fmt: skip
    heard.asked.clear()
    job.task.continuations = [" A"]
    assert list(alpha_sweep._stream(heard, swept("ab", "ab", ""), job)) == []
    assert heard.asked == [(["a", "b"], [" A"], ["0", "1"])]


@pytest.mark.parametrize(
    ("todo", "notes", "stored"),
    [
        (("a", "c", ""), ["continuing 'f': 7 of 9 examples of all alphas are done"], 1),
        (("abc", "abc", "abc"), [], 1),
        (("", "", ""), [], 0),
    ],
)
def test_how_far_a_sweep_was_is_told(
    todo: tuple[str, ...], notes: list[str], stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    calls: list[Any] = []
    job: Any = SimpleNamespace(data=SimpleNamespace(examples=[*"abc"]), spec=spec())
    decoder = SimpleNamespace(close=lambda: calls.append("closed"))
    how: Any = SimpleNamespace(opener=lambda asked, decode: decoder, decode=DecodeOptions())
    monkeypatch.setattr(alpha_sweep, "_store", lambda *given: calls.append(given[0]))
    progress: Any = SimpleNamespace(note=told.append)
    alpha_sweep._decode(swept(*todo), job, Path("f"), how, progress)
    assert told == notes and calls == [decoder, "closed"] * stored


def test_an_alpha_s_example_is_given_when_it_is_whole() -> None:
    parts = swept("a", "a")
    zero, one = (part.alpha for part in parts)
    stream = [
        (zero, completed("x", 1)),
        (one, completed("y", 0)),
        (zero, completed("z", 0)),
        (one, completed("w", 1)),
    ]
    renamed = [
        (alpha, Completion("a", c.sample, c.text, (), "eos", 0.0)) for alpha, c in stream
    ]  # fmt: skip
    found = [
        (part.alpha.text, example.id, [c.text for c in completions])
        for part, example, completions in alpha_sweep._finished(iter(renamed), parts)
    ]
    assert found == [("0", "a", ["z", "x"]), ("1", "a", ["y", "w"])]


def test_a_sweep_is_marked_with_the_seconds_of_its_runs(tmp_path: Path) -> None:
    for name, seconds, sessions in (("a", 1.5, 1), ("b", 2.25, 3)):
        with RunFolder.open(tmp_path / name, new()) as folder:
            folder.save(folder.run.model_copy(update={"cost": Cost(seconds=seconds, sessions=sessions)}))
    job: Any = SimpleNamespace(spec=spec())
    alpha_sweep._mark(tmp_path, job)
    assert json.loads((tmp_path / results.SWEEP).read_text()) == {
        "system": "tiny", "task": "gsm", "seconds": 3.75, "sessions": 3,
    }  # fmt: skip


# A base behind an API


def client(**options: Any) -> ApiClient:
    """What asks it, with these options."""
    return ApiClient(API, ApiOptions(**options))


FORECAST = Forecast(3, 1, (40, 5), 1.5, at_most=False)


@pytest.mark.parametrize(
    ("change", "options", "answer", "says"),
    [
        ({}, {"yes": True}, None, None),
        ({}, {}, True, None),
        ({}, {}, False, "nothing was asked"),
        ({}, {}, None, "the base (gpt at https://far.example/v1) costs money: add --yes to agree"),
        ({}, {"price": (0.0, 0.0)}, None, None),
        ({}, {"yes": True, "max_cost": 1.5}, None, None),
        ({}, {"yes": True, "max_cost": 1.4}, None, "the estimate of 1.50 USD is over --max-cost 1.4"),
        ({}, {"yes": True, "max_cost": 0}, None, "the estimate of 1.50 USD is over --max-cost 0"),
        ({"at_most": True}, {"yes": True, "max_cost": 1}, None, None),
        ({"usd": None}, {"yes": True, "max_cost": 1}, None, None),
        ({"usd": 0.5, "spent": 0.5}, {"yes": True, "max_cost": 1}, None, None),
        ({"usd": 0.5, "spent": 0.75}, {"yes": True, "max_cost": 1}, None,
         "the estimate of 0.50 USD and 0.7500 USD of earlier sessions are over --max-cost 1"),
    ],
)  # fmt: skip
def test_the_consent_to_pay_a_base(
    change: dict[str, Any], options: dict[str, Any], answer: bool | None, says: str | None
) -> None:
    notes: list[str] = []
    asks = client(**options)
    dialogue = Dialogue(note=notes.append, ask=None if answer is None else lambda: bool(answer))
    found = Forecast(**{**vars(FORECAST), **change})
    if says is None:
        spending.agree(asks, dialogue, found)
        assert asks.agreed is (answer is True)
    else:
        with pytest.raises(UserError) as raised:
            spending.agree(asks, dialogue, found)
        assert str(raised.value).startswith(says) and not asks.agreed
    assert notes == [f"base gpt at https://far.example/v1: {found}"]
    spending.agree(client(max_cost=0), Dialogue(), Forecast(**{**vars(FORECAST), "calls": 0}))


def test_who_agreed_once_is_not_asked_again() -> None:
    asks = client()
    consent(asks, lambda: True)
    consent(asks, None)
    assert asks.agreed
    unasked = client(yes=True)
    consent(unasked, lambda: pytest.fail("it was agreed to"))
    assert not unasked.agreed


@pytest.mark.parametrize(
    ("role", "texts", "expected"),
    [
        ("proxy", None, {"one_position": False, "alone": False, "responses": 15}),
        ("base", None, {"one_position": False, "alone": True, "responses": 1}),
        ("proxy", [" A"], {"one_position": True, "alone": False, "responses": 15}),
    ],
)
def test_what_is_forecast_of_a_run(
    role: str, texts: Any, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five alphas of three responses each; the base has no alpha."""
    heard: list[Any] = []

    def forecast(*given: Any, **named: Any) -> Forecast:
        heard.append((given, named))
        return FORECAST

    monkeypatch.setattr(spending, "forecast", forecast)
    sampling, asks = Sampling(n=3), client()
    job: Any = SimpleNamespace(
        spec=spec(role=role, sampling=sampling),
        data=SimpleNamespace(examples=["e"]),
        task=SimpleNamespace(continuations=texts),
    )
    assert spending.forecast_of(asks, job, 5) is FORECAST
    assert heard == [((asks, ["e"], sampling), expected)]


def test_a_decoder_here_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(choice, "decoder_for", lambda *given, **named: heard.append((given, named)))
    models: Any = object()
    how, asks = DecodeOptions(batch=3), client()
    opened = choice.decoder_here(models, asks)
    opened(spec(role="proxy", trace="agreement", defer=0.25), how)
    opened(spec(role="base", trace="tokens"), how)
    choice.decoder_here(models)(spec(role="tuned"), how)
    assert heard == [
        ((models, "proxy", how), {"client": asks, "defer": 0.25, "agreement": True}),
        ((models, "base", how), {"client": asks, "defer": None, "agreement": False}),
        ((models, "tuned", how), {"client": None, "defer": None, "agreement": False}),
    ]


def test_what_decodes_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = WHOLE.model_copy(update={"base": API})
    assert client_of(WHOLE) is None
    options = ApiOptions(parallel=3)
    made = client_of(behind, options)
    assert made is not None and made.spec == API and made.options == options
    usual = client_of(behind)
    assert usual is not None and usual.options == ApiOptions() and not usual.agreed
    with pytest.raises(UserError, match=r"^--defer is for a base behind an API: that of system 's' is here$"):
        decoder_for(Models(WHOLE), "proxy", DecodeOptions(), defer=0.5)
    with pytest.raises(UserError, match="is behind an API"):
        decoder_for(Models(behind), "base", DecodeOptions())
    made: list[Any] = []
    monkeypatch.setattr(choice, "Decoder", lambda *given, **named: made.append((given, named)))
    monkeypatch.setattr(choice, "BlackBoxDecoder", lambda *given: made.append(given))
    models, how, asks = Models(behind), DecodeOptions(), client()
    for role in ("expert", "base", "proxy"):
        decoder_for(models, role, how, client=asks, defer=0.5, agreement=True)  # type: ignore[arg-type]
    assert made == [
        ((models, "expert", how), {"agreement": True}),
        (models, "base", how, asks, None),
        (models, "proxy", how, asks, 0.5),
    ]
    assert str(evaluation.RESULTS) == "results"


# A run and all roles, without a model


class Released:
    """Models that only hear what is kept of them."""

    def __init__(self) -> None:
        self.kept: list[list[str]] = []

    def release(self, keep: list[str]) -> None:
        self.kept.append(keep)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is agreed to and what is run, in order; nothing is decoded."""
    said: list[Any] = []

    def run_job(job: Any, folder: Path, opener: Any, decode: Any, sandbox: Any) -> str:
        said.append(("run", job.spec.role, folder, opener, sandbox))
        return f"run of {job.spec.role}"

    def agree(client: Any, dialogue: Any, found: Any) -> None:
        said.append(("agree", found))

    monkeypatch.setattr(evaluation, "run_job", run_job)
    monkeypatch.setattr(evaluation, "agree", agree)
    monkeypatch.setattr(evaluation, "forecast_of", lambda client, job, responses: (job.spec.role, responses))
    return said


def evaluation_by(models: Any, system: System, task: str = "gsm", **options: Any) -> Evaluation:
    """An evaluation of two made items whose decoder is a word."""
    opener: Any = "opener"
    own = system.model_copy(update={"data": {"gsm": "generated", "truthfulqa_mc": "generated"}})
    asked = RunOptions(limit=2, **options)
    return Evaluation(own, task, asked, judge=JudgeOptions(judge="none"), loaded=models, open_decoder=opener)


def test_one_role_is_run_where_it_lives(
    heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Released()
    made = evaluation_by(models, WHOLE)
    assert made.opener == "opener" and made.models is models and made.client is None  # type: ignore[comparison-overlap]
    run, folder = made.run("expert", tmp_path / "x")
    assert (run, folder) == ("run of expert", tmp_path / "x")  # type: ignore[comparison-overlap]
    _, usual = made.run("proxy")
    assert usual.parts[:4] == ("results", "s", "gsm", "proxy") and usual.name.startswith("limit=2-")
    assert [one[:3] for one in heard] == [("run", "expert", folder), ("run", "proxy", usual)]
    assert models.kept == [], "nobody judges"
    judged: Any = lambda where: f"judged {where.name}"  # noqa: E731
    monkeypatch.setitem(made.__dict__, "judging", judged)
    assert made.run("base", tmp_path / "y") == ("judged y", tmp_path / "y")  # type: ignore[comparison-overlap]
    assert models.kept == [[]], "a judge may be a large model as well"


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, [["tuned"]]), ({"trace": "agreement"}, [["proxy", "tuned"]]), ({"trace": "tokens"}, [["tuned"]])],
)
def test_all_roles_are_run_in_order_and_tuned_alone(
    options: dict[str, Any], kept: list[list[str]], heard: list[Any], tmp_path: Path
) -> None:
    models = Released()
    runs = evaluation_by(models, WHOLE, **options).run_all(tmp_path)
    roles = ["base", "antiexpert", "expert", "proxy", "tuned"]
    assert runs == {role: f"run of {role}" for role in roles} and list(runs) == roles
    assert [one[:3] for one in heard] == [("run", role, tmp_path / role) for role in roles]
    assert models.kept == kept
    heard.clear()
    few = evaluation_by(Released(), WHOLE).run_all(tmp_path, roles=["tuned", "base"])
    assert list(few) == ["base", "tuned"]


def test_a_judge_comes_after_all_roles(
    heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Released()
    made = evaluation_by(models, WHOLE.model_copy(update={"tuned": None}))
    judged: Any = lambda where: heard.append(("judge", where.name)) or where.name  # noqa: E731
    monkeypatch.setitem(made.__dict__, "judging", judged)
    roles = ["base", "antiexpert", "expert", "proxy"]
    assert made.run_all(tmp_path) == {role: role for role in roles}
    assert [one[0] for one in heard] == ["run"] * 4 + ["judge"] * 4 and models.kept == [[]]


@pytest.mark.parametrize(
    ("task", "mode", "agreed"),
    [
        ("gsm", "generate", [("base", 1), ("proxy", 1)]),
        ("truthfulqa_mc", "choices", [("base", 1)]),
    ],
)
def test_what_a_base_behind_an_api_costs_is_agreed_to_before_anything_is_run(
    task: str, mode: str, agreed: list[Any], heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In multiple choice the base and the proxy share their calls."""
    behind = WHOLE.model_copy(update={"base": API})
    evaluation_by(Released(), behind, task, mode=mode).run_all(tmp_path)
    assert [one for one in heard if one[0] == "agree"] == [("agree", one) for one in agreed]
    assert [one[0] for one in heard] == ["agree"] * len(agreed) + ["run"] * 5
    heard.clear()
    evaluation_by(Released(), behind, task, mode=mode).run("expert", tmp_path / "x")
    evaluation_by(Released(), behind, task, mode=mode).run("proxy", tmp_path / "x")
    assert [one[0] for one in heard] == ["run", "agree", "run"]
    heard.clear()
    monkeypatch.setattr(evaluation, "is_done", lambda folder: True)
    evaluation_by(Released(), behind, task, mode=mode).run_all(tmp_path)
    evaluation_by(Released(), behind, task, mode=mode).run("proxy", tmp_path / "x")
    assert {one[0] for one in heard} == {"run"}, "what is done is paid"


def test_a_sweep_is_agreed_to_for_all_of_its_alphas(
    heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = WHOLE.model_copy(update={"base": API})
    alphas = parse_alphas("0,1,2")
    made: Any = dict(zip(alphas, "abc", strict=True))
    monkeypatch.setattr(alpha_sweep, "_run", lambda job, alphas, folder, how: heard.append(folder) or made)
    asked = evaluation_by(Released(), behind, alpha=0.5)
    folder, runs = alpha_sweep.sweep(asked, alphas[::-1], tmp_path / "sweep")
    assert heard == [("agree", ("proxy", 3)), tmp_path / "sweep"] and runs == [*"cba"] and folder == heard[1]  # type: ignore[comparison-overlap]
    with pytest.raises(UserError, match=r"^--defer has no alpha: leave it out of a sweep$"):
        alpha_sweep.sweep(evaluation_by(Released(), behind, defer=0.5), alphas, tmp_path)


def test_every_alpha_is_judged_or_its_code_run(
    heard: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphas, models, box = parse_alphas("1,0"), Released(), object()
    made: Any = dict.fromkeys(alphas, "run")
    monkeypatch.setattr(alpha_sweep, "_run", lambda job, alphas, folder, how: made)
    judged: Any = evaluation_by(models, WHOLE)
    judged.__dict__["judging"] = lambda folder: f"judged {folder.name}"
    assert alpha_sweep.sweep(judged, alphas, tmp_path)[1] == ["judged alpha=1", "judged alpha=0"]  # type: ignore[comparison-overlap]
    assert models.kept == [[]]
    ran: list[Any] = []

    def add(folder: Path, items: dict[str, Any], sandbox: Any) -> str:
        ran.append((folder.name, [*items], sandbox))
        return f"ran {folder.name}"

    monkeypatch.setattr(alpha_sweep, "add_verdicts", add)
    own = WHOLE.model_copy(update={"data": {"humaneval": "generated"}})
    code: Any = Evaluation(own, "humaneval", RunOptions(limit=1), loaded=Released(), open_decoder="o")  # type: ignore[arg-type]
    code.__dict__.update(judging=None, sandbox=box)
    assert alpha_sweep.sweep(code, alphas, tmp_path)[1] == ["ran alpha=1", "ran alpha=0"]  # type: ignore[comparison-overlap]
    [name] = ran[0][1]
    assert ran == [(f"alpha={alpha}", [name], box) for alpha in (1, 0)]
    code.__dict__["sandbox"] = None
    assert alpha_sweep.sweep(code, alphas, tmp_path)[1] == ["run", "run"] and len(ran) == 2  # type: ignore[comparison-overlap]
    plain: Any = evaluation_by(Released(), WHOLE)
    plain.__dict__["sandbox"] = box
    assert alpha_sweep.sweep(plain, alphas, tmp_path)[1] == ["run", "run"], "it has no code"  # type: ignore[comparison-overlap]


def test_code_that_was_stored_without_a_verdict_is_run_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    box: Any = object()
    verdicts: list[Any] = []
    example = Example("7", Prompt("p", "p"), {"a": 1})
    monkeypatch.setattr(session, "_decode_job", lambda job, path, opener, decode, sandbox: ("run", sandbox))
    monkeypatch.setattr(session, "add_verdicts", lambda *given: verdicts.append(given) or "with verdicts")
    for name, sandbox, found in [
        ("humaneval", box, "with verdicts"), ("humaneval", None, ("run", None)), ("gsm", box, ("run", box)),
    ]:  # fmt: skip
        job: Any = SimpleNamespace(task=get_task(name), data=SimpleNamespace(examples=[example]))
        opener: Any = None
        assert session.run_job(job, Path("f"), opener, DecodeOptions(), sandbox) == found  # type: ignore[comparison-overlap]
    assert verdicts == [(Path("f"), {"7": {"a": 1}}, box)]
