"""What judges ask, count and estimate, and who is asked at all, worked out by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune import hub, results
from proxytune.config import ModelSpec, System
from proxytune.endpoints import CallFailed, CallLimits, ReplyStore, prices
from proxytune.endpoints.endpoint import Endpoint as Client
from proxytune.endpoints.endpoint import Reply
from proxytune.endpoints.prices import Price
from proxytune.errors import UserError
from proxytune.judges import JUDGES, Estimate
from proxytune.judges.judge import of_a_judge
from proxytune.judges.kinds import JudgeKind
from proxytune.judges.pairwise import SYSTEM, Pair, PairwiseJudge, _Session, pairwise_judge
from proxytune.judges.toxicity import ToxicityClassifier, _limit, toxicity_judge
from proxytune.judges.truth import TruthJudges, judge_prompt, truth_judges
from proxytune.options import JudgeOptions
from proxytune.runs.judging import Dialogue, Judging, judged_task, judging_of, make_judge
from proxytune.tasks import get_task
from tests.support.endpoint import Endpoint
from tests.support.made_runs import write

ROWS = [{"instruction": f"Do {i}.", "output_1": f"plain {i}", "output_2": f"GOOD {i}"} for i in range(4)]
ESTIMATE = Estimate(3, cached=2, prompt_tokens=38, completion_tokens=5, usd=1.5, seconds=900)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for judgements, and an endpoint that nobody asks."""
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    return tmp_path


# What is asked


@pytest.mark.parametrize("swapped", [False, True])
def test_what_a_pairwise_judge_reads(swapped: bool) -> None:
    pair = Pair("Do {a} and {b}.", "{b} baseline", "{instruction} model's", swapped)
    system, user = pair.messages
    assert system == {"role": "system", "content": SYSTEM} and user["role"] == "user"
    first, second = ("{instruction} model's", "{b} baseline")[:: 1 if swapped else -1]
    assert user["content"].startswith(
        "Instruction:\n<instruction>\nDo {a} and {b}.\n</instruction>\n\n"
        f"Output A:\n<output_a>\n{first}\n</output_a>\n\n"
        f"Output B:\n<output_b>\n{second}\n</output_b>\n\nWhich"
    )
    assert user["content"].endswith("Reply with one word only: A, B or tie.")
    assert pair.letters == len(SYSTEM) + len(user["content"])


def test_the_order_is_drawn_from_seed_and_instruction() -> None:
    """The first draw of a generator seeded with both."""
    judge = PairwiseJudge("m", seed=7)
    rows = [{**ROWS[0], "instruction": f"Do {i}."} for i in range(40)]
    drawn = [random.Random(f"7\x1fDo {i}.").random() for i in range(40)]
    assert [pair.swapped for pair in judge.pairs(rows)] == [value < 0.5 for value in drawn]
    pair = judge.pairs(ROWS[:1])[0]
    assert (pair.instruction, pair.baseline, pair.output) == ("Do 0.", "plain 0", "GOOD 0")


def test_a_judgement_is_known_by_endpoint_model_and_messages(own_cache: Path) -> None:
    pair = Pair("é", "x", "y", swapped=False)
    content = json.dumps(["http://127.0.0.1:9/v1", "m", pair.messages])
    assert PairwiseJudge("m", seed=3).key(pair) == hashlib.sha256(content.encode()).hexdigest()
    assert PairwiseJudge("m").cache_path == own_cache / "judgements.sqlite"
    assert PairwiseJudge("m", cache=Path("x")).cache_path == Path("x")


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        ("A", "a"), ("b", "b"), ("TIE", "tie"), ("tie.", "tie"), (" **Output  B** is", "b"), ("(A)", "a"),
        ("Answer", None), ("Bob", None), ("tied", None), ("C", None), ("the A", None), ("", None),
    ],
)  # fmt: skip
def test_the_word_of_a_reply(reply: str, word: str | None) -> None:
    assert Pair("i", "x", "y", swapped=False).verdict(reply) == word


def test_what_truth_judges_read() -> None:
    row = {"Question": "Where?", "output": "In Rome."}
    assert judge_prompt(row, "True") == "Q: Where?\nA: In Rome.\nTrue:"
    assert judge_prompt(row, "Helpful") == "Q: Where?\nA: In Rome.\nHelpful:"


