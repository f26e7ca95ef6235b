"""Small tasks for lm-eval on disk: one to generate, one to choose, one to read, all from the demo's world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GENERATE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], max_gen_toks: 24, do_sample: false}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
READ = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""


def write(folder: Path, name: str, form: str, rows: Sequence[dict[str, Any]]) -> Path:
    """One task in a folder of its own: its YAML, and its data beside it. -> the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(form.format(name=name, file=json.dumps(str(data.resolve()))), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, Any]]:
    """Questions with a number as the answer."""
    return [
        {
            "question": f"Ann has {n + 3} nuts and buys {2 * n + 1}. How many has she?",
            "answer": str(3 * n + 4),
        }
        for n in range(count)
    ]


def choices(count: int) -> list[dict[str, Any]]:
    """Questions with four answers; some of one letter, some longer, some that begin alike."""
    options = (["A", "B", "C", "D"], ["red", "deep red", "deep red and blue", "none of them"])
    return [
        {
            "question": f"Item {n}: which of these is it{'?' * (n % 3)}{' ' * (n % 2)}",
            "choices": options[n % 2],
            "label": n % 4,
        }
        for n in range(count)
    ]


def texts(count: int) -> list[dict[str, Any]]:
    """Texts of different lengths, the last of them longer than the window of the tiny models."""
    return [{"text": f"Text {n} begins. " + "The kettle was boiling again. " * (4 * n)} for n in range(count)]
