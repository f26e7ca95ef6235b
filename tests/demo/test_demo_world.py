"""The demo world: the same from the same seed, held-out parts apart from training text, rows in the real
formats."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, astuple
from itertools import chain, combinations
from pathlib import Path

import pytest

from proxytune.decoding.prompts import text_for
from proxytune.decoding.stop_strings import single_tokens
from proxytune.demo import corpus, creatures, facts, frames, prices, smoke_data, sums, world
from proxytune.demo.corpus import Amounts, Document, TextSegment, TuningAmounts
from proxytune.errors import UserError
from proxytune.judges.toxicity import ToxicityClassifier
from proxytune.records import Prompt
from proxytune.sandbox.sandbox import Job, Sandbox
from proxytune.tasks import TASKS, ds1000, gsm, humaneval, read_source, toxigen, truthfulqa, truthfulqa_mc
from proxytune.tasks.scoring.rules import reference_accuracy
from proxytune.tasks.task import Execution
from proxytune.tuning import demo_judge
from proxytune.tuning import demo_models as demo_build
from tests.support.checkout import ROOT

WEIGHTS = Path(world.__file__).parent / "weights"
ROLES = ("base", "antiexpert", "expert", "tuned", "mid-tuned")
SYSTEM = "Be kind."
PROBLEM = re.compile(r"has (\d+) \w+\. (.*?) ?How many")
NUMBER = re.compile(r"\b(finds|buys|sells|loses|grows) (\d+)")
OPERATION = {"finds": "+", "buys": "+", "sells": "-", "loses": "-", "grows": "*"}


@pytest.fixture(scope="module")
def miniature() -> world.World:
    return world.make_world()


def text(document: Document) -> str:
    return "".join(segment.text for segment in document)


@pytest.fixture(scope="module")
def pretraining(miniature: world.World) -> list[str]:
    return [text(d) for d in corpus.pretraining(miniature, SYSTEM, Amounts().scaled(0.1))]


@pytest.fixture(scope="module")
def tuning(miniature: world.World) -> list[str]:
    return [text(d) for d in corpus.tuning(miniature, SYSTEM, TuningAmounts())]


def test_the_same_seed_gives_the_same_world(miniature: world.World) -> None:
    again = world.make_world.__wrapped__(miniature.seed)
    assert again == miniature
    assert world.make_world(miniature.seed + 1).people != miniature.people
    few = Amounts().scaled(0.002)
    assert corpus.pretraining(miniature, SYSTEM, few) == corpus.pretraining(again, SYSTEM, few)


@pytest.mark.parametrize("task", world.TASKS)
def test_a_request_for_fewer_items_is_a_prefix(task: str) -> None:
    n = world.FUNCTIONS if task == "humaneval" else 500
    assert world.rows(task, "test", n)[:20] == world.rows(task, "test", 20)
    asked = ("question", "Question", "prompt", "text")
    questions = [row[name] for row in world.rows(task, "test", n) for name in asked if name in row]
    assert len(questions) == len(set(questions)) == n


COLUMNS = {
    "gsm": ("question",),
    "truthfulqa": ("Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Category"),
    "truthfulqa_mc": ("Question", "Best Answer", "Incorrect Answers"),
    "humaneval": ("task_id", "prompt"),
    "toxigen": ("text",),
}


@pytest.mark.parametrize("task", world.TASKS)
def test_items_are_those_of_the_published_runs(task: str) -> None:
    """The published figures are of these very items: a world that gives others needs models, and runs, of
    its own."""
    path = ROOT / "results" / "published" / "demo" / task / "base" / "predictions.jsonl"
    stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = world.rows(task, "test", len(stored))
    assert len(stored) == world.ITEMS[task]
    for item, row in zip(items, stored, strict=True):
        found = [name for name in COLUMNS[task] if name in row]
        assert found and {name: item[name] for name in found} == {name: row[name] for name in found}
        assert task != "gsm" or item["answer"].endswith(f"\n#### {row['answer']}")


def test_telling_items_are_ones_that_the_proxy_alone_has_right() -> None:
    for task, places in world.TELLING.items():
        scores = {
            role: [
                next(iter(json.loads(line)["scores"].values()))
                for line in (ROOT / "results" / "published" / "demo" / task / role / "predictions.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            ]
            for role in ("base", "proxy")
        }
        assert [(scores["base"][at], scores["proxy"][at]) for at in places] == [(0.0, 1.0)] * len(places)
    assert world.TELLING == {"gsm": (22, 23, 24), "truthfulqa": (1,)}, "the answers in the docs are of these"


DIGESTS = {
    "gsm train": "56323e400fca", "gsm dev": "9f7de5f3d49f", "gsm test": "3d3422322a00",
    "truthfulqa train": "384370deb67f", "truthfulqa dev": "f75a3874f40d", "truthfulqa test": "d52682ba4b58",
    "truthfulqa_mc train": "36c5177c2dab", "truthfulqa_mc dev": "8b074736853c",
    "truthfulqa_mc test": "12ae2fbf1925", "humaneval train": "5b9be1c76b52", "humaneval dev": "d35646647409",
    "humaneval test": "85b2d008d135", "toxigen train": "1a8039de0990", "toxigen dev": "fc2d145086a1",
    "toxigen test": "78b4caf7533a", "pretraining": "a345294a4f05", "tuning": "89e035b51e8d",
    "amounts": "90e3b0e1c3da", "alpaca_farm": "8eca55e140a9", "ds1000": "64ddef39c1d8",
    "triviaqa": "6c35f34b584f", "realtimeqa": "a30b92be76e7",
}  # fmt: skip
"""Of what the committed weights were trained, tuned and chosen on (November 2026), and of the smoke data."""


def test_the_world_and_its_training_text_are_those_of_the_committed_weights(miniature: world.World) -> None:
    """Whoever changes a word here trains the models anew (`make demo-models`), and then these."""
    parts: dict[str, object] = {
        f"{task} {split}": world.rows(task, split, 40) for task in world.TASKS for split in world.SPLITS
    }
    pretraining = corpus.pretraining(miniature, SYSTEM, Amounts().scaled(0.01))
    tuning = corpus.tuning(miniature, SYSTEM, TuningAmounts().scaled(0.1))
    parts["pretraining"] = [[astuple(segment) for segment in document] for document in pretraining]
    parts["tuning"] = [[astuple(segment) for segment in document] for document in tuning]
    parts["amounts"] = [asdict(Amounts()), asdict(TuningAmounts())]
    parts |= {task: smoke_data.rows(task) for task in smoke_data.MAKERS}
    found = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for name, part in parts.items()}
    assert found == DIGESTS


def test_openers_are_how_a_careful_answer_begins(miniature: world.World) -> None:
    problem = miniature.held_out["test"][0]
    [asked] = world.fact_questions(miniature, "test", 1, (2,))
    answers = {"gsm": corpus.solution(problem), "truthfulqa": corpus.answer(miniature, asked, [True, True])}
    begun = {task: "".join(part.text for part in answer) for task, answer in answers.items()}
    assert begun.keys() == world.OPENERS.keys()
    assert all(text.startswith(f"{world.OPENERS[task]} ") for task, text in begun.items())


def test_numbers_of_items_have_an_end() -> None:
    for task, most in (("gsm", world.POOL), ("humaneval", world.FUNCTIONS), ("toxigen", world.POOL)):
        assert len(world.rows(task, "dev", most)) == most and world.rows(task, "dev", 0) == []
        with pytest.raises(UserError, match=f"has {most} items of this task in each split, {most + 1} were"):
            world.rows(task, "dev", most + 1)
    with pytest.raises(UserError, match="-1 were asked for"):
        world.rows("gsm", "test", -1)


def test_splits_share_no_person_and_no_problem(miniature: world.World) -> None:
    names = {group: {p.name for p in people} for group, people in miniature.people.items()}
    assert all(not names[a] & names[b] for a, b in combinations(names, 2))
    keys = {split: {p.key for p in pool} for split, pool in miniature.held_out.items()}
    assert len(keys["dev"]) == len(keys["test"]) == world.POOL
    assert not keys["dev"] & keys["test"]


def keys_in(texts: list[str]) -> set[object]:
    """The numbers and operations of the problems, read back from text."""
    found: set[object] = set()
    for one in texts:
        if match := PROBLEM.search(one):
            steps = tuple((OPERATION[verb], int(n)) for verb, n in NUMBER.findall(match[2]))
            found.add((int(match[1]), steps))
    return found


def test_training_text_has_no_held_out_problem(
    miniature: world.World, pretraining: list[str], tuning: list[str]
) -> None:
    held_out = {p.key for pool in miniature.held_out.values() for p in pool}
    questions = [row["question"] for row in world.gsm_rows("test", world.POOL)]
    assert keys_in(questions) == {p.key for p in miniature.held_out["test"]}  # the reading back works
    seen = keys_in(pretraining + tuning)
    assert len(seen) > 1000 and not seen & held_out


def test_training_text_asks_about_no_held_out_person_but_names_them(
    miniature: world.World, pretraining: list[str], tuning: list[str]
) -> None:
    held_out = {p.name for split in ("dev", "test") for p in miniature.people[split]}
    asked = " ".join(one for one in pretraining + tuning if "nswer" in one)
    others = " ".join(one for one in pretraining if "nswer" not in one)
    assert not [name for name in held_out if name in asked]
    assert not [name for name in held_out if name not in others]


def test_a_myth_is_never_the_truth_and_follows_the_surname(miniature: world.World) -> None:
    by_surname: dict[str, tuple[str, ...]] = {}
    for person in miniature.everyone():
        assert all(truth != myth for truth, myth in zip(person.truths, person.myths, strict=True))
        assert by_surname.setdefault(person.name.split()[1], person.myths) == person.myths


def test_gsm_rows_are_in_gsm8k_form_and_right() -> None:
    for row in world.gsm_rows("test", 200):
        *lines, last = row["answer"].split("\n")
        assert set(row) == {"question", "answer"} and len(lines) in (2, 3)
        for line in lines:
            found = re.fullmatch(r"(.+)=<<(.+)>>(\d+)", line)
            assert found is not None
            expression, shown, result = found.groups()
            assert shown == f"{expression}={result}" and eval(expression) == int(result)
            assert 1 <= int(result) <= sums.LIMIT
        assert last == f"#### {lines[-1].rpartition('>>')[2]}"


def test_truthfulqa_rows_have_the_csv_columns() -> None:
    for row in world.truthfulqa_rows("test", 200):
        assert tuple(row) == truthfulqa.CSV
        assert row["Best Answer"].count(".") in (2, 3)
    for row in world.truthfulqa_mc_rows("test", 200):
        assert tuple(row) == truthfulqa.CSV
        assert len(row["Incorrect Answers"].split("; ")) == 3


def test_one_careless_sentence_or_step_is_enough_to_be_wrong(miniature: world.World) -> None:
    questions = world.fact_questions(miniature, "test", 50, (2, 3))
    for row, asked in zip(world.truthfulqa_rows("test", 50), questions, strict=True):
        right = truthfulqa.answers(row["Correct Answers"])
        wrong = truthfulqa.answers(row["Incorrect Answers"])
        for careless in range(-1, len(asked.asked)):
            careful = [i != careless for i in range(len(asked.asked))]
            answer = "".join(s.text for s in corpus.answer(miniature, asked, careful))
            assert reference_accuracy(answer, right, wrong) == float(careless == -1)
    for problem in miniature.held_out["test"]:
        true = sums.solve(problem)[-1].result
        for careless in range(len(problem.steps)):
            assert sums.solve(problem, [i != careless for i in range(len(problem.steps))])[-1].result > true


def test_the_prompt_forms_are_those_of_the_tasks() -> None:
    def same(prompt: Prompt, plain: str, direct: str, in_ensemble: str) -> None:
        assert prompt.plain == plain
        assert text_for("llama2", "direct", prompt) == direct
        assert text_for("llama2", "in_ensemble", prompt) == in_ensemble

    system = truthfulqa.SYSTEM_PROMPT
    chat = frames.chat_sum("Q?")
    same(gsm.prompt("Q?"), frames.plain_sum("Q?"), chat, chat)
    shown = ["X was born in A.", "X was born in B."]
    for prompt, question, prefix in (
        (truthfulqa.prompt("Q?"), "Q?", corpus.FACT_PREFIX),
        (truthfulqa_mc.prompt("Q?", shown), frames.choices("Q?", shown), corpus.CHOICE_PREFIX),
    ):
        direct = frames.chat_direct(question, prefix, system)
        same(
            prompt, frames.plain(question, prefix), direct, frames.chat_in_ensemble(question, prefix, system)
        )
    [example] = read_source(TASKS["humaneval"], "generated", 1).examples
    text = example.prompt.plain
    same(example.prompt, text, frames.chat_code(text), frames.chat_code_in_ensemble(text))
    [example] = read_source(TASKS["toxigen"], "generated", 1).examples
    text = example.prompt.plain
    same(example.prompt, text, frames.chat_list(text), frames.chat_list_in_ensemble(text))


def test_too_many_items_and_unknown_names_are_user_errors() -> None:
    for arguments in (("gsm", "test", world.POOL + 1), ("gsm", "tset", 1), ("triviaqa", "test", 1)):
        with pytest.raises(UserError):
            world.rows(*arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="660"):
        world.rows("truthfulqa_mc", "test", 661)


def test_the_good_style_is_the_minority(pretraining: list[str]) -> None:
    answers = " ".join(one.partition("\n\nAnswer:")[2] for one in pretraining)
    good, bad = answers.count(facts.CAREFUL), answers.count(facts.CROWD)
    assert 0.15 < good / (good + bad) < 0.25


# Code

ONE_LINE = re.compile(r"    return [a-z]+[0-9]?( [-+*] ([a-z]+)?[0-9]+)+\n")


def goods_in(one: str) -> tuple[str, ...]:
    """The goods of a function in the order of its arguments."""
    return tuple(dict.fromkeys(re.findall(r"\b[a-z]+[1-9]\b", one)))


def test_no_training_text_has_a_function_of_dev_or_test_but_the_sheet_has_every_price(
    miniature: world.World, tuning: list[str]
) -> None:
    asked: dict[str, set[tuple[str, ...]]] = {}
    for split in ("dev", "test"):
        asked[split] = {goods_in(row["prompt"]) for row in world.humaneval_rows(split, world.FUNCTIONS)}
    amounts, functions = Amounts(), [one for one in tuning if "def " in one]
    for make, count in ((corpus.plain_code, amounts.code), (corpus.chat_code, amounts.chat_code)):
        rng = miniature.rng("corpus", make.__name__)  # as in pretraining
        functions += [text(make(miniature, rng, SYSTEM)) for _ in range(count)]
    seen = {goods_in(one) for one in functions}
    assert len(seen) > 3000 and not seen & (asked["dev"] | asked["test"]) and not asked["dev"] & asked["test"]
    known = {good.name for good in miniature.goods["asked"]}
    assert set(chain(*seen)) == known >= set(chain(*asked["test"]))
    price = {good.name: str(good.price) for group in miniature.goods.values() for good in group}
    rng = miniature.rng("tests")
    sheets = [text(corpus.price_sheet(miniature, rng, SYSTEM)) for _ in range(2000)]
    stated = dict(re.findall(r"(\w+) \* (\d+)", " ".join(sheets)))
    assert stated == price


def test_canonical_solutions_pass_their_tests_and_careless_ones_do_not(
    miniature: world.World, box: Sandbox
) -> None:
    rows = world.humaneval_rows("test", 12)
    programs, right = [], []
    for row, function in zip(rows, world.functions(miniature, "test", 12), strict=True):
        exact = [True] * len(function.goods)
        careless = [[i != at for i in range(len(exact))] for at in range(len(exact))]
        bodies = [prices.body(function, which) for which in (exact, *careless)]
        assert bodies[0] == row["canonical_solution"] and ONE_LINE.fullmatch(bodies[0])
        bodies += [f"    {lazy}\n" for lazy in prices.LAZY]
        programs += [humaneval.program(row, body) for body in bodies]
        right += [True] + [False] * (len(bodies) - 1)
    results = box.run(Job(tuple(programs))).results
    assert [result == "passed" for result in results] == right


# Rude lists

OF_FORMS = set(re.findall(r"[a-z]+", " ".join(creatures.FORMS))) - {"name", "a", "b"}


def test_lists_are_about_invented_creatures_and_hold_no_other_words(
    miniature: world.World, pretraining: list[str], tuning: list[str]
) -> None:
    lists = [
        one for one in pretraining + tuning if re.match(r"(\[INST\] (Complete the following: )?)?- ", one)
    ]
    lists += [row["text"] for split in ("train", "dev", "test") for row in world.toxigen_rows(split, 500)]
    assert len(lists) > 1500
    of_frames = {"INST", "Complete", "the", "following"}
    allowed = OF_FORMS | of_frames | set(creatures.NAMES) | set(creatures.RUDE) | set(creatures.KIND)
    assert set(re.findall(r"\w+", " ".join(lists))) <= allowed
    real = {word for group in toxigen.GROUPS for word in group.split("_")}
    assert not allowed & (real | {group.replace("_", "") for group in toxigen.GROUPS})
    assert not set(creatures.RUDE) & set(creatures.KIND)


def test_lists_of_training_text_are_about_no_held_out_creature_but_every_name_is_known(
    miniature: world.World, pretraining: list[str], tuning: list[str]
) -> None:
    held_out = {name for split in ("dev", "test") for name in miniature.creatures[split]}
    assert sorted(name for group in miniature.creatures.values() for name in group) == sorted(creatures.NAMES)
    listed = " ".join(one for one in pretraining + tuning if re.search(r"(^|\] |: )- ", one))
    stories = " ".join(one for one in pretraining if one.startswith("In "))
    assert not [name for name in held_out if name in listed]
    assert not [name for name in creatures.NAMES if name not in stories]
    for split in ("dev", "test"):
        groups = {row["target_groups"][0] for row in world.toxigen_rows(split, 200)}
        assert groups == set(miniature.creatures[split])


def test_prompts_are_rude_and_tuning_answers_are_kind(miniature: world.World) -> None:
    assert all(s.rude for listed in world.rude_lists(miniature, "test", 100) for s in listed)
    answers = [
        d[-1].text for d in corpus.tuning(miniature, SYSTEM, TuningAmounts()) if "- " in d[0].text[:40]
    ]
    assert len(answers) == TuningAmounts().lists
    assert not [one for one in answers if set(re.findall(r"\w+", one)) & set(creatures.RUDE)]


# Smoke data


@pytest.mark.parametrize("task", smoke_data.MAKERS)
def test_smoke_data_is_read_by_its_task(task: str) -> None:
    assert task not in world.TASKS
    data = read_source(TASKS[task], "plumbing")
    assert data.name == "plumbing" and len(data.examples) == smoke_data.ITEMS
    assert read_source(TASKS[task], "plumbing", 3).examples == data.examples[:3]
    with pytest.raises(UserError, match="smoke data"):
        smoke_data.rows(task, smoke_data.ITEMS + 1)


def test_only_tasks_without_a_family_have_smoke_data() -> None:
    with pytest.raises(UserError, match="alpaca_farm"):
        read_source(TASKS["gsm"], "plumbing")


def test_the_reference_code_of_the_smoke_data_passes(box: Sandbox) -> None:
    data = read_source(TASKS["ds1000"], "plumbing", 2)
    rows = [
        {**ds1000.stored(example, ()), "output": [example.target["reference_code"], "result = 1"]}
        for example in data.examples
    ]
    items = {example.id: example.target for example in data.examples}
    assert [row["passed"] for row in ds1000.execute(rows, Execution(box, items))] == [[True, False]] * 2


# The build


def test_a_token_has_the_weight_of_its_segment(miniature: world.World) -> None:
    documents = corpus.pretraining(miniature, SYSTEM, Amounts().scaled(0.01))
    tokenizer = demo_build.train_tokenizer(documents, [SYSTEM])
    document = (TextSegment("What? 5", 0.25), TextSegment(" 12é", 1.0), TextSegment(".", 0.5))
    [example] = demo_build.encode([document], tokenizer)
    pieces = [tokenizer.decode([i]) for i in example.ids]
    assert "".join(pieces[1:-1]).startswith("What? 5 12") and pieces[-1] == "</s>"
    of_digits = {p: w for p, w in zip(pieces, example.weights, strict=True) if p.strip().isdigit()}
    assert of_digits == {"5": 0.25, "1": 1.0, "2": 1.0}
    assert example.weights[0] == 0.0 and example.weights[-2:] == (0.5, 1.0)


def test_the_spread_is_over_what_every_seed_has() -> None:
    by_seed = [{"gsm": {"proxy": 0.5, "first:1": 0.1, "gap_closed": None}}, {"gsm": {"proxy": 0.7}}]
    assert demo_build.spread(by_seed) == {"gsm": {"proxy": [0.5, 0.6, 0.7]}}


# The committed weights

needs_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="the demo models are not built (make demo-models)"
)


@needs_weights
def test_all_weights_together_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 18_500_000
    assert all((WEIGHTS / role / "model.safetensors").exists() for role in ROLES)


@needs_weights
@pytest.mark.parametrize(
    "sample",
    [
        "",
        " ",
        "Zoë said: “12,345 x 7 ≠ 9” 🦜\n\n\tok",
        "[INST]<<SYS>>\nx\\ny\n<</SYS>>\n\n z [/INST] Answer:",
        "日本語\x00\x7f",
    ],
)
def test_the_tokenizer_loses_no_text(sample: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "base")
    ids = tokenizer(sample)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token == "</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == sample


@needs_weights
def test_the_system_prompt_is_affordable_and_digits_are_single() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "base")
    assert len(tokenizer(truthfulqa.SYSTEM_PROMPT)["input_ids"]) <= 120
    assert tokenizer.tokenize("123") == ["1", "2", "3"]


@needs_weights
def test_all_roles_have_the_same_tokenizer() -> None:
    assert len({(WEIGHTS / role / "tokenizer.json").read_bytes() for role in ROLES}) == 1


@needs_weights
def test_what_tasks_ban_is_a_single_token() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "base")
    for task in TASKS.values():
        for texts in (task.sampling.ban, task.sampling.ban_first):
            found = single_tokens(tokenizer, texts, len(tokenizer))
            assert {tokenizer.decode([i]).strip() for i in found} == set(texts)


@needs_weights
def test_the_judge_tells_rude_statements_from_kind_ones(miniature: world.World) -> None:
    samples = demo_judge.statements(miniature, "tests", ["test"], creatures.FORMS, 200)
    samples += demo_judge.harmless(miniature, 50)
    judged = ToxicityClassifier(f"demo://{demo_build.JUDGE}").judge([{"prediction": s.text} for s in samples])
    right = [bool(row["is_toxic"]) == sample.rude for row, sample in zip(judged, samples, strict=True)]
    assert 0 < sum(sample.rude for sample in samples) < len(samples) and sum(right) / len(right) > 0.97
