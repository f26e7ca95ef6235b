"""lm-eval's files of results as runs of ours: every field, of a file that is written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.errors import UserError
from proxytune.options import DecodeOptions
from proxytune.records import Metric
from proxytune.results import read_rows, read_run
from tests.support.require import require_or_skip

try:
    from proxytune.integrations import lm_eval_runs
    from proxytune.integrations.lm_eval_requests import names_of, prefix_of, sampling_of
    from proxytune.integrations.lm_eval_system import ModelArguments, SystemLM
except ImportError:
    require_or_skip("lm-eval", "lm-eval is not installed")

STAMP = "2026-11-30T01-02-03.456"
SYSTEM = {"name": "tiny", "base": {"model": "b"}, "expert": {"model": "e"}, "antiexpert": {"model": "a"}}


def content(**more: Any) -> dict[str, Any]:
    """A file of results of two documents of one task that generates."""
    made: dict[str, Any] = {
        "configs": {"sums": {
            "output_type": "generate_until", "dataset_path": "here/sums",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 7, "do_sample": False},
        }},
        "config": {"proxytune": {
            "system": SYSTEM, "role": "proxy", "alpha": "0.5", "notes": ["noted"],
            "cost": {"seconds": 2.5, "generated_tokens": 14},
        }},
        "n-samples": {"sums": {"original": 9, "effective": 2}}, "n-shot": {"sums": 3},
        "results": {"sums": {
            "alias": "sums", "exact_match,none": 0.5, "exact_match_stderr,none": 0.5,
            "exact_match,loose": 1.0, "length,none": 12.5, "bad,none": float("nan"), "name": 3,
        }},
        "date": 1795860000.0, "total_evaluation_time_seconds": "61.7", "lm_eval_version": "0.4.9",
        "system_instruction": None, "chat_template": None, "fewshot_as_multiturn": False,
    }  # fmt: skip
    return {**made, **more}


def sample(document: int, chain: str, score: float, **more: Any) -> dict[str, Any]:
    """What lm-eval stores of a document under a chain of filters."""
    return {
        "doc_id": document, "doc_hash": f"hash {document}", "filter": chain, "target": "5",
        "arguments": {"gen_args_0": {"arg_0": f"Q{document}", "arg_1": {"until": ["\n"]}}},
        "resps": [[f"said {document}"]], "filtered_resps": [f"filtered {document} {chain}"],
        "metrics": ["exact_match"], "exact_match": score, **more,
    }  # fmt: skip


ROWS = [sample(0, "none", 1.0), sample(0, "loose", 1.0), sample(1, "none", 0.0), sample(1, "loose", 1.0)]


def written(folder: Path, rows: list[dict[str, Any]] = ROWS, task: str = "sums", **more: Any) -> Path:
    """The files as lm-eval writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"samples_{task}_{STAMP}.jsonl").write_text(lines)
    path = folder / f"results_{STAMP}.json"
    path.write_text(json.dumps(content(**more)))
    return path


def evaluated(**more: Any) -> Any:
    """The task of a file."""
    rows: list[dict[str, Any]] = more.pop("rows", ROWS)
    by_document: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], {})[row["filter"]] = row
    return lm_eval_runs._Evaluated("sums", content(**more), by_document)


def test_every_field_of_a_run(tmp_path: Path) -> None:
    [folder] = lm_eval_runs.write_runs(written(tmp_path / "files"), tmp_path / "results")
    run = read_run(folder)
    assert folder.parent == tmp_path / "results" / "tiny" / "lm-eval:sums" / "proxy", "half of alpha, 2 of 9"
    spec = run.spec
    assert (spec.task, spec.role, spec.alpha, spec.data) == (
        "lm-eval:sums",
        "proxy",
        parse_alpha("0.5"),
        "here/sums",
    )
    assert (spec.limit, spec.shots, spec.mode, spec.system.name) == (2, 3, "generate", "tiny")
    assert spec.sampling == Sampling(max_new_tokens=7, temperature=0.0, stop=("\n",))
    assert {name: (metric.value, metric.unit, metric.n) for name, metric in run.metrics.items()} == {
        "exact_match": (0.5, "share", 2), "exact_match,loose": (1.0, "share", 2),
        "length": (12.5, "number", None),
    }  # fmt: skip
    assert (run.headline, run.n, run.status) == ("exact_match", 2, "done")
    assert run.metrics["exact_match"].low is not None and run.metrics["length"].low is None
    assert (run.started, run.finished) == ("2026-11-28T10:00:00+00:00", "2026-11-28T10:01:01+00:00")
    assert run.notes == ("lm-eval 0.4.9", "noted")
    assert (run.cost.seconds, run.cost.generated_tokens) == (2.5, 14)
    assert read_rows(folder) == [
        {
            "id": "0", "prompt": "Q0", "target": "5",
            "scores": {"exact_match": 1.0, "exact_match,loose": 1.0},
            "filtered": {"none": ["filtered 0 none"], "loose": ["filtered 0 loose"]},
            "responses": [{"text": "said 0"}],
        },
        {
            "id": "1", "prompt": "Q1", "target": "5",
            "scores": {"exact_match": 0.0, "exact_match,loose": 1.0},
            "filtered": {"none": ["filtered 1 none"], "loose": ["filtered 1 loose"]},
            "responses": [{"text": "said 1"}],
        },
    ]  # fmt: skip