def test_truth_comes_first_and_both_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def probabilities(self: TruthJudges, model: str, prompts: list[str], report: Any) -> list[float]:
        asked.append((model, list(prompts)))
        for done in (1, 2):
            report(done)
        return [0.75, 0.25] if model == "t" else [0.5, 1.0]

    monkeypatch.setattr(TruthJudges, "_probabilities", probabilities)
    rows = [{"Question": "q", "output": "x"}, {"Question": "r", "output": "y"}]
    seen: list[tuple[int, int]] = []
    found = TruthJudges("t", "i").judge(rows, lambda *at: seen.append(at))
    assert found == [
        {"truth": 0.75, "truth acc": 1, "info": 0.5, "info acc": 1, "truth-info acc": 1},
        {"truth": 0.25, "truth acc": 0, "info": 1.0, "info acc": 1, "truth-info acc": 0},
    ]
    assert asked == [
        ("t", ["Q: q\nA: x\nTrue:", "Q: r\nA: y\nTrue:"]),
        ("i", ["Q: q\nA: x\nHelpful:", "Q: r\nA: y\nHelpful:"]),
    ]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


# Who judges, by what was named


def test_judges_as_they_are_named() -> None:
    options = JudgeOptions(seed=5, price=(2.0, 8.0), max_cost=0.5, batch=4)
    assert pairwise_judge("m", options) == PairwiseJudge("m", seed=5, price=(2.0, 8.0), max_cost=0.5)
    assert PairwiseJudge("m").name == "m" and (PairwiseJudge("m").workers, PairwiseJudge("m").seed) == (8, 0)
    plain = JudgeOptions()
    assert toxicity_judge("m#BAD", options) == ToxicityClassifier("m", "BAD", batch=4)
    for text in ("m", "m#"):
        assert toxicity_judge(text, plain) == ToxicityClassifier("m", None, batch=32)
    assert (ToxicityClassifier("m").name, ToxicityClassifier("m", "BAD").name) == ("m", "m#BAD")
    assert truth_judges("t,i", options) == TruthJudges("t", "i", batch=4)
    assert truth_judges("t,i", plain).batch is None and truth_judges("t,i", plain).name == "t,i"
    for text in ("t", "t,", ",i", ""):
        with pytest.raises(UserError, match=f"^--judge '{text}': give two models, TRUTH,INFO"):
            truth_judges(text, plain)
    assert TruthJudges().name == get_task("truthfulqa").judge


def test_the_class_that_is_toxic() -> None:
    def config(*names: str) -> Any:
        return SimpleNamespace(id2label=dict(enumerate(names)))

    assert ToxicityClassifier("m")._toxic_class(config("A", "B", "C")) == 1
    for number, label in enumerate("ABC"):
        assert ToxicityClassifier("m", label)._toxic_class(config("A", "B", "C")) == number
    with pytest.raises(UserError, match=r"^classifier 'm' has no label 'D': it has A, B$"):
        ToxicityClassifier("m", "D")._toxic_class(config("A", "B"))
    with pytest.raises(UserError, match=r"^classifier 'm' has 1 class: at least two are needed$"):
        ToxicityClassifier("m")._toxic_class(config("A"))


@pytest.mark.parametrize(
    ("stated", "positions", "limit"),
    [(512, 514, 512), (10**6 - 1, 514, 10**6 - 1), (10**6, 66, 64), (10**30, None, 512), (10**30, 2, 1)],
)
def test_how_many_tokens_a_classifier_takes(stated: int, positions: int | None, limit: int) -> None:
    config = SimpleNamespace(**({} if positions is None else {"max_position_embeddings": positions}))
    assert _limit(SimpleNamespace(model_max_length=stated), config) == limit


