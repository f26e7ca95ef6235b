"""lm-eval on a real model and public items: our figures are those of its own `hf`, and of the formula."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from proxytune.config import DType, ModelSpec, System
from tests.support import lm_eval_tasks, real
from tests.support.require import require_or_skip

try:
    import datasets

    from proxytune.integrations.lm_eval import ProxyTunedLM
    from tests.support import lm_eval_oracle as oracle
except ImportError:
    require_or_skip("lm-eval", "lm-eval is not installed")

pytestmark = [pytest.mark.real, pytest.mark.slow]

ITEMS = 4
RESPONSES = 2
"""Questions that are answered: the plain model of the formula has no cache."""


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> dict[str, Path]:
    """Public items as tasks: multiple choice with short and long contexts, texts, word problems."""
    folder, sets = tmp_path_factory.mktemp("tasks"), reference / "data" / "small_sets"
    choose = lm_eval_tasks.CHOOSE.replace("{{{{label}}}}", "{{{{gold}}}}").replace("question", "query")
    read = lm_eval_tasks.READ.replace("{{{{text}}}}", "{{{{context}}}}")
    sums = _rows(reference / "data" / "gsm8k" / "test.jsonl")[:RESPONSES]
    for row in sums:
        row["answer"] = row["answer"].rpartition("#### ")[2]
    made = {
        "arc_easy": (choose, _rows(sets / "arc_easy.jsonl.gz")[:ITEMS]),
        "boolq": (choose, _rows(sets / "boolq.jsonl.gz")[:ITEMS]),
        "lambada": (read, _rows(sets / "lambada_openai.jsonl.gz")[:ITEMS]),
        "gsm8k": (lm_eval_tasks.GENERATE, sums),
    }
    return {name: lm_eval_tasks.write(folder, name, form, rows) for name, (form, rows) in made.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> System:
    """SmolLM2 as base and antiexpert; the expert is the same with a weaker last layer."""
    folder = real.checkpoint("smollm2", "float32")
    other = tmp_path_factory.mktemp("expert")
    model = real.plain_model(folder, "float32")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight *= 0.5
    model.save_pretrained(other)
    for path in folder.glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    base, expert = (ModelSpec(model=str(path), dtype="float32") for path in (folder, other))
    return System(name="steered", base=base, expert=expert, antiexpert=base)


def alone(system: System, dtype: DType) -> System:
    """The base in every role."""
    one = system.base.model_copy(update={"dtype": dtype})
    return System(base=one, expert=one, antiexpert=one)


def compared(ours: dict[str, Any], theirs: dict[str, Any], tasks: dict[str, Path], most: float) -> None:
    """Check equal figures, and log-probabilities within `most`; print a table of both."""
    for task in tasks:
        found, want = (oracle.figures(results, task) for results in (ours, theirs))
        n, worst = len(theirs["samples"][task]), 0.0
        if task == "gsm8k":
            assert oracle.answers(ours, task) == oracle.answers(theirs, task)
        else:
            pairs = list(zip(oracle.logprobs(ours, task), oracle.logprobs(theirs, task), strict=True))
            worst = max(abs(a - b) / max(1.0, abs(b) / 100) for a, b in pairs)
        print(f"| {task} | {n} | {_short(found)} | {_short(want)} | {worst:.1e} |")
        assert worst < most and found == pytest.approx(want, rel=1e-4 if task == "lambada" else 1e-12)


def _short(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name.removesuffix(',none')} {value:.6g}" for name, value in figures.items())


def exact_norm(self: Any, x: Tensor) -> Tensor:
    """An RMS norm in the dtype of its input. Transformers' own rounds to float32, whatever the dtype is."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (x * scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("float64", 1e-9)])
def test_a_shift_of_nothing_is_the_hf_model(
    dtype: DType, most: float, steered: System, tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own norms a float64 model is exact to float32 only (the next test)."""
    chosen = tasks
    if dtype == "float64":
        monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
        chosen = {name: tasks[name] for name in ("arc_easy", "lambada")}
    system = alone(steered, dtype)
    found = oracle.evaluated(ProxyTunedLM(system), list(chosen.values()), num_fewshot=1)
    compared(found, oracle.evaluated(oracle.hf(system), list(chosen.values()), num_fewshot=1), chosen, most)


def test_in_float64_we_differ_from_hf_by_less_than_its_own_rounding(
    steered: System, tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of a sum decides how the last bit of a norm is rounded to float32, and every later layer
    hands that on: so it is between us and hf, and between hf and itself with another batch."""
    system, task = alone(steered, "float64"), tasks["arc_easy"]

    def scores(model: Any) -> Tensor:
        found = oracle.evaluated(model, [task], num_fewshot=1, limit=4)
        return torch.tensor(oracle.logprobs(found, "arc_easy"), dtype=torch.float64)

    ours, theirs = scores(ProxyTunedLM(system, "base")), scores(oracle.hf(system))
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    exact = scores(oracle.hf(system))
    apart, rounding = (float((theirs - other).abs().max()) for other in (ours, exact))
    print(f"ours - hf {apart:.1e}, hf - exact norms {rounding:.1e}")
    assert apart < rounding < 2e-5 and float((ours - exact).abs().max()) < 2e-5


def test_a_shift_is_the_formula_on_whole_sequences(steered: System, tasks: dict[str, Path]) -> None:
    chosen = {name: tasks[name] for name in ("arc_easy", "lambada", "gsm8k")}
    found = oracle.evaluated(ProxyTunedLM(steered, alpha=2.0), list(chosen.values()))
    theirs = oracle.evaluated(oracle.CombinedHF(steered, 2.0), list(chosen.values()))
    compared(found, theirs, chosen, 5e-4)  # what base + 2 expert - 2 antiexpert make of 1e-4 each
    base = oracle.evaluated(ProxyTunedLM(steered, "base"), [chosen["gsm8k"]])
    assert oracle.answers(base, "gsm8k") != oracle.answers(found, "gsm8k")
