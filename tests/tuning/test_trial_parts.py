"""The parts of the trials, on figures that are worked out by hand: nothing is tuned here."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from proxytune.config import ModelSpec, load_system
from proxytune.errors import UserError
from proxytune.records import Completion, Metric
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.trials import demo_methods, fact_probing, paper_tables, superglue
from proxytune.tuning.trials import demo_trainings as demo
from proxytune.tuning.trials.fact_probing import AskedFact, Prober, ProbingScore

# SuperGLUE


@pytest.mark.parametrize(
    ("label", "place"), [(True, 1), (False, 0), ("TRUE", 1), ("false", 0), ("1", 1), (0, 0)]
)
def test_labels_in_every_form(label: object, place: int) -> None:
    row = {"passage": " Ice. ", "question": "is ice warm?? ", "label": label}
    item = superglue.boolq(row)
    assert (item.prompt, item.answers, item.gold) == (
        "Ice.\nquestion: is ice warm?\nanswer:", (" no", " yes"), place,
    )  # fmt: skip


def test_causes_and_effects() -> None:
    row = {
        "premise": "He slept. ",
        "choice1": " It rained. ",
        "choice2": "Was tired.",
        "question": "effect",
        "label": 1,
    }
    item = superglue.copa(row)
    assert (item.prompt, item.answers, item.gold) == ("He slept so", (" it rained.", " was tired."), 1)


@pytest.mark.parametrize(
    ("task", "logprobs", "right"),
    [
        # " bb" has 3 characters, " a" has 2: -5 / 2 and -6.9 / 3 by character
        ("copa", (-5.0, -6.9), True), ("copa", (-4.0, -6.3), False), ("boolq", (-5.0, -6.9), False),
        ("boolq", (-6.9, -5.0), True),
    ],
)  # fmt: skip
def test_the_most_probable_answer(task: str, logprobs: tuple[float, float], right: bool) -> None:
    trial = superglue.SuperglueTrial(task, (), TuneOptions(), Path())
    item = superglue.ChoiceItem("p", (" a", " bb"), 1)
    found = [Completion("0", place, "", (), "stop", value) for place, value in enumerate(logprobs)]
    assert trial._right(item, found) is right


def test_answers_that_are_learned(tmp_path: Path) -> None:
    items = [superglue.ChoiceItem("p", (" a", " b"), 1), superglue.ChoiceItem("q", (" c", " d"), 0)]
    assert superglue.write_training(items, tmp_path / "x").read_text() == (
        '{"prompt": "p", "completion": " b"}\n{"prompt": "q", "completion": " c"}\n'
    )


# Probing


class Next(nn.Module):
    """A model that finds the token most probable that is one more than the one it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 9)
        self.embed.weight.data = torch.eye(9)

    def get_input_embeddings(self) -> nn.Module:
        """One hot."""
        return self.embed

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> Any:
        """Moved by one."""
        return SimpleNamespace(logits=inputs_embeds.roll(1, -1))


def test_every_token_of_a_value_has_to_be_the_most_probable_one() -> None:
    asked = [
        AskedFact((7, 1), (2, 3)), AskedFact((1,), (2, 4)), AskedFact((5, 1, 3), (4,)),
        AskedFact((1,), (3, 4)),
    ]  # fmt: skip
    prober = Prober(Next())
    logits, wanted = prober(asked)
    assert wanted.tolist() == [2, 3, 2, 4, 4, 3, 4] and logits.argmax(-1).tolist() == [2, 3, 2, 3, 4, 2, 4]
    assert fact_probing.precision(prober, asked) == 0.5
    assert fact_probing.precision(prober, asked[:1] * 70 + asked[1:2] * 30) == 0.7, "over several batches"


class Holes(nn.Module):
    """Pseudo tokens that say that they are 1, 2, 3 ..."""

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """As a network would."""
        return torch.eye(9)[places + 1]


def test_pseudo_tokens_fill_their_holes_in_every_row() -> None:
    hole = fact_probing.HOLE
    prober = Prober(Next(), Holes())
    rows = [AskedFact((0, hole, hole, hole, 8, hole, hole, hole), (7,))] * 2
    logits, wanted = prober(rows)
    assert logits.argmax(-1).tolist() == [7, 7] == wanted.tolist(), "the last of the six is a 6"
    assert list(prober.trained()) == [] and len(Prober(Next()).trained()) == 1