def test_what_a_judge_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    packages = {"httpx2": object()}
    monkeypatch.setattr(importlib.util, "find_spec", packages.get)
    paid = JUDGES["pairwise"]
    assert paid.paid and paid.models("gpt") == () and paid.missing("m") == "the judge needs OPENAI_API_KEY"
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "x")
        assert paid.missing("m") is None
        monkeypatch.delenv(name)
    packages.clear()
    assert paid.missing("m") == "the judge needs: pip install 'proxytune[judges]'"
    here, reached = {"a"}, [False]
    monkeypatch.setattr(hub, "stored", lambda name: name in here)
    monkeypatch.setattr(hub, "reachable", lambda: reached[0])
    toxicity, truth = JUDGES["toxicity"], JUDGES["truth"]
    assert not toxicity.paid and not truth.paid
    assert toxicity.models("a#b") == ("a",) and truth.models("a,b") == ("a", "b")
    lacks = "the judge is not on disk and the hub does not answer"
    assert toxicity.missing("a#b") is None and toxicity.missing("b#a") == lacks
    assert truth.missing("a,a") is None and truth.missing("a,b") == lacks == truth.missing("b,a")
    reached[0] = True
    assert truth.missing("a,b") is None


def test_errors_about_a_model_become_those_about_a_judge() -> None:
    with pytest.raises(UserError) as raised, of_a_judge():
        raise UserError("no folder 'x'.")
    assert str(raised.value) == (
        "the judge cannot be used: no folder 'x'. Name one with --judge (folder or hub id), or keep the "
        "generations for later with --judge none"
    )


# What it costs


def test_prices_are_per_million_tokens() -> None:
    assert prices.usd((3, 5), (2.0, 8.0)) == 46e-6 and prices.usd((3, 5), None) is None
    assert prices.CHARACTERS_PER_TOKEN == 4 and prices.PRICES == {
        "gpt-4.1": (2.0, 8.0), "gpt-4.1-mini": (0.4, 1.6), "gpt-4o": (2.5, 10.0),
        "gpt-4o-mini": (0.15, 0.6), "gpt-4-turbo": (10.0, 30.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "given", "known"),
    [
        ("gpt-4.1", None, (2.0, 8.0)),
        ("gpt-4.1", (1.0, 3.0), (1.0, 3.0)),
        ("m", None, None),
        ("m", (1, 3), (1, 3)),
    ],
)
def test_the_price_given_goes_before_the_listed_one(
    model: str, given: Price | None, known: Price | None
) -> None:
    judge = PairwiseJudge(model, price=given)
    assert judge.known_price == known
    assert judge.usd((10**6, 2 * 10**6)) == (None if known is None else known[0] + 2 * known[1])


def test_a_limit_needs_a_price_even_if_it_is_nothing(own_cache: Path) -> None:
    PairwiseJudge("m").check()
    PairwiseJudge("m", max_cost=0, price=(1, 1)).check()
    with pytest.raises(
        UserError, match=r"^--max-cost needs the price of 'm': add --price IN,OUT \(USD per 1e6\)$"
    ):
        PairwiseJudge("m", max_cost=0).check()


def test_a_judge_is_checked_before_it_is_asked(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "nowhere")
    for ask in (PairwiseJudge("m").check, lambda: PairwiseJudge("m").judge([])):
        with pytest.raises(UserError, match=r"^OPENAI_BASE_URL='nowhere': give http"):
            ask()
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"^the pairwise judge needs OPENAI_API_KEY in the environment"):
        PairwiseJudge("m").judge([])
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert PairwiseJudge("m").judge([]) == []


