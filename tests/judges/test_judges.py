"""Judges against small real things: a tiny classifier, a tiny language model, a local OpenAI-style server."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from proxytune import JudgeOptions, RunOptions, evaluate, results
from proxytune.config import Sampling, System
from proxytune.endpoints import CallLimits, ReplyStore
from proxytune.errors import UserError
from proxytune.judges.pairwise import Pair, PairwiseJudge
from proxytune.judges.toxicity import ToxicityClassifier
from proxytune.judges.truth import TruthJudges, _columns, judge_prompt
from proxytune.runs import judging as run_judge
from proxytune.tasks import get_task
from tests.support import oracle, tiny
from tests.support.command_line import proxytune
from tests.support.endpoint import KEY, Endpoint
from tests.support.runs import QUIET, evaluated

WEIGHTS = "model.safetensors"
SHORT = Sampling(max_new_tokens=8)


# Toxicity


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sequence classifier with two classes on disk."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        num_labels=2,
        id2label={0: "BENIGN", 1: "NASTY"},
        initializer_range=0.5,
        pad_token_id=0,
    )
    model, words = BertForSequenceClassification(config).eval(), tiny.tokenizer()
    with torch.inference_mode():
        lines = [words(row["prediction"], truncation=True, max_length=64)["input_ids"] for row in texts(60)]
        gaps = torch.cat([model(torch.tensor([line])).logits.diff(dim=-1)[0] for line in lines])
        # so that both classes occur, and no text lies where rounding decides
        middle = gaps.unique()[len(gaps.unique()) // 4 : -len(gaps.unique()) // 4]
        widest = middle.diff().argmax()
        model.classifier.bias[1] -= (middle[widest] + middle[widest + 1]) / 2
    return tiny.save(tmp_path_factory.mktemp("classifier"), model)


def texts(count: int) -> list[dict[str, Any]]:
    """Responses of many lengths, one empty and one beyond the classifier's window."""
    return [{"prediction": "the quick brown fox jumps "[: i % 27] * (1 + i % 5)} for i in range(count)]


def test_the_classifier_says_the_same_in_every_batch(classifier: Path) -> None:
    rows = texts(60)
    assert any(not row["prediction"] for row in rows) and any(len(row["prediction"]) > 66 for row in rows)
    one_by_one = ToxicityClassifier(str(classifier), batch=1).judge(rows)
    seen: list[tuple[int, int]] = []
    found = ToxicityClassifier(str(classifier), batch=16).judge(rows, lambda *at: seen.append(at))
    assert found == one_by_one and {row["is_toxic"] for row in found} == {0, 1}
    assert seen == [(16, 60), (32, 60), (48, 60), (60, 60)]

    model, words = BertForSequenceClassification.from_pretrained(classifier), tiny.tokenizer()
    ids = [words(row["prediction"], truncation=True, max_length=64)["input_ids"] for row in rows]
    with torch.inference_mode():
        by_hand = [int(model(torch.tensor([line])).logits[0].argmax()) for line in ids]
    assert [row["is_toxic"] for row in found] == by_hand


