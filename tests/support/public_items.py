"""A few harmless items of every task in its public file format, and the settings that keep a run short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import tiny, tiny_system

ITEMS = 10
SHORT = ("--max-new-tokens", "6", "--kv-memory", "64MB")
JUDGED = {"alpaca_farm": "none", "toxigen": "none"}
"""What keeps a task from asking for a judge that is not here."""
HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


def write_system(folder: Path, window: int = tiny_system.WINDOW) -> Path:
    """The tiny system with a vocabulary that holds the strings which the code tasks ban; the YAML's path."""
    words = tiny.tokenizer()
    words.add_tokens(["pass", "...", "</"])
    for seed, role in enumerate(("base", "tuned", "expert", "antiexpert")):
        model = tiny.build("llama", seed=seed, vocab_size=len(words), max_position_embeddings=window)
        tiny.save(folder / role, model, words)
    path = folder / "tiny.yaml"
    path.write_text(tiny_system.YAML)
    return path


def rows(task: str) -> list[dict[str, Any]]:
    """The items of a task."""
    makers = {
        "alpaca_farm": lambda i: {"instruction": f"Name {i} nuts.", "output": "nut " * i, "dataset": "made"},
        "gsm": lambda i: {"question": f"Ann has {i} nuts and finds 3. How many?", "answer": f"#### {i + 3}"},
        "toxigen": lambda i: {"text": f"- {i}\n-", "label": "hate", "target_groups": ["ab"[i % 2]]},
        "humaneval": lambda i: {
            "task_id": f"T/{i}",
            "prompt": f"def f{i}(a):\n",
            "entry_point": f"f{i}",
            "test": f"def check(f):\n    assert f(1) == {i}\n",
        },
        "ds1000": lambda i: {
            "lib": "Numpy",
            "problem_id": i,
            "prompt": f"Problem {i}:\n",
            "reference_code": f"result = {i}",
            "code_context": f"def test_execution(code):\n    space = {{}}\n    exec(code, space)\n"
            f"    assert space['result'] == {i}\n",
            "perturbation_type": "Origin",
        },
        "triviaqa": lambda i: {
            "question": f"Who is {i}?",
            "answers": ["Ann", "Anna"],
            "question_id": f"q{i}",
        },
        "realtimeqa": lambda i: {
            "question_id": f"20230105_{i}",
            "question_sentence": f"Who won {i}?",
            "choices": ["Ann", "Bob", "Cid", "Dan"],
            "answer": [str(i % 4)],
        },
    }
    return [makers[task](i) for i in range(ITEMS)]


def write(task: str, folder: Path) -> Path:
    """A file with the items of a task."""
    if task.startswith("truthfulqa"):
        lines = (f"t,c,Where is {i}?,Rome,Rome; in Rome,Oslo; Bonn; Bern,s\n" for i in range(ITEMS))
        path = folder / f"{task}.csv"
        path.write_text(HEADER + "".join(lines), encoding="utf-8")
        return path
    if task == "alpaca_farm":
        path = folder / "alpaca_eval.json"
        path.write_text(json.dumps(rows(task)), encoding="utf-8")
        return path
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(task)), encoding="utf-8")
    return path