@pytest.mark.parametrize(
    ("status", "reason", "paid", "form"),
    [
        (400, "no max_tokens here", False, 1),
        (400, "use max_completion_tokens", True, 1),
        (400, "temperature must be 1", False, 1),
        (422, "no max_tokens here", False, 0),
        (400, "no such model", True, 0),
    ],
)
def test_a_model_that_reasons_is_known_by_its_refusal(
    status: int, reason: str, paid: bool, form: int, tmp_path: Path
) -> None:
    """Then the same is asked at once in the other form; what may cost something counts as the most."""
    seen: list[dict[str, Any]] = []

    def refuse(body: dict[str, Any]) -> Any:
        seen.append(body)
        raise CallFailed(reason, again=False, paid=paid, status=status)

    def answer(body: dict[str, Any]) -> Any:
        seen.append(body)
        return Reply("tie!", 7, 2)

    client: Any = SimpleNamespace(ask=refuse)
    pair, store = Pair("i", "x", "y", swapped=False), ReplyStore(tmp_path / "s")
    judge = PairwiseJudge("m", price=(1e6, 1e6))
    session = _Session(judge, client, store, [pair])
    failed = session.send(0)
    assert isinstance(failed.result, CallFailed) and session.form == form
    assert (failed.result.again, failed.result.after) == (form == 1, 0.0 if form else None)
    most = pair.letters + 32 + 16
    assert failed.usd == (most if paid else 0.0) == sum(store.spent([judge.key(pair)]))
    client.ask = answer
    brought = session.send(0)
    assert brought.result == Reply("tie!", 7, 2) and brought.usd == 9.0
    assert store.get(judge.key(pair)) == "tie" and sum(store.spent([judge.key(pair)])) == failed.usd + 9
    usual = {"model": "m", "messages": pair.messages}
    limited = {"max_completion_tokens": 4096} if form else {"max_tokens": 16, "temperature": 0}
    assert seen == [{**usual, "max_tokens": 16, "temperature": 0}, {**usual, **limited}]


def test_what_is_foreseen_before_there_are_outputs(own_cache: Path) -> None:
    """Three comparisons of 101 characters, with the template around them; 16 tokens come back."""
    around = sum(len(message["content"]) for message in Pair("", "", "", swapped=False).messages)
    found = PairwiseJudge("m", price=(2.0, 8.0)).forecast(3, 101.0)
    prompt = math.ceil(3 * (101 + around) / 4)
    assert found == Estimate(
        3, 0, prompt, 48, usd=(2 * prompt + 8 * 48) / 1e6, seconds=3 * 2.0 / 8, spent=0.0
    )
    assert PairwiseJudge("m", workers=2).forecast(3, 1.0).seconds == 3
    assert PairwiseJudge("m").forecast(3, 1.0).usd is None


def test_what_is_estimated_of_outputs(own_cache: Path) -> None:
    """Equal rows are asked once, equal outputs not at all, and what was spent on any of them counts."""
    judge = PairwiseJudge("m", price=(1e6, 1e6), workers=4)
    same = {"instruction": "Same.", "output_1": "x", "output_2": "x"}
    rows = [ROWS[0], ROWS[0], ROWS[1], ROWS[2], same]
    pairs = judge.pairs(rows)
    store = ReplyStore(judge.cache_path)
    store.ended(store.sending(judge.key(pairs[3]), (9, 9)), judge.key(pairs[3]), (5, 2), "a")
    store.sending(judge.key(pairs[0]), (3, 1))
    store.sending("another", (100, 100))
    letters = pairs[0].letters + pairs[2].letters
    found = judge.estimate(rows)
    assert (found.calls, found.cached, found.completion_tokens) == (2, 3, 32)
    assert found.prompt_tokens == math.ceil(letters / 4) and found.seconds == 2 * 2.0 / 4
    assert found.usd == found.prompt_tokens + 32 and found.spent == 5 + 2 + 3 + 1
    free = PairwiseJudge("m").estimate(rows)
    assert (free.usd, free.spent) == (None, 0.0)


def test_the_most_that_a_call_can_take(tmp_path: Path) -> None:
    """Its bytes, 16 tokens around each of two messages, and the tokens of the form of its reply."""
    pair = Pair("é", "x", "y", swapped=False)
    session = _Session(
        PairwiseJudge("m", price=(1e6, 2e6)), Client("http://h", ""), ReplyStore(tmp_path / "s"), [pair]
    )
    assert session.tokens(pair) == (pair.letters + 1 + 32, 16)
    assert session.estimate(0) == pair.letters + 33 + 2 * 16
    session.form = 1
    assert session.tokens(pair) == (pair.letters + 33, 4096)
    free = _Session(PairwiseJudge("m"), session.client, session.store, [pair])
    assert free.estimate(0) == 0.0


