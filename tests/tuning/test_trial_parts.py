"""The parts of the trials, on figures that are worked out by hand: nothing is tuned here."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from proxytune.config import ModelSpec, load_system
from proxytune.demo import corpus, world
from proxytune.errors import UserError
from proxytune.records import Completion, Metric
from proxytune.tuning import demo_models
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
        and given["--data"] == "triviaqa:t.json"
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


# The demo's trainings


def test_where_a_training_of_the_demo_is_and_what_it_is_told(tmp_path: Path) -> None:
    case = demo.CASES["lora through base"]
    assert case.folder(tmp_path, demo.SMALL, 3e-3, 2) == (
        tmp_path / "trained" / "lora-through-base-antiexpert-0.003-seed-2"
    )
    told = case.options(tmp_path / "d.jsonl", 3e-3, 2)
    assert told == TuneOptions(
        data=str(tmp_path / "d.jsonl"), learning_rate=3e-3, seed=2, batch=8, epochs=1.0, warmup=0.1,
        base="demo://base", rank=16, through="base",
    )  # fmt: skip
    assert demo.CASES["p-tuning"].options(Path("d"), 1.0, 0).epochs == 8.0
    assert {name: one.measured_as for name, one in demo.CASES.items()} == {
        name: "proxy" if name == "lora through base" else "expert" for name in demo.CASES
    }


def test_the_systems_of_the_demo_s_trainings() -> None:
    small = ModelSpec(model="demo://antiexpert", dtype="float32", quantization="4bit")
    for result in ("adapter", "weights"):
        record: Any = SimpleNamespace(result=result, antiexpert=small)
        steered, large = demo.demo_system("n", record, Path("f")), demo.large_system("n", Path("f"), record)
        assert steered.antiexpert == small and steered.base == large.base
        assert large.base == ModelSpec(model="demo://base", dtype="float32")
        assert steered.judges == large.judges == {"truthfulqa": "none"}
        if result == "adapter":
            assert steered.expert == ModelSpec(adapter="f", chat="llama2")
            assert large.tuned == small.model_copy(update={"adapter": "f", "chat": "llama2"})
        else:
            assert steered.expert == large.tuned == ModelSpec(model="f", dtype="float32", chat="llama2")


def test_examples_of_the_demo_s_trainings_are_prompts_and_what_is_learned(tmp_path: Path) -> None:
    path = demo.write_examples(tmp_path / "x")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 240 and all(row["prompt"].startswith("[INST] ") for row in rows)
    sums, told = rows[0], rows[120]
    assert sums["prompt"].endswith("[/INST] Answer:") and sums["completion"].startswith(" Exactly ")
    assert "<<SYS>>" in told["prompt"] and told["completion"].startswith(" The almanac says")
    path.write_text("kept")
    assert demo.write_examples(tmp_path / "x").read_text() == "kept"
    dev = demo.write_dev(tmp_path / "y", 3)
    assert {task: len(file.read_text().splitlines()) for task, file in dev.items()} == {
        "gsm": 3, "truthfulqa": 3,
    }  # fmt: skip
    assert json.loads(dev["gsm"].read_text().splitlines()[0]) == world.rows("gsm", "dev", 1)[0]


# The build of the demo's models


def test_the_build_is_that_of_the_committed_weights() -> None:
    """What demo_build.json says of them; a change here needs them trained anew."""
    built = json.loads((demo_models.WEIGHTS / "demo_build.json").read_text())
    assert built["pretraining"] == {
        "documents": asdict(corpus.Amounts()), **demo_models.PRETRAINING.model_dump(),
    }  # fmt: skip
    assert built["tuning"] == {
        "examples": asdict(corpus.TuningAmounts()), "rate": demo_models.TUNING_RATE,
        **demo_models.TUNING.model_dump(exclude={"seed"}),
    }  # fmt: skip
    assert built["spread"] == demo_models.spread(built["by_tuning_seed"]) and built["split"] == "dev"
    assert len(built["by_tuning_seed"]) == len(demo_models.TUNING_SEEDS)
    first = next(iter(built["by_tuning_seed"][0].values()))
    assert {f"proxy alpha={alpha}" for alpha in demo_models.VARIANTS} <= first.keys()


@pytest.mark.parametrize("name", ["base", "antiexpert", "expert", "tuned", "mid-tuned"])
def test_the_shapes_are_those_of_the_committed_weights(name: str) -> None:
    shape = demo_models.SHAPES[demo_models.TUNED.get(name, name)]
    words = AutoTokenizer.from_pretrained(demo_models.WEIGHTS / name)
    with torch.device("meta"):
        made = demo_models.new_model(shape, words).config.to_dict()
    stored = json.loads((demo_models.WEIGHTS / name / "config.json").read_text())
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    assert {key: made[key] for key in names} == {key: stored[key] for key in names}
    assert words.model_max_length == demo_models.CONTEXT == stored["max_position_embeddings"]
    assert (words.bos_token, words.eos_token, words.pad_token) == (
        demo_models.BOS, demo_models.EOS, demo_models.PAD,
    )  # fmt: skip


def test_the_system_of_a_build_and_what_can_be_measured() -> None:
    made = demo_models.system_in(Path("p"), Path("t"))
    found = {role: getattr(made, role) for role in made.roles if role != "proxy"}
    assert {role: (spec.model, spec.chat) for role, spec in found.items()} == {
        "base": (str(Path("p/base")), "none"), "antiexpert": (str(Path("p/antiexpert")), "none"),
        "expert": (str(Path("t/expert")), "llama2"), "tuned": (str(Path("t/tuned")), "llama2"),
    }  # fmt: skip
    assert made.judges == {"toxigen": str(Path("p") / demo_models.JUDGE)}
    box: Any = object()
    assert "humaneval" not in demo_models.Measuring(1, Path(), None).tasks
    assert demo_models.Measuring(1, Path(), box).tasks == world.TASKS
    seeds: list[Any] = [
        {"gsm": {"a": 0.5, "b": 0.0}},
        {"gsm": {"a": 0.25, "b": None}},
        {"gsm": {"a": 0.75, "b": 1.0}},
    ]
    assert demo_models.spread(seeds) == {"gsm": {"a": [0.25, 0.5, 0.75]}}
    for text in ("pass", " pass"):
        assert text in demo_models.banned_texts()