def test_a_run_of_other_settings_has_a_folder_in_it(tmp_path: Path) -> None:
    [first] = lm_eval_runs.write_runs(written(tmp_path / "files"), tmp_path / "results")
    [again] = lm_eval_runs.write_runs(written(tmp_path / "files"), tmp_path / "results")
    [other] = lm_eval_runs.write_runs(written(tmp_path / "files", chat_template="x"), tmp_path / "results")
    assert again == first and other.parent == first and other.name.startswith("settings-")
    assert read_run(first).spec.data_sha256 != read_run(other).spec.data_sha256


def test_what_identifies_what_was_asked() -> None:
    """Documents in their order, and in which form they are asked; not what was answered."""
    usual = evaluated().spec.data_sha256
    same = [sample(*key, 0.0) for key in ((0, "none"), (0, "loose"), (1, "none"), (1, "loose"))]
    assert evaluated(rows=same).spec.data_sha256 == usual
    others = [
        evaluated(system_instruction="Be brief."), evaluated(chat_template="x"),
        evaluated(fewshot_as_multiturn=True), evaluated(rows=ROWS[:2]), evaluated(rows=ROWS[2:] + ROWS[:2]),
    ]  # fmt: skip
    found = [one.spec.data_sha256 for one in others]
    assert len({usual, *found}) == 6
    assert evaluated(chat_template="y").spec.data_sha256 == found[1], "each model's is in the system"


def test_limits_and_shots_and_data_that_are_not_given() -> None:
    whole = {"n-samples": {"sums": {"original": 2, "effective": 2}}, "n-shot": {}}
    configs = {"sums": {"output_type": "multiple_choice"}}
    spec = evaluated(configs=configs, **whole).spec
    assert (spec.limit, spec.shots, spec.data, spec.mode) == (None, 0, "sums", "likelihood")
    assert spec.sampling == Sampling()
    usual = evaluated().defaults
    assert usual.alpha == usual.system.alpha and usual.limit is None


def test_likelihoods_are_read_from_texts_and_faults_have_no_score() -> None:
    asked = {f"gen_args_{i}": {"arg_0": "Q", "arg_1": text} for i, text in enumerate((" a", " b"))}
    configs = {"sums": {"output_type": "multiple_choice", "dataset_path": "d"}}
    rows = [
        sample(0, "none", 1.0, arguments=asked, resps=[[["-1.5", "True"]], [["-2.5", "False"]]]),
        sample(1, "none", 0.0, arguments=asked, resps=[[["nan", "False"]], [["-3.5", "False"]]]),
    ]
    first, second = evaluated(configs=configs, rows=rows).rows
    assert first["responses"] == [{"text": " a", "logprob": -1.5}, {"text": " b", "logprob": -2.5}]
    assert first["prompt"] == "Q" and first["scores"] == {"exact_match": 1.0} and "fault" not in first
    assert second == {
        "id": "1", "prompt": "Q", "fault": "nan", "scores": {},
        "responses": [{"text": " a", "logprob": None}, {"text": " b", "logprob": -3.5}],
    }  # fmt: skip
    assert lm_eval_runs._likelihood(["Q", "x"], "-0.5") == {"text": "x", "logprob": -0.5}


def test_scores_that_are_no_numbers_are_left_out() -> None:
    odd = sample(0, "none", float("inf"), metrics=["exact_match", "words"], words=[1, 2])
    [row] = evaluated(rows=[odd]).rows
    assert row["scores"] == {}
    with pytest.raises(UserError, match="lm-eval gave no figure for 'sums'"):
        _ = evaluated(results={"sums": {"alias": "sums", "exact_match_stderr,none": 0.5}}).run


def test_tasks_that_ran_together_do_not_tell_their_cost_apart() -> None:
    both = {"sums": content()["configs"]["sums"], "other": {}}
    run = evaluated(configs=both).run
    assert run.notes[-1] == "2 tasks ran together: cost is not told apart" and run.cost.generated_tokens == 0


