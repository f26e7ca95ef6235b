"""lm-eval's own `hf` model, and one of the formula: whole sequences through three models, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from proxytune.config import System


def hf(system: System, role: str = "base", batch_size: int = 4) -> HFLM:
    """lm-eval's model of one role."""
    folder, model = _model(system, role)
    words = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=words, batch_size=batch_size, device="cpu")


def _model(system: System, role: str) -> tuple[Path, PreTrainedModel]:
    spec = getattr(system, role)
    dtype = getattr(torch, spec.dtype)
    return Path(spec.model), AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype).eval()


class CombinedHF(HFLM):
    """logits = base + alpha * (expert - antiexpert), by definition: scores and greedy responses."""

    def __init__(self, system: System, alpha: float, batch_size: int = 4) -> None:
        folder, base = _model(system, "base")
        words = AutoTokenizer.from_pretrained(folder)
        super().__init__(pretrained=base, tokenizer=words, batch_size=batch_size, device="cpu")
        self.alpha = alpha
        self.experts = [_model(system, role)[1] for role in ("expert", "antiexpert")]

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.inference_mode():
            base, expert, antiexpert = (model(inps).logits for model in (self.model, *self.experts))
        return base + self.alpha * (expert - antiexpert)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **given: Any) -> Tensor:
        assert not given.get("do_sample")
        mask = given["attention_mask"]
        rows = [self._continued(row[mask[at] > 0], max_length - len(row)) for at, row in enumerate(context)]
        longest = max(map(len, rows))
        end = self.eot_token_id
        padded = [torch.cat([row, torch.full((longest - len(row),), end)]) for row in rows]
        return torch.cat([context, torch.stack(padded)], dim=1)

    def _continued(self, ids: Tensor, count: int) -> Tensor:
        """The greedy response, its end-of-sequence included."""
        found: list[int] = []
        while len(found) < count and self.eot_token_id not in found:
            inputs = torch.cat([ids, torch.tensor(found, dtype=torch.long)])[None]
            found.append(int(self._model_call(inputs)[0, -1].argmax()))
        return torch.tensor(found, dtype=torch.long)


def evaluated(model: Any, tasks: Sequence[Path], **given: Any) -> dict[str, Any]:
    """lm-eval's results of these tasks, without its index of all the tasks that it has."""
    folders = sorted({str(path.parent) for path in tasks})
    manager = TaskManager(include_path=folders, include_defaults=False)
    names = [path.stem for path in tasks]
    given.setdefault("bootstrap_iters", 0)
    found: dict[str, Any] = simple_evaluate(model=model, tasks=names, task_manager=manager, **given)
    return found


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, document by document."""
    return [sample["resps"] for sample in results["samples"][task]]


def logprobs(results: dict[str, Any], task: str) -> list[float]:
    """The log-probabilities among the answers, in order."""
    found = []
    for resps in answers(results, task):
        for (answer,) in resps:
            found.append(float(answer[0] if isinstance(answer, tuple) else answer))
    return found


def greedy(results: dict[str, Any], task: str) -> list[bool]:
    """Whether each scored continuation is the greedy one."""
    return [answer[1] for resps in answers(results, task) for (answer,) in resps]


def figures(results: dict[str, Any], task: str) -> dict[str, Any]:
    """The metrics of a task."""
    return {
        key: value for key, value in results["results"][task].items() if "," in key and "stderr" not in key
    }