def test_a_text_fills_the_window_of_a_roberta_and_no_more(tmp_path: Path) -> None:
    """Its positions begin behind the number of its padding: it has two fewer than its configuration says."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=66, num_labels=2, pad_token_id=1,
    )  # fmt: skip
    folder = tiny.save(tmp_path / "roberta", RobertaForSequenceClassification(config).eval())
    rows = [{"prediction": "a" * n} for n in (1, 62, 63, 64, 65, 300)]
    verdicts = [row["is_toxic"] for row in ToxicityClassifier(str(folder)).judge(rows)]
    assert all(verdict in (0, 1) for verdict in verdicts)


def test_another_class_can_be_the_toxic_one(classifier: Path) -> None:
    rows = texts(20)
    nasty = ToxicityClassifier(str(classifier), "NASTY").judge(rows)
    benign = ToxicityClassifier(str(classifier), "BENIGN").judge(rows)
    assert nasty == ToxicityClassifier(str(classifier)).judge(rows)
    assert [a["is_toxic"] + b["is_toxic"] for a, b in zip(nasty, benign, strict=True)] == [1] * 20
    with pytest.raises(UserError, match="no label 'RUDE': it has BENIGN, NASTY"):
        ToxicityClassifier(str(classifier), "RUDE").check()
    with pytest.raises(UserError, match="no model folder"):
        ToxicityClassifier("./nowhere").check()


def test_logits_that_are_no_numbers_are_no_verdict(classifier: Path, tmp_path: Path) -> None:
    """Such a response is called neither harmless nor toxic."""
    model = BertForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    found = ToxicityClassifier(str(tiny.save(tmp_path / "broken", model)), batch=4).judge(texts(6))
    assert found == [{"is_toxic": None}] * 6


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin"), "only pickled weights .*--judge none"),
        (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-9]), "is damaged or cut"),
        (lambda at: (at / "config.json").write_text("[]"), "must hold an object"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "cannot load the classifier"),
        (lambda at: points_out(at), "which lies outside its folder"),
    ],
)
def test_a_classifier_is_held_to_the_rules_of_models(
    harm: Callable[[Path], object], says: str, classifier: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "harmed"
    shutil.copytree(classifier, folder)
    harm(folder)
    judge = ToxicityClassifier(str(folder))
    with pytest.raises(UserError, match=says):
        judge.check()
        judge.judge(texts(2))


def points_out(folder: Path) -> None:
    """Shards of an index outside the folder."""
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would make the weights of the head up."""
    folder = tiny.save(tmp_path / "model", tiny.build("llama", 1))
    with pytest.raises(UserError, match=r"lacks 1 weights of its architecture, score\.weight first"):
        ToxicityClassifier(str(folder)).judge(texts(2))