@pytest.mark.parametrize(
    ("value", "scores", "unit", "n", "bounded"),
    [
        (0.5, [0.0, 1.0], "share", 2, True), (2.0, [1.0, 3.0], "number", 2, True),
        (0.5, [0.0, 0.0], "number", 2, False), (0.5, [], "number", None, False),
        (-0.5, [-1.0, 0.0], "number", 2, True),
    ],
)  # fmt: skip
def test_a_figure_has_our_interval_where_it_is_a_mean(
    value: float, scores: list[float], unit: str, n: int | None, bounded: bool
) -> None:
    found: Metric = lm_eval_runs._metric(value, scores)
    assert (found.value, found.unit, found.n) == (value, unit, n) and (found.low is not None) == bounded


# Requests


def test_requests_are_named_by_task_document_and_repetition() -> None:
    asked: list[Any] = [
        SimpleNamespace(task_name=task, doc_id=document, idx=i)
        for task, document, i in (("t", 0, 0), ("t", 0, 1), ("t", 0, 0), (None, 0, 0), ("t", 1, 0))
    ]
    assert names_of(asked) == ["t/0/0/0", "t/0/1/0", "t/0/0/1", "/0/0/0", "t/1/0/0"]


def test_settings_that_are_not_given() -> None:
    torch.manual_seed(77)
    drawn = sampling_of({"do_sample": True, "top_k": 4, "min_p": 0.25, "until": ["a", "b", "a"]}, "b")
    assert drawn == Sampling(
        max_new_tokens=256, temperature=1.0, top_k=4, min_p=0.25, seed=77, stop=("a", "b")
    )
    assert sampling_of({"do_sample": True, "temperature": 0.5, "seed": 5}, None).seed == 5
    assert sampling_of({"do_sample": False, "seed": 5}, "</s>") == Sampling(
        max_new_tokens=256, temperature=0.0, seed=0, stop=("</s>",)
    )


@pytest.mark.parametrize(("bos", "eos", "found"), [(0, 2, 0), (1, 2, 1), (None, 2, 2), (None, 0, 0)])
def test_what_stands_for_an_empty_context(bos: int | None, eos: int | None, found: int) -> None:
    words: Any = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    assert prefix_of(words) == found
    with pytest.raises(UserError, match="neither a beginning nor an end of sequence"):
        prefix_of(SimpleNamespace(bos_token_id=None, eos_token_id=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "more", "batch"),
    [
        ({}, {"batch_size": 4, "max_batch_size": 16}, 4), ({}, {"batch_size": "8"}, 8), ({}, {}, None),
        ({}, {"batch_size": "auto", "max_batch_size": 16}, 16),
        ({}, {"batch_size": "auto:4", "max_batch_size": None}, None),
        ({"batch": 2}, {"batch_size": 4}, 2), ({}, {"max_batch_size": 3}, 3),
    ],
)  # fmt: skip
def test_batch_sizes_of_lm_eval(given: Any, more: Any, batch: int | None) -> None:
    found = ModelArguments.read({"system": "demo", **given}, more)
    assert (found.batch, found.pretrained, found.role) == (batch, "demo", "proxy")
    assert found.part(DecodeOptions) == DecodeOptions(**({} if batch is None else {"batch": batch}))


class Silent(SystemLM):
    """A model that answers nothing."""

    def _loglikelihood_tokens(self, requests: Any, **_: object) -> list[Any]:
        return []

    def loglikelihood_rolling(self, requests: Any) -> list[Any]:
        """Nothing."""
        return []

    def generate_until(self, requests: Any) -> list[Any]:
        """Nothing."""
        return []


def named(**more: Any) -> str:
    """What lm-eval's cache tells a model apart by."""
    words = SimpleNamespace(chat_template=more.pop("template", None))
    spec = {"model": "m", "revision": None, "adapter": None, "chat": "none"}
    specs = {"base": ModelSpec(model="b"), "expert": ModelSpec(**{**spec, **more.pop("expert", {})})}
    models: Any = SimpleNamespace(
        system=System(name=more.pop("name", "s/x"), base=ModelSpec(model="b")),
        names=lambda role: list(specs),
        tokenizer=lambda name: words, spec=specs.__getitem__,
    )  # fmt: skip
    return str(Silent(models, more.pop("role", "proxy"), parse_alpha(more.pop("alpha", 1))).tokenizer_name)


def test_every_part_of_a_model_tells_its_cached_requests_apart() -> None:
    usual = named()
    assert usual.startswith("s__x-proxy-") and named(alpha=0.5) == usual, "alpha changes no request"
    chat = {"expert": {"chat": "tokenizer"}}
    others = [
        named(expert={"model": "n"}), named(expert={"adapter": "a"}), named(expert={"revision": "r"}),
        named(expert={"chat": "llama2"}), named(template="x", **chat), named(template="y", **chat),
        named(role="expert"), named(name="t"),
    ]  # fmt: skip
    assert len({usual, *others}) == 9