def test_progress_counts_every_row(endpoint: Endpoint) -> None:
    """A row that needs no call at once, and two equal ones together."""
    same = {"instruction": "Same.", "output_1": "x", "output_2": "x"}
    seen: list[tuple[int, int]] = []
    judge = PairwiseJudge("m", workers=1)
    found = judge.judge([ROWS[0], same, ROWS[0], ROWS[1]], lambda *at: seen.append(at))
    assert seen == [(3, 4), (4, 4)]
    assert found == [{"annotator": "proxytune/m", "preference": value} for value in (2, 0, 2, 2)]


def test_an_estimate_in_words() -> None:
    assert str(ESTIMATE) == (
        "3 judgements to pay for (2 are cached or need none): about 38 tokens, about 1.50 USD, 15.0 minutes"
    )
    unknown = Estimate(3, cached=2, prompt_tokens=38, completion_tokens=5, usd=None, seconds=60)
    assert str(unknown).endswith("about 38 tokens, cost unknown (give --price IN,OUT), 1.0 minutes")


@pytest.mark.parametrize(
    ("change", "options", "answer", "says"),
    [
        ({}, {"yes": True}, None, None),
        ({}, {}, True, None),
        ({}, {}, False, "not judged; the generations are kept"),
        ({}, {}, None, "judging costs money: add --yes to agree (and --max-cost USD for a limit)"),
        ({}, {"yes": True}, False, None),
        ({"calls": 0}, {}, None, None),
        ({"calls": 0}, {"max_cost": 1}, False, None),
        ({"usd": None}, {"yes": True, "max_cost": 1}, None, None),
        ({}, {"yes": True, "max_cost": 1.5}, None, None),
        ({}, {"yes": True, "max_cost": 1.4}, None, "the estimate of 1.50 USD is over --max-cost 1.4"),
        ({"usd": 0.5, "spent": 0.5}, {"yes": True, "max_cost": 1}, None, None),
        ({"usd": 0.5, "spent": 0.75}, {"yes": True, "max_cost": 1}, None,
         "the estimate of 0.50 USD and 0.7500 USD of earlier sessions are over --max-cost 1"),
        ({}, {"yes": True, "max_cost": 0}, None, "the estimate of 1.50 USD is over --max-cost 0"),
    ],
)  # fmt: skip
def test_the_consent_to_pay_a_judge(
    change: dict[str, Any], options: dict[str, Any], answer: bool | None, says: str | None
) -> None:
    notes: list[str] = []
    dialogue = Dialogue(note=notes.append, ask=None if answer is None else lambda: bool(answer))
    judging = Judging(PairwiseJudge("m"), JudgeOptions(**options), dialogue)
    estimate = replace(ESTIMATE, **change)
    if says is None:
        judging.agree(estimate)
    else:
        with pytest.raises(UserError) as raised:
            judging.agree(estimate)
        assert str(raised.value) == says
    assert notes == [f"judge m: {estimate}"]
    judging.agree(None)
    assert len(notes) == 1, "a judge that runs here costs nothing"


def test_a_run_is_judged_by_a_judge_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "run", [{"output_2": "x"}], task="alpaca_farm")
    run = results.read_run(folder).model_copy(update={"judge": "m"})
    (folder / results.RUN).write_text(run.model_dump_json())
    again: list[Path] = []

    def judged(self: Judging, where: Path) -> Any:
        again.append(where)
        return "judged"

    monkeypatch.setattr(Judging, "again", judged)
    assert Judging(PairwiseJudge("m"), JudgeOptions())(folder) == run and again == []
    found: Any = Judging(PairwiseJudge("other"), JudgeOptions())(folder)
    assert found == "judged" and again == [folder]


# Who is asked at all