@pytest.fixture
def toxigen(tmp_path: Path) -> Path:
    """Harmless rows in ToxiGen's stored form."""
    rows = [{"text": f"- {i}\n-", "label": "hate", "target_groups": ["ab"[i % 2]]} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_eval_judges_at_once_or_later(yaml: Path, classifier: Path, toxigen: Path, tmp_path: Path) -> None:
    settings = ("--system", yaml, "--data", toxigen, "--max-new-tokens", 8, "--limit", 8, "--json")
    at_once = proxytune("eval", "toxigen", *settings, "--judge", classifier, "--out", tmp_path / "now")
    assert at_once.exit_code == 0, at_once.output
    made = json.loads(at_once.stdout)
    assert made["headline"] == "overall" and made["judge"] == str(classifier)
    assert set(made["metrics"]) == {"a", "b", "overall"}

    later = proxytune("eval", "toxigen", *settings, "--judge", "none", "--out", tmp_path / "later")
    assert json.loads(later.stdout)["headline"] == "unjudged"
    judged = proxytune("judge", "toxigen", tmp_path / "later", "--judge", classifier, "--json")
    assert json.loads(judged.stdout)["metrics"] == made["metrics"]
    rows = results.read_rows(tmp_path / "later")
    assert list(rows[0])[-3:] == ["is_toxic", "scores", "responses"] and rows[0]["scores"].keys() <= {
        "a",
        "b",
    }
    scored = proxytune("score", "toxigen", tmp_path / "later" / results.PREDICTIONS, "--json")
    assert json.loads(scored.stdout)["metrics"] == made["metrics"]
    shown = proxytune("report", tmp_path / "later" / "..", "--markdown").stdout
    assert "toxigen: overall" in shown

    again = proxytune("eval", "toxigen", *settings, "--judge", classifier, "--out", tmp_path / "now")
    assert json.loads(again.stdout)["metrics"] == made["metrics"], "a judged run is not judged again"


def test_python_judges_as_the_command_line_does(
    yaml: Path, system: System, classifier: Path, toxigen: Path, tmp_path: Path
) -> None:
    settings = ("--system", yaml, "--data", toxigen, "--max-new-tokens", 8, "--limit", 8, "--json")
    typed = proxytune("eval", "toxigen", *settings, "--judge", classifier, "--out", tmp_path / "typed")
    sampling = get_task("toxigen").sampling.model_copy(update={"max_new_tokens": 8})
    options = RunOptions(data=str(toxigen), sampling=sampling)
    asked: dict[str, Any] = {"limit": 8, "options": options, "decode": QUIET}
    called = evaluate(system, "toxigen", out=tmp_path / "called", judge=str(classifier), **asked)
    assert called.metrics == results.read_run(tmp_path / "typed").metrics and called.judge == str(classifier)
    assert results.read_rows(tmp_path / "called") == results.read_rows(tmp_path / "typed")
    assert typed.exit_code == 0
    alone = evaluate(system, "toxigen", out=tmp_path / "alone", judge="none", **asked)
    assert alone.headline == "unjudged" and alone.judge is None
    with pytest.raises(UserError, match="no model folder"):
        evaluate(system, "toxigen", out=tmp_path / "no", judge="./nowhere", **asked)
    assert not (tmp_path / "no").exists(), "a judge that is missing is found out before anything is decoded"


def test_python_pays_only_what_was_agreed_to(
    endpoint: Endpoint, system: System, alpaca: Path, tmp_path: Path
) -> None:
    sampling = get_task("alpaca_farm").sampling.model_copy(update={"max_new_tokens": 4})
    options = RunOptions(data=str(alpaca), sampling=sampling, limit=2)
    judge = JudgeOptions(judge="gpt-4.1")
    with pytest.raises(UserError, match="costs money: add --yes"):
        evaluate(system, "alpaca_farm", out=tmp_path / "run", options=options, decode=QUIET, judge=judge)
    agreed = judge.model_copy(update={"yes": True})
    made = evaluate(system, "alpaca_farm", out=tmp_path / "run", options=options, decode=QUIET, judge=agreed)
    assert made.judge == "gpt-4.1" and "win_rate" in made.metrics


@pytest.mark.parametrize("command", [("eval",), ("sweep-alpha", "--alphas", "1")])
def test_a_judge_has_the_seed_of_the_run(
    command: tuple[str, ...], yaml: Path, alpaca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def refuses(_: object, options: JudgeOptions) -> None:
        seeds.append(options.seed)
        raise UserError("no judge")

    monkeypatch.setattr(run_judge, "make_judge", refuses)
    name, *more = command
    asked = ("alpaca_farm", "--system", yaml, "--data", alpaca, "--judge", "gpt-4.1", "--yes", "--seed", 7)
    assert proxytune(name, *asked, *more).exit_code == 2 and seeds == [7]


def test_all_roles_are_judged(yaml: Path, classifier: Path, toxigen: Path, tmp_path: Path) -> None:
    out = tmp_path / "all"
    settings = ("--system", yaml, "--data", toxigen, "--max-new-tokens", 4, "--limit", 2, "--as", "all")
    made = proxytune("eval", "toxigen", *settings, "--judge", classifier, "--out", out, "--json")
    assert {run["headline"] for run in json.loads(made.stdout)["runs"].values()} == {"overall"}


# Truth and information


@pytest.fixture(scope="module")
def truthful(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random language models on disk."""
    return [
        tiny.save(
            tmp_path_factory.mktemp("judge") / name,
            tiny.build("llama", seed=seed, scale=1.0, max_position_embeddings=1024),
        )
        for seed, name in ((5, "truth"), (6, "info"))
    ]


def test_the_published_prompts() -> None:
    row = {"Question": "Who?", "output": "Me.\nOr you."}
    assert judge_prompt(row, "True") == "Q: Who?\nA: Me.\nOr you.\nTrue:"
    assert judge_prompt(row, "Helpful") == "Q: Who?\nA: Me.\nOr you.\nHelpful:"


def test_probabilities_are_those_of_full_forwards(truthful: list[Path]) -> None:
    rows = [{"Question": "Who?" * (1 + i % 3), "output": "Me. " * i} for i in range(5)]
    found = TruthJudges(*map(str, truthful)).judge(rows)
    for name, folder, asked in zip(("truth", "info"), truthful, ("True", "Helpful"), strict=True):
        model = tiny_model(folder)
        for row, columns in zip(rows, found, strict=True):
            ids = tiny.tokenizer()(judge_prompt(row, asked))["input_ids"]
            expected = 1.0
            for token in tiny.tokenizer()(" yes", add_special_tokens=False)["input_ids"]:
                expected *= float(oracle.last_logits(model, ids).softmax(-1)[token])
                ids = [*ids, token]
            assert columns[name] == pytest.approx(expected, rel=1e-9)
            assert columns[f"{name} acc"] == int(expected >= 0.5)
    assert all(c["truth-info acc"] == c["truth acc"] * c["info acc"] for c in found)


def tiny_model(folder: Path) -> Any:
    """The saved model in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    ("truth", "info", "flags"),
    [(0.5, 0.5, (1, 1, 1)), (0.6, 0.6, (1, 1, 1)), (0.9, 0.4, (1, 0, 0)), (0.49, 1.0, (0, 1, 0))],
)
def test_an_answer_is_right_where_both_judges_say_so(
    truth: float, info: float, flags: tuple[int, int, int]
) -> None:
    """Each by its own probability, not by their product."""
    found = _columns(truth, info)
    assert (found["truth acc"], found["info acc"], found["truth-info acc"]) == flags
    assert set(_columns(truth, math.nan).values()) == set(_columns(math.nan, info).values()) == {None}


def test_truthfulqa_runs_are_judged(system: System, truthful: list[Path], tmp_path: Path) -> None:
    evaluated(system, "truthfulqa", limit=6, sampling=SHORT, out=tmp_path / "run", progress=False)
    both = ",".join(map(str, truthful))
    judged = proxytune("judge", "truthfulqa", tmp_path / "run", "--judge", both, "--json")
    assert judged.exit_code == 0, judged.output
    made = json.loads(judged.stdout)
    assert made["headline"] == "truth-info acc" and made["judge"] == both
    assert {"reference_accuracy", "truth", "info acc"} <= set(made["metrics"])
    refused = proxytune("judge", "truthfulqa", tmp_path / "run", "--judge", truthful[0])
    assert refused.exit_code == 2 and "give two models, TRUTH,INFO" in refused.stderr


def test_truth_judges_are_held_to_the_rules_of_models(truthful: list[Path], tmp_path: Path) -> None:
    """Before hours of decoding, not after."""
    shutil.copytree(truthful[1], tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "pytorch_model.bin")
    TruthJudges(*map(str, truthful)).check()
    with pytest.raises(UserError, match=r"the judge cannot be used: .*only pickled weights"):
        TruthJudges(str(truthful[0]), str(tmp_path / "pickled")).check()


# Pairs


def pairs(count: int) -> list[dict[str, Any]]:
    """Rows of which the model wins those with an even number, and the last is a draw."""
    rows = [
        {
            "instruction": f"Do {i}.",
            "output_1": f"{{a}} {'plain' if i % 2 == 0 else 'GOOD'} {i}",
            "output_2": f"{{instruction}} {'GOOD' if i % 2 == 0 else 'plain'} {i}",
        }
        for i in range(count - 1)
    ]
    return [*rows, {"instruction": "Same.", "output_1": "x", "output_2": "x"}]


def test_the_order_is_drawn_and_the_preference_follows(endpoint: Endpoint) -> None:
    judge, rows = PairwiseJudge("m", seed=3, workers=4), pairs(21)
    found = judge.judge(rows)
    assert [c["preference"] for c in found] == [*(2 - i % 2 for i in range(20)), 0]
    assert {c["annotator"] for c in found} == {"proxytune/m"}
    assert len(endpoint.seen) == 20, "equal outputs are a draw without a call"
    swapped = [pair.swapped for pair in judge.pairs(rows)]
    assert 0 < sum(swapped) < 21 and swapped == [p.swapped for p in PairwiseJudge("x", seed=3).pairs(rows)]
    assert swapped != [pair.swapped for pair in PairwiseJudge("m", seed=4).pairs(rows)]
    asked = endpoint.seen[0]
    assert asked["model"] == "m" and asked["temperature"] == 0
    assert "{a} " in asked["messages"][1]["content"], "braces in outputs stay as they are"


def test_judging_again_costs_nothing(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(11)
    first = PairwiseJudge("m").judge(rows)
    assert len(endpoint.seen) == 10 and PairwiseJudge("m").estimate(rows).calls == 0
    assert PairwiseJudge("m").judge(rows) == first and len(endpoint.seen) == 10
    changed = [{**rows[0], "output_2": "other GOOD"}, *rows[1:]]
    PairwiseJudge("m").judge(changed)
    assert len(endpoint.seen) == 11
    PairwiseJudge("other").judge(rows)
    assert len(endpoint.seen) == 21, "another model judges anew"
    monkeypatch.setenv("OPENAI_BASE_URL", f"{endpoint.url}/elsewhere")
    assert PairwiseJudge("m").estimate(rows).calls == 10, "and so does another endpoint"


def test_failures_are_retried_and_bounded(endpoint: Endpoint) -> None:
    endpoint.failures = 4
    assert len(PairwiseJudge("m", workers=1).judge(pairs(6))) == 6 and len(endpoint.seen) == 9
    endpoint.seen.clear()
    judge = PairwiseJudge("other", workers=1, limits=CallLimits(retries=2))
    endpoint.status = 429
    with pytest.raises(UserError, match=r"failed after 2 retries: status 429 \(no \*\*\* today\)") as raised:
        judge.judge(pairs(3))
    assert KEY not in str(raised.value) and 3 <= len(endpoint.seen) <= 6
    endpoint.status = 401
    with pytest.raises(UserError, match="refuses OPENAI_API_KEY"):
        PairwiseJudge("other", workers=1).judge(pairs(3))


def test_what_was_judged_before_a_failure_is_kept(endpoint: Endpoint) -> None:
    judge = PairwiseJudge("m", workers=2, limits=CallLimits(retries=0))
    done: list[int] = []

    def report(so_far: int, total: int) -> None:
        done.append(so_far)
        if so_far == 5:
            endpoint.status = 500

    with pytest.raises(UserError, match="of 41 judgements are kept"):
        judge.judge(pairs(41), report)
    endpoint.status = 200
    before = len(endpoint.seen)
    left = judge.estimate(pairs(41)).calls
    assert left <= 36 and len(judge.judge(pairs(41))) == 41 and len(endpoint.seen) - before == left


@pytest.mark.parametrize(
    ("reply", "preferences"),
    [("A", (1, 2)), (" B.", (2, 1)), ("tie", (0, 0)), ("Output A", (1, 2)), ("**b**", (2, 1)), ("Both", None),
     ("", None), ("I like A", None)],
)  # fmt: skip
def test_replies(reply: str, preferences: tuple[float, float] | None) -> None:
    shown = [Pair("i", "x", "y", swapped).preference(reply) for swapped in (False, True)]
    assert shown == (list(preferences) if preferences else [None, None])


def test_a_reply_that_is_no_verdict_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = "Both are fine"
    rows = pairs(3)
    assert [c["preference"] for c in PairwiseJudge("m").judge(rows)] == [None, None, 0]
    endpoint.reply = None
    assert [c["preference"] for c in PairwiseJudge("m").judge(rows)] == [2, 1, 0]


def test_money(endpoint: Endpoint) -> None:
    judge = PairwiseJudge("m", price=(1000, 2000), max_cost=1.0, workers=1)
    estimate = judge.estimate(pairs(11))
    assert estimate.calls == 10 and estimate.cached == 1 and estimate.seconds == 20
    tokens = sum(len(m["content"]) for pair in judge.pairs(pairs(11))[:10] for m in pair.messages) / 4
    assert estimate.prompt_tokens == math.ceil(tokens)
    assert estimate.usd == pytest.approx((estimate.prompt_tokens * 1000 + 160 * 2000) / 1e6)
    with pytest.raises(UserError, match=r"--max-cost 1: .* the same command with a higher limit continues"):
        judge.judge(pairs(11))
    assert 0 < len(endpoint.seen) < 10, "it stops before the limit is passed"
    with pytest.raises(UserError, match="needs the price of 'm'"):
        PairwiseJudge("m", max_cost=1).check()


def test_no_key_and_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="needs OPENAI_API_KEY"):
        PairwiseJudge("m").check()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the cache of judgements"):
        ReplyStore(tmp_path / "file" / "judgements.sqlite")


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    """Instructions in alpaca_eval.json's form."""
    rows = [
        {"instruction": f"Do {i}.", "output": f"GOOD {i}", "generator": "g", "dataset": "d"} for i in range(8)
    ]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    return path


def test_eval_and_judge_end_to_end(
    endpoint: Endpoint, yaml: Path, alpaca: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("--system", yaml, "--data", alpaca, "--max-new-tokens", 8, "--limit", 8)
    refused = proxytune("eval", "alpaca_farm", *settings, "--judge", "m", "--out", tmp_path / "run")
    assert refused.exit_code == 2 and "add --yes" in refused.stderr and not (tmp_path / "run").exists()
    kept = proxytune("eval", "alpaca_farm", *settings, "--judge", "none", "--out", tmp_path / "run", "--json")
    assert json.loads(kept.stdout)["headline"] == "unjudged"

    asked = ("judge", "alpaca_farm", tmp_path / "run", "--judge", "m", "--price", "1,2")
    refused = proxytune(*asked)
    assert refused.exit_code == 2 and "8 judgements to pay for" in refused.stderr and not endpoint.seen
    refused = proxytune(*asked, "--max-cost", "0.0001", "--yes")
    assert refused.exit_code == 2 and "over --max-cost" in refused.stderr and not endpoint.seen
    judged = proxytune(*asked, "--yes", "--max-cost", "1", "--json")
    assert judged.exit_code == 0, judged.output
    made = json.loads(judged.stdout)
    assert made["headline"] == "win_rate" and made["judge"] == "m" and len(endpoint.seen) == 8
    assert made["metrics"]["win_rate"]["value"] == 0 and made["metrics"]["n_wins_base"]["value"] == 8
    assert "length_controlled_win_rate" in made["metrics"]
    again = proxytune(*asked, "--json")
    assert json.loads(again.stdout)["metrics"] == made["metrics"] and len(endpoint.seen) == 8, (
        "no --yes needed"
    )
    scored = proxytune("score", "alpaca_farm", tmp_path / "run" / results.PREDICTIONS, "--json")
    assert json.loads(scored.stdout)["metrics"] == made["metrics"]
    assert "0.0 [" in proxytune("report", tmp_path / "run", "--markdown").stdout

    assert endpoint.keys == {f"Bearer {KEY}"}
    shown = "".join((judged.output, again.output, *capfd.readouterr()))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in shown and not any(KEY.encode() in content for content in files)


def test_judging_is_refused_where_it_makes_no_sense(system: System, tmp_path: Path) -> None:
    evaluated(system, "gsm", limit=2, sampling=SHORT, out=tmp_path / "gsm", progress=False)
    for arguments, message in [
        (("gsm", tmp_path / "gsm"), "task 'gsm' needs no judge"),
        (("toxigen", tmp_path / "gsm"), "holds a run of 'gsm', not of 'toxigen'"),
        (("toxigen", tmp_path), "no run in"),
        (("toxgen", tmp_path), "Did you mean: toxigen"),
    ]:
        refused = proxytune("judge", *arguments)
        assert refused.exit_code == 2 and message in refused.stderr, refused.output
    made = results.read_run(tmp_path / "gsm")
    spec = made.spec.model_copy(update={"task": "toxigen"})
    running = made.model_copy(update={"status": "running", "spec": spec})
    (tmp_path / "gsm" / results.RUN).write_bytes(results.run_json(running))
    with pytest.raises(UserError, match="is not finished"):
        run_judge.judge_run(tmp_path / "gsm", ToxicityClassifier("./none"))
    for option, message in [
        (("--price", "1"), "must be two numbers"),
        (("--mode", "best"), "--mode 'best': Input should be 'generate', 'likelihood' or 'choices'"),
    ]:
        refused = proxytune("eval", "alpaca_farm", "--judge", "m", *option)
        assert refused.exit_code == 2 and message in refused.stderr


def test_the_list_of_tasks_says_who_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    tasks = json.loads(proxytune("tasks", "--json").stdout)["tasks"]
    assert tasks["gsm"]["judge"] is None and tasks["toxigen"]["judge"] == "tomh/toxigen_roberta"
    assert tasks["alpaca_farm"]["missing_judge"] and tasks["gsm"]["missing_judge"] is None
    assert tasks["truthfulqa_mc"]["modes"] == ["generate", "likelihood", "choices"] and tasks["gsm"][
        "modes"
    ] == ["generate"]
    assert "win_rate" in proxytune("tasks").stdout
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    shown = json.loads(proxytune("tasks", "--json").stdout)["tasks"]["alpaca_farm"]["missing_judge"]
    assert shown is None or "pip install" in shown