def test_batches_of_facts_go_through_all_of_them() -> None:
    asked: list[Any] = list(range(20))
    found = list(fact_probing._batches(asked, 5, random.Random(1)))
    assert [len(batch) for batch in found] == [16] * 5
    told = [one for batch in found for one in batch]
    assert sorted(told[:20]) == sorted(told[20:40]) == sorted(told[40:60]) == asked


def test_the_table_of_probing() -> None:
    relations = list(fact_probing.WORDINGS)
    manual = [
        ProbingScore(way="MP", relation=r, wording=f"{w} {r}", dev=dev, test=test)
        for r in relations
        for w, dev, test in (("a", 0.25, 0.5), ("b", 0.5, 0.125))
    ]
    tuned = [
        ProbingScore(way="FT", relation=r, seed=seed, rate=0.1, trained=1234, dev=0.5, test=test)
        for r in relations
        for seed, test in ((0, 0.25), (1, 0.75))
    ]
    lines = fact_probing.table([*manual, *tuned]).splitlines()
    spread, best, way = "31.2 (12.5 to 50.0)", "12.5", "50.0 (25.0 to 75.0)"
    assert lines[2:5] == [
        f"| MP, all wordings | 0 | {spread} | {spread} | {spread} | 31.2 |",
        f"| MP, the best on dev | 0 | {best} | {best} | {best} | 12.5 |",
        f"| FT | 1,234 | {way} | {way} | {way} | 50.0 |",
    ]
    assert lines[6:9] == [
        "| wording | P@1, dev | P@1, test |", "| --- | --- | --- |", f"| a {relations[0]} | 25.0 | 50.0 |",
    ]  # fmt: skip


# The demo's methods


def test_what_a_training_cost() -> None:
    request = SimpleNamespace(settings={"learning_rate": 0.5})
    record: Any = SimpleNamespace(
        request=request, trainable=3, parameters=7, cpu_seconds=2.5, peak_bytes=90, before_bytes=20
    )
    assert demo_methods.TrainingCost.of(record) == demo_methods.TrainingCost(
        rate=0.5, trainable=3, parameters=7, cpu_seconds=2.5, memory=70
    )


def test_the_table_of_the_methods() -> None:
    def scored(seed: int, task: str, value: float, large: bool) -> demo_methods.TrialScores:
        cost = demo_methods.TrainingCost(
            rate=1e-3, trainable=1250, parameters=8000, cpu_seconds=10.0 + seed, memory=2**20 * (5 + seed)
        )
        roles = ("antiexpert", "expert", "base", "proxy")
        metrics = {role: Metric(value=value + i / 100) for i, role in enumerate(roles)}
        more: Any = (
            {"large": cost, "tuned": Metric(value=0.75), "gap_closed": 0.5 + seed / 4} if large else {}
        )
        return demo_methods.TrialScores(case="lora", seed=seed, task=task, small=cost, **metrics, **more)

    scores = [scored(seed, task, 0.25, seed == 0) for seed in (0, 1) for task in demo.TASKS]
    lines = demo_methods.table(scores).splitlines()
    assert lines[2:4] == [
        "| lora | small | 0.001 | 1,250 of 8,000 | 6 (5 to 6) | 10.5 (10.0 to 11.0) |",
        "| lora | large | 0.001 | 1,250 of 8,000 | 5 | 10.0 |",
    ]
    assert lines[7:] == [
        f"| lora | {task} | 25.0 | 26.0 | 27.0 | 28.0 | 75.0 | 0.50 |" for task in demo.TASKS
    ]
    assert demo_methods._spread([], "{:.1f}") == "" and demo_methods._spread([1.04, 0.96], "{:.1f}") == "1.0"


# The paper's tables of tuning


def paper_trial(table: str, *more: str) -> paper_tables.PaperTrial:
    """A trial of the paper's models."""
    words = [table, "--gsm8k", "g.jsonl", "--triviaqa", "t.json", *more]
    return paper_tables.trial_of(paper_tables.parser().parse_args(words))