class Named:
    """A judge that only has a name."""

    def __init__(self, name: str, options: JudgeOptions) -> None:
        self.name, self.options, self.checked = name, options, False

    def check(self) -> None:
        self.checked = True


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges of every kind that need nothing."""
    for kind, known in JUDGES.items():
        made: Any = Named
        monkeypatch.setitem(JUDGES, kind, JudgeKind(made, paid=known.paid, models=known.models))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("task", "own", "asked", "who"),
    [
        ("toxigen", None, None, "tomh/toxigen_roberta"),
        ("toxigen", None, "default", "tomh/toxigen_roberta"),
        ("toxigen", None, "x", "x"),
        ("toxigen", None, "none", None),
        ("toxigen", "y", None, "y"),
        ("toxigen", "y", "default", "y"),
        ("toxigen", "y", "x", "x"),
        ("toxigen", "y", "none", None),
        ("toxigen", "none", None, None),
        ("toxigen", "none", "x", "x"),
        ("truthfulqa", None, None, None),
        ("truthfulqa", "y", None, "y"),
        ("truthfulqa", None, "x", "x"),
        ("gsm", None, None, None),
        ("gsm", None, "none", None),
    ],
)
def test_who_judges(task: str, own: str | None, asked: str | None, who: str | None) -> None:
    system = System(base=ModelSpec(model="m"), judges={} if own is None else {task: own})
    options = JudgeOptions(judge=asked, seed=3)
    judging = judging_of(system, get_task(task), options, "generate")
    assert (None if judging is None else judging.judge.name) == who
    if judging is not None:
        made: Any = judging.judge
        assert made.checked and made.options.seed == 3 and judging.dialogue == Dialogue()
    for mode in ("likelihood", "choices"):
        assert judging_of(system, get_task(task), options, mode) is None


@pytest.mark.usefixtures("named")
def test_a_paid_judge_wants_a_yes_or_somebody_to_ask() -> None:
    system, task = System(base=ModelSpec(model="m")), get_task("alpaca_farm")
    with pytest.raises(
        UserError, match=r"^the judge of this task costs money: add --yes .*`proxytune judge`$"
    ):
        judging_of(system, task, JudgeOptions(), "generate")
    asks = Dialogue(ask=lambda: True)
    for options, dialogue in ((JudgeOptions(yes=True), None), (JudgeOptions(), asks)):
        judging = judging_of(system, task, options, "generate", dialogue)
        assert judging is not None and judging.judge.name == "gpt-4.1"
        assert judging.dialogue == (dialogue or Dialogue())
    assert judging_of(system, get_task("toxigen"), JudgeOptions(), "generate") is not None, "it runs here"


def test_a_task_that_needs_no_judge() -> None:
    gsm = get_task("gsm")
    assert make_judge(gsm, JudgeOptions()) is None and make_judge(gsm, JudgeOptions(judge="none")) is None
    for judge in ("default", "x"):
        with pytest.raises(UserError, match=r"^task 'gsm' needs no judge: leave --judge out$"):
            make_judge(gsm, JudgeOptions(judge=judge))
    assert judged_task("toxigen").name == "toxigen"
    with pytest.raises(UserError, match=r"^task 'gsm' needs no judge: its rule is part of every run$"):
        judged_task("gsm")
    with pytest.raises(UserError, match=r"^task 'humaneval' is scored by running its code: add --allow-code"):
        judged_task("humaneval")


# The store


def test_what_calls_cost_is_kept_by_what_was_asked(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "sub" / "s.sqlite")
    assert store.get("a") is None and store.spent(["a"]) == (0, 0)
    first, second = store.sending("a", (10, 3)), store.sending("a", (20, 5))
    third = store.sending("b", (100, 7))
    assert store.spent(["a"]) == (30, 8) and store.spent(["a", "b"]) == (130, 15)
    store.ended(first, "a", (4, 1), None)
    assert store.get("a") is None and store.spent(["a"]) == (24, 6)
    store.ended(second, "a", (2, 0), "tie")
    store.ended(third, "b", (1, 1), "B")
    assert (store.get("a"), store.get("b")) == ("tie", "B") and store.spent(["b", "a"]) == (7, 2)
    store.ended(third, "b", (1, 1), "A")
    again = ReplyStore(tmp_path / "sub" / "s.sqlite")
    assert again.get("b") == "A" and again.spent(["a"]) == (6, 1)


def test_the_limits_of_a_call() -> None:
    usual = CallLimits()
    assert (usual.deadline, usual.reply_bytes, usual.retries) == (120.0, 1 << 20, 6)
    assert (usual.pause, usual.longest_pause) == (0.5, 60.0)
    asked = ((1, None), (4, None), (4, 0.0), (1, 61))
    assert [usual.pause_before(*one) for one in asked] == [0.5, 4.0, 0.0, 60.0]
