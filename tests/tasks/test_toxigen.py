"""ToxiGen: the paper's choice of prompts, what roles see, and scores. Texts here are harmless stand-ins."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from proxytune.decoding.prompts import text_for
from proxytune.errors import UserError
from proxytune.intervals import mean_metric
from proxytune.tasks import get_task, read_source, score_file
from proxytune.tasks.toxigen import GROUPS, clean
from tests.support.answers import completions, jsonl

TASK = get_task("toxigen")
LINES = 250


def line(group: str, number: int) -> str:
    """A line of a group file."""
    return f"- {group} one {number}\\n- two\\n-"


def write(folder: Path, packed: bool = False) -> Path:
    """A folder with a file per group."""
    folder.mkdir()
    for group in GROUPS:
        content = "".join(f"{line(group, number)}\n" for number in range(LINES)).encode()
        path = folder / f"hate_{group}_1k.txt"
        if packed:
            path = path.with_name(path.name + ".gz")
            content = gzip.compress(content)
        path.write_bytes(content)
    return folder


def test_one_generator_goes_through_the_groups_in_the_papers_order(tmp_path: Path) -> None:
    data = read_source(TASK, str(write(tmp_path / "prompts")))
    rng, expected = random.Random(42), []
    for group in GROUPS:
        lines = [line(group, number) for number in range(LINES)]
        rng.shuffle(lines)
        expected += [text.replace("\\n", "\n") for text in lines[:200]]
    assert [example.target["text"] for example in data.examples] == expected
    assert [example.target["target_groups"] for example in data.examples[::200]] == [[g] for g in GROUPS]
    assert data.examples == read_source(TASK, str(write(tmp_path / "packed", packed=True))).examples
    assert read_source(TASK, str(tmp_path / "prompts"), 3).examples == data.examples[:3]


def test_the_papers_2800_prompts(reference: Path) -> None:
    folder = reference / "data" / "toxigen"
    data = read_source(TASK, str(folder))
    with gzip.open(folder / "paper_subset_2800.jsonl.gz", "rt", encoding="utf-8") as file:
        stored = [json.loads(row) for row in file]
    assert [example.target for example in data.examples] == stored and len(stored) == 2800
    again = read_source(TASK, str(folder / "paper_subset_2800.jsonl.gz"))
    assert again.examples == data.examples and again.sha256 == data.sha256


def test_one_file_and_stored_rows_can_be_asked(tmp_path: Path) -> None:
    folder = write(tmp_path / "prompts")
    one = read_source(TASK, str(folder / "hate_asian_1k.txt")).examples
    assert len(one) == 200 and one[0].target["target_groups"] == ["asian"]
    neutral = (folder / "hate_asian_1k.txt").rename(folder / "neutral_asian_1k.txt")
    assert read_source(TASK, str(neutral)).examples[0].target["label"] == "neutral"
    with pytest.raises(UserError, match=r"has no hate_asian_1k\.txt"):
        read_source(TASK, str(folder))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\\\\\\\n"}\n')
    with pytest.raises(UserError, match="line 1: `target_groups` must be a list with one group"):
        read_source(TASK, str(path))


def test_rows_saved_from_the_hub_are_read_as_the_lists_are(tmp_path: Path) -> None:
    """One file per split in a folder, or all splits in one file with the name of each."""
    folder, saved = write(tmp_path / "prompts"), tmp_path / "saved"
    saved.mkdir()
    named = []
    for group in GROUPS:
        lines = (folder / f"hate_{group}_1k.txt").read_text(encoding="utf-8").splitlines()
        jsonl(saved / f"hate_{group}_1k.jsonl", [{"text": line} for line in lines])
        named += [{"text": line, "split": f"hate_{group}_1k"} for line in lines]
    lists = read_source(TASK, str(folder))
    assert read_source(TASK, str(saved)).sha256 == lists.sha256
    assert read_source(TASK, str(jsonl(tmp_path / "all.jsonl", named))).sha256 == lists.sha256
    with pytest.raises(UserError, match=r"line 1: `target_groups` must be .*, or `split` the name of a file"):
        read_source(TASK, str(jsonl(tmp_path / "bare.jsonl", [{"text": "a"}])))


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder with the hub's splits and column stands for the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    (hub / "prompts").mkdir(parents=True)
    for group in GROUPS:
        rows = [{"text": line(group, number)} for number in range(LINES)]
        name = f"hate_{group}_1k"
        datasets.Dataset.from_list(rows).to_parquet(hub / "prompts" / f"{name}-00000-of-00001.parquet")
    parts = "".join(
        f"  - split: hate_{g}_1k\n    path: prompts/hate_{g}_1k-00000-of-00001.parquet\n" for g in GROUPS
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: prompts\n  data_files:\n{parts}---\n")
    assert TASK.hub is not None
    local = replace(TASK, hub=replace(TASK.hub, id=str(hub)))
    assert read_source(local, "hub").examples == read_source(TASK, str(write(tmp_path / "files"))).examples


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [("  - a\\n- b\\n- \n", "- a\n- b\n-"), ("a\\\\n- b", "a\n- b"), ("say \\\\'no\\\\'", "say \\'no\\'")],
)
def test_lines_are_cleaned_in_the_papers_order(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_what_the_roles_see(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "- a\n-", "label": "hate", "target_groups": ["x"]}))
    prompt = read_source(TASK, str(path)).examples[0].prompt
    assert prompt.plain == "- a\n-" == text_for("none", "direct", prompt)
    assert text_for("llama2", "direct", prompt) == "[INST] Complete the following: - a\n- [/INST]"
    assert text_for("llama2", "in_ensemble", prompt) == "[INST] - a\n- [/INST]"


def test_rows_keep_leading_spaces_and_end_at_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "- a\n-", "label": "hate", "target_groups": ["x"]}))
    example = read_source(TASK, str(path)).examples[0]
    row = TASK.row(example, completions("  so \nmore"))
    assert row == {"text": "- a\n-", "label": "hate", "target_groups": ["x"], "prediction": "  so "}
    assert TASK.sampling.stop == ("\n",) and TASK.sampling.max_new_tokens == 512


def test_rates_by_group_then_overall(tmp_path: Path) -> None:
    flags = [("b", 1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    rows = [{"target_groups": [g], "prediction": "p", "is_toxic": flag} for g, flag in flags]
    metrics = TASK.metrics(rows)
    assert {name: metric.value for name, metric in metrics.items()} == {"b": 2 / 3, "a": 0.5, "overall": 0.6}
    assert list(metrics) == ["b", "a", "overall"] and TASK.headline_of(metrics) == "overall"
    assert metrics["overall"] == mean_metric([1, 0, 0, 1, 1])


def test_what_is_not_judged_is_never_called_harmless(tmp_path: Path) -> None:
    rows = [{"target_groups": ["a"], "prediction": "p"} for _ in range(4)]
    metrics = TASK.metrics(rows)
    assert {n: m.value for n, m in metrics.items()} == {"unjudged": 1} and TASK.headline_of(
        metrics
    ) == "unjudged"
    metrics = TASK.metrics([{**rows[0], "is_toxic": 1}, *rows[1:]])
    assert {n: m.value for n, m in metrics.items()} == {"a": 1, "overall": 1, "unjudged": 0.75}
    assert {name: metric.n for name, metric in metrics.items()} == {"a": 1, "overall": 1, "unjudged": 4}
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="line 1: no field 'prediction'"):
        score_file(TASK, path)
