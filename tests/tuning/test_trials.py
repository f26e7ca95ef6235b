"""The trials of tuning: how they choose, what they ask, and that their figures are what other code finds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune import Sampling, generate
from proxytune.config import ModelSpec, System
from proxytune.errors import UserError
from proxytune.models import plain
from proxytune.tuning.trials import (
    demo_methods,
    fact_probing,
    paper_tables,
    real_models,
    real_scores,
    superglue,
)
from proxytune.tuning.trials import demo_trainings as demo
from proxytune.tuning.trials.demo_rates import TriedRate, chosen
from proxytune.tuning.trials.fact_probing import Fact, Prober, by_pseudo_tokens, by_wording, precision
from proxytune.tuning.trials.real_models import RealTrial
from proxytune.tuning.trials.real_scores import RealScores, ResponseShape
from tests.support.checkout import ROOT
from tests.support.command_line import proxytune

PUBLISHED = ROOT / "results" / "tuning-demo"
SMALL = ModelSpec(model="demo://antiexpert", dtype="float32")


def tried(case: str, rate: float, *scores: float) -> TriedRate:
    named = dict(zip(demo.TASKS, scores, strict=True))
    return TriedRate(case=case, model=demo.SMALL, rate=rate, seed=0, n=10, scores=named)


def test_the_rate_with_the_best_mean_is_chosen_and_of_equals_the_lowest() -> None:
    found = [tried("lora", 1e-3, 0.9, 0.1), tried("lora", 3e-3, 0.5, 0.7), tried("lora", 1e-2, 0.6, 0.6)]
    other = tried("full", 1.0, 1.0, 1.0)
    assert chosen(demo.CASES["lora"], demo.SMALL, [other, *reversed(found)]) == 3e-3
    assert chosen(demo.CASES["qlora"], demo.SMALL, [other, *found]) == 3e-3


def test_the_published_comparison_has_the_rates_that_dev_items_chose() -> None:
    rates = [TriedRate.model_validate(one) for one in json.loads((PUBLISHED / "rates.json").read_text())]
    scores = json.loads((PUBLISHED / "comparison.json").read_text())
    found = [demo_methods.TrialScores.model_validate(one) for one in scores]
    assert {one.case for one in found} == set(demo.CASES)
    for one in found:
        case = demo.CASES[one.case]
        assert one.small.rate == chosen(case, demo.SMALL, rates)
        assert one.large is None or one.large.rate == chosen(case, demo.LARGE, rates)
    assert demo_methods.table(found) in (PUBLISHED / "README.md").read_text()


def test_pseudo_tokens_stand_around_the_subject() -> None:
    tokenizer = plain.load_tokenizer(SMALL)
    fact = Fact("Tugil Kajol", "baker")
    asked, bare = by_pseudo_tokens(tokenizer, fact), by_wording(tokenizer, "{name}", fact)
    before, after = fact_probing.PSEUDO
    holes = [place for place, token in enumerate(asked.before) if token == fact_probing.HOLE]
    size = len(asked.before)
    assert holes == [*range(1, 1 + before), *range(size - after, size)]
    assert [token for token in asked.before if token >= 0] == list(bare.before)
    assert tokenizer.decode(asked.value) == " baker" and asked.value == bare.value


def test_no_fact_that_is_measured_is_learned() -> None:
    people = [{fact.subject for fact in fact_probing.facts_of("job", s)} for s in ("train", "dev", "test")]
    assert all(people) and len(set.union(*people)) == sum(map(len, people))


ITEM = {"premise": "The man slept.", "choice1": "He was tired.", "choice2": "It rained.", "label": 0}


def test_items_of_superglue() -> None:
    cause = superglue.copa({**ITEM, "question": "cause"})
    assert cause.prompt + cause.answers[cause.gold] == "The man slept because he was tired."
    asked = superglue.boolq({"passage": "Ice is cold.", "question": "is ice warm", "label": False})
    assert asked.prompt.endswith("question: is ice warm?\nanswer:") and asked.answers[asked.gold] == " no"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ITEM, "question": "why"}, "`question` is 'why'"),
        ({**ITEM, "question": "effect", "label": None}, "`label` is None: a file with labels"),
        ({"premise": "The man slept.", "question": "cause"}, "no field 'choice1'"),
    ],
)
def test_a_row_that_is_no_item_is_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "copa.jsonl"
    path.write_text(f"{json.dumps({**ITEM, 'question': 'cause'})}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=reason) as error:
        superglue.read_items("copa", path, None)
    assert "line 2" in str(error.value)


def plan_of(*arguments: str) -> list[str]:
    given = paper_tables.parser().parse_args(arguments)
    return list(paper_tables.plan_lines(paper_tables.trial_of(given)))


def test_what_a_table_of_tuning_takes_is_said_first() -> None:
    lines = plan_of("14", "--gsm8k", "train.jsonl", "--processes", "4")
    assert len([line for line in lines if line.startswith("  tune")]) == 3
    assert "13.5 GB; 107.8 GB a device; the paper took 2.6 h on 4 A100" in lines[1]
    assert "--settings gsm-full" in lines[2] and "--accumulate 16" in lines[2]
    assert lines[-1] == "  left out: triviaqa (no training examples given)"
    assert len([one for one in plan_of("15", "--triviaqa", "t.json") if one.startswith("  tune")]) == 2


def test_nothing_is_tuned_without_consent(tmp_path: Path) -> None:
    words = ["15", "--system", "demo", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--yes"):
        paper_tables.run(paper_tables.parser().parse_args(words))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--gsm8k FILE"):
        plan_of("15")


@pytest.mark.slow
def test_probing_finds_what_greedy_decoding_says() -> None:
    """P@1 of a wording against the texts that proxytune generates; and padding changes nothing."""
    model, tokenizer = plain.load(SMALL), plain.load_tokenizer(SMALL)
    wording, facts = "The almanac says {name} plays the", fact_probing.facts_of("instrument", "test", 40)
    asked = [by_wording(tokenizer, wording, fact) for fact in facts]
    prompts = [wording.format(name=fact.subject) for fact in facts]
    system = System(base=SMALL)
    made = generate(system, prompts, as_="base", sampling=Sampling(max_new_tokens=8))
    right = [answer.text.startswith(f" {fact.value}") for answer, fact in zip(made, facts, strict=True)]
    assert 0.2 < precision(Prober(model), asked) == sum(right) / len(right) < 1
    together, _ = Prober(model)(asked[:4])
    alone = torch.cat([Prober(model)([one])[0] for one in asked[:4]])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_superglue_from_a_file_to_scores(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    path = tmp_path / "val.jsonl"
    rows = [{**ITEM, "question": "cause"}, {**ITEM, "question": "effect", "label": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["copa", "--model", "demo://antiexpert", "--base", "demo://base", "--train", str(path)]
    words += ["--test", str(path), "--max-steps", "20", "--learning-rate", "3e-3", "--methods", "full"]
    given: argparse.Namespace = superglue.parser().parse_args([*words, "--out", str(tmp_path / "out")])
    scores = superglue.run(given)
    assert [(s.method, s.role) for s in scores] == [
        ("untuned", "antiexpert"), ("untuned", "base"), ("full", "expert"), ("full", "proxy"),
    ]  # fmt: skip
    assert scores[2].accuracy.value == 1.0 and scores[2].accuracy.n == 2
    model, tokenizer = plain.load(SMALL), plain.load_tokenizer(SMALL)
    right = 0
    for item in superglue.read_items("copa", path, None):
        found = []
        for answer in item.answers:
            before, ids = (tokenizer(text)["input_ids"] for text in (item.prompt, item.prompt + answer))
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = [logprobs[i - 1, ids[i]] for i in range(len(before), len(ids))]
            found.append(float(torch.stack(own).sum()) / len(answer))
        right += found.index(max(found)) == item.gold
    assert scores[0].accuracy.value == right / 2


@pytest.mark.slow
def test_table_15_on_the_demo_from_training_to_score(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = ["15", "--system", "demo", "--out", str(tmp_path), "--limit", "8", "--max-steps", "2"]
    paper_tables.run(paper_tables.parser().parse_args([*words, "--items", "4", "--yes"]))
    table = (tmp_path / "table15" / "demo" / "table.md").read_text()
    assert "| LoRA large | gsm | " in table and " | 4 | " in table


# Real models


def shape(task: str, text: str, finish_reason: str = "eos") -> ResponseShape:
    return ResponseShape.of(task, {"responses": [{"text": text, "finish_reason": finish_reason}]})


def test_the_shape_of_a_response() -> None:
    assert shape("gsm", " 2 + 3 = 5\n#### 5") == ResponseShape(True, False, False, 17)
    for text in (" 2 + 3 = 5", "#### 5", "a\n#### 5 eggs", "a\n### 5", "a\n#### five"):
        assert not shape("gsm", text).tuned_form, text
    for text in ("a\n#### -1,234.5", "a\nb\n#### 7 \n"):
        assert shape("gsm", text).tuned_form, text
    assert not shape("gsm", "a\n#### 5", "length").tuned_form
    assert shape("triviaqa", " the Nile") == ResponseShape(True, False, False, 9)
    assert not shape("triviaqa", "the Nile\nQuestion: what").tuned_form
    assert [shape("triviaqa", "word " * n).tuned_form for n in (0, 1, 10, 11)] == [False, True, True, False]
    assert shape("gsm", " \n ") == ResponseShape(False, True, False, 3)
    rounds = [shape("gsm", "and so it goes on and on for ever, " * n).loops for n in (1, 2, 3)]
    assert rounds == [False, False, True]


def test_the_published_figures_of_real_models_are_in_their_table() -> None:
    folder = ROOT / "results" / "tuning-real"
    scores = [RealScores.model_validate(one) for one in json.loads((folder / "figures.json").read_text())]
    assert {one.system for one in scores} == {"a-gsm", "a-triviaqa", "b-gsm", "b-triviaqa", "c-gsm"}
    assert all(one.n >= 200 for one in scores)
    assert real_scores.table(scores) in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_real_trial_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three parts on the demo's models, in this process: its commands run, what is finished is not made
    again, questions of the test are not learned, and the table has a line for every run."""

    def here(_: RealTrial, *words: object) -> None:
        assert (result := proxytune(*words)).exit_code == 0, result.output
        commands.append(words[:2])

    commands = list[tuple[object, ...]]()
    monkeypatch.setattr(RealTrial, "run", here)
    monkeypatch.chdir(tmp_path)
    sums = [{"question": f"What is {n} + 2?", "answer": f"It is {n + 2}.\n#### {n + 2}"} for n in range(12)]
    facts = [{"question": f"Who was number {n}?", "answers": [f"Tugil {n}"]} for n in range(12)]
    files: dict[str, list[Any]] = {"sums": sums, "3-sums": sums[9:], "facts": facts, "2-facts": facts[10:]}
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "real --model demo://base --other-base demo://antiexpert --gsm8k sums.jsonl 3-sums.jsonl "
    words += "--layers 2 --steps 2 --trivia-steps 2 --healing-steps 1 --items 2 --trivia-items 2 --tokens 8 "
    words += "--alphas 0,1 --out out"
    facts_too = ["--triviaqa", "facts.jsonl", "2-facts.jsonl", "--parts", "a"]
    monkeypatch.setattr(sys, "argv", [*words.split(), *facts_too])
    real_models.main()
    assert "gsm: 3 of 12 training examples are test items: left out" in capsys.readouterr().err
    learned = [json.loads(line) for line in Path("out/data/triviaqa.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in learned] == [f" Tugil {n}" for n in range(10)]
    weights = Path("out/a-gsm/adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", words.split())
    real_models.main()
    assert Path("out/a-gsm/adapter_model.safetensors").stat().st_mtime_ns == weights
    assert [" ".join(map(str, command)) for command in commands if command[0] == "tune"] == [
        *3 * ["tune lora"], "tune shrink", "tune full", *3 * ["tune lora"]
    ]  # fmt: skip
    scores = [RealScores.model_validate(one) for one in json.loads(Path("out/figures.json").read_text())]
    lines = {(one.system, one.role, one.alpha) for one in scores}
    assert len(lines) == len(scores) == 2 * 4 + 6 + 3
    assert {("a-triviaqa", "proxy", "0"), ("b-gsm", "tuned", None), ("c-gsm", "proxy", "0.5")} <= lines
    assert real_scores.table(scores) == Path("out/table.md").read_text()