@pytest.mark.parametrize(
    ("processes", "accumulate", "launch"),
    [(1, "64", ["-m", "proxytune"]), (4, "16", ["--num_processes", "4"]), 
     (100, "1", ["--num_processes", "100"])],
)  # fmt: skip
def test_a_step_has_the_papers_examples_on_any_number_of_devices(
    processes: int, accumulate: str, launch: list[str]
) -> None:
    how = paper_trial("14", "--processes", str(processes), "--limit", "9", "--max-steps", "3")
    first = next(how.trainings())
    words = first.command(how)
    assert (first.label, first.method, first.task) == ("full 7B", "full", "triviaqa")
    assert words[words.index("--accumulate") + 1] == accumulate and launch[0] in words and launch[1] in words
    given = dict(pairwise(words))
    assert (
        given["--settings"] == "triviaqa-full"
        and given["--data"] == "t.json"
        and given["--dtype"] == "float32"
    )
    assert (given["--limit"], given["--max-steps"]) == ("9", "3")
    assert given["--out"] == str(Path("results/tuning-paper/table14/paper/full-7B-triviaqa"))
    lora = [one for one in how.trainings() if one.method == "lora"][-1]
    own = dict(pairwise(lora.command(how)))
    assert (lora.label, own["--dtype"], own["--data"], own["--settings"]) == (
        "LoRA 70B", "bfloat16", "gsm8k:g.jsonl", "gsm-lora",
    )  # fmt: skip
    assert "--limit" not in next(paper_trial("14").trainings()).command(paper_trial("14"))


def test_which_model_of_a_system_is_tuned() -> None:
    trainings = list(paper_trial("14").trainings())
    assert [(one.label, one.task) for one in trainings] == [
        (label, task) for task in ("triviaqa", "gsm") for label in ("full 7B", "LoRA 13B", "LoRA 70B")
    ]
    assert [one.label for one in paper_trial("15").trainings()] == ["LoRA 13B", "LoRA 70B"] * 2
    assert [str(one.spec.model).rpartition("-2-")[2] for one in trainings[:3]] == [
        "7b-hf",
        "13b-hf",
        "70b-hf",
    ]
    demo_system = load_system("demo")
    assert paper_tables._tuned_in(demo_system, "lora") == demo_system.base
    assert paper_tables._tuned_in(demo_system, "full") == demo_system.antiexpert
    with pytest.raises(UserError, match="system 'demo' has no model here that full could tune"):
        paper_tables._tuned_in(demo_system.model_copy(update={"antiexpert": None}), "full")


def test_minutes_and_scores_stand_beside_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((120.0, 300.0, 30.0) * 2)
    monkeypatch.setattr(
        paper_tables,
        "train",
        lambda how, one: SimpleNamespace(seconds=next(seconds), trainable=1234, steps=7),
    )
    printed = paper_tables.published_minutes()
    lines = list(paper_tables.table14(paper_trial("14")))
    assert lines[2:5] == [
        f"| full 7B | triviaqa | 1,234 | 7 | 2.0 | 1.00 | {printed['full 7B', 'triviaqa']} |",
        f"| LoRA 13B | triviaqa | 1,234 | 7 | 5.0 | 2.50 | {printed['LoRA 13B', 'triviaqa']} |",
        f"| LoRA 70B | triviaqa | 1,234 | 7 | 0.5 | 0.25 | {printed['LoRA 70B', 'triviaqa']} |",
    ]
    assert lines[5].startswith("| full 7B | gsm | 1,234 | 7 | 2.0 | 1.00 |")
    monkeypatch.setattr(paper_tables, "train", lambda how, one: None)
    monkeypatch.setattr(paper_tables, "score", lambda how, one: Metric(value=0.5, low=0.25, high=0.75, n=9))
    scores = paper_tables.published_scores()
    assert list(paper_tables.table15(paper_trial("15")))[2] == (
        f"| LoRA 13B | triviaqa | 50.0 [25.0, 75.0] | 9 | {scores['LoRA 13B', 'triviaqa']} |"
    )
    assert scores == {
        ("LoRA 13B", "triviaqa"): 66.0, ("LoRA 13B", "gsm"): 32.4, ("LoRA 70B", "triviaqa"): 75.3,
        ("LoRA 70B", "gsm"): 63.0,
    }, "Table 15, as printed"  # fmt: skip


def test_parameters_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tables.cost, "need_of", lambda spec: SimpleNamespace(weights=600.0))
    assert paper_tables.parameters_of(ModelSpec(model="here", dtype="bfloat16")) == 300.0
    assert paper_tables.parameters_of(ModelSpec(model="here", dtype="float32")) == 150.0
    monkeypatch.setattr(paper_tables.cost, "need_of", lambda spec: SimpleNamespace(weights=None))
    assert paper_tables.parameters_of(ModelSpec(model="away")) is None
    name = "meta-llama/Llama-2-13b-hf"
    assert paper_tables.parameters_of(ModelSpec(model=name)) == paper_tables.cost.PUBLISHED[name][0]
