"""Divergence by hand, and what is traced against full forwards of the models, independently of the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune.config import Sampling, System
from proxytune.decoding.prompts import context
from proxytune.engine.divergence import from_reference, kl_divergence
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import RunOptions
from proxytune.results import read_traces
from proxytune.runs import evaluation as run
from tests.support.runs import QUIET, evaluated

SHORT = Sampling(max_new_tokens=8)


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p, q).item() == pytest.approx(by_hand)
    assert kl_divergence(p + 3, q - 7).item() == pytest.approx(by_hand), "logits are up to a constant"
    assert kl_divergence(p, p).item() == 0.0
    both = kl_divergence(torch.cat([p, q]), torch.cat([q, q]))
    assert both.tolist() == pytest.approx([by_hand, 0.0])


def test_tokens_without_probability_add_nothing() -> None:
    none = torch.tensor([[0.0, 0.0, -torch.inf]])
    q = torch.tensor([[0.2, 0.3, 0.5]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.3)
    assert kl_divergence(none, q).item() == pytest.approx(by_hand)
    known = torch.tensor([True, True, False])
    unknown = torch.tensor([[0.0, 0.0, 99.0]])
    assert kl_divergence(unknown, q, known).item() == pytest.approx(by_hand), "where the reference knows none"


@pytest.mark.parametrize("role", ["proxy", "tuned"])
def test_recording_agreement_changes_no_token(
    system: System, models: Models, tmp_path: Path, role: str
) -> None:
    options = {"sampling": SHORT, "limit": 5, "models": models, "progress": False, "as_": role}
    evaluated(system, "gsm", out=tmp_path / "plain", **options)
    evaluated(system, "gsm", out=tmp_path / "traced", trace="agreement", **options)
    plain, traced = (tmp_path / name / "predictions.jsonl" for name in ("plain", "traced"))
    assert plain.read_bytes() == traced.read_bytes()


@pytest.mark.parametrize("role", ["proxy", "tuned"])
def test_what_is_traced_is_what_the_models_say(
    system: System, models: Models, tmp_path: Path, role: str
) -> None:
    """Every token of three responses against full forwards in float64: probabilities, first choices, KL."""
    options = {"sampling": SHORT, "limit": 3, "models": models, "progress": False, "as_": role}
    evaluated(system, "gsm", out=tmp_path, trace="agreement", **options)
    job = run.plan(system, "gsm", role, RunOptions(limit=3))
    names = ("base", "expert", "antiexpert", "tuned")
    plain = {n: AutoModelForCausalLM.from_pretrained(models.spec(n).model, dtype="float64") for n in names}
    for example, trace in zip(job.data.examples, read_traces(tmp_path), strict=True):
        response = [token["id"] for token in trace["tokens"]]
        logits = {}
        for name, module in plain.items():
            model = models.get(name)
            ids = [*context(model.spec, model.tokenizer, "direct", example.prompt), *response]
            with torch.inference_mode():
                full = module(input_ids=torch.tensor([ids])).logits[0]
            logits[name] = full[-len(response) - 1 : -1].double()
        logits["proxy"] = logits["base"] + logits["expert"] - logits["antiexpert"]
        p = {name: values.log_softmax(-1) for name, values in logits.items()}
        for at, token in enumerate(trace["tokens"]):
            for name in p:
                assert token["probability"][name] == pytest.approx(p[name][at, response[at]].exp().item())
            for name in ("proxy", "base"):
                stated = (p["tuned"][at].exp() * (p["tuned"][at] - p[name][at])).sum().item()
                assert token["divergence"][name] == pytest.approx(stated)
            assert set(token["top"]) == {"base", "expert", "antiexpert", "proxy", "tuned"}


def test_a_plain_trace_holds_no_divergence(system: System, models: Models, tmp_path: Path) -> None:
    evaluated(
        system, "gsm", out=tmp_path, sampling=SHORT, limit=1, trace="tokens", models=models, progress=False
    )
    tokens = json.loads((tmp_path / "trace.jsonl").read_text())["tokens"]
    assert all("divergence" not in token and "tuned" not in token["probability"] for token in tokens)


def test_agreement_needs_both(system: System) -> None:
    agreement = RunOptions(trace="agreement")
    with pytest.raises(UserError, match="--as proxy or --as tuned, not of 'base'"):
        run.plan(system, "gsm", "base", agreement)
    alone = system.model_copy(update={"tuned": None})
    with pytest.raises(UserError, match="cannot run as 'tuned'"):
        run.plan(alone, "gsm", "proxy", agreement)


def test_all_roles_with_agreement(system: System, tmp_path: Path) -> None:
    options = RunOptions(sampling=SHORT, limit=2, trace="agreement")
    runs = run.Evaluation(system, "gsm", options, QUIET).run_all(tmp_path)
    kinds = {role: made.spec.trace for role, made in runs.items()}
    assert kinds["proxy"] == kinds["tuned"] == "agreement" and kinds["base"] == kinds["expert"] == "tokens"


def test_tokens_that_the_reference_lacks_count_for_no_role() -> None:
    """A tuned model of fewer tokens: what its padded logits say is nothing."""
    draw = torch.Generator().manual_seed(2)
    views = {name: torch.randn(3, 7, generator=draw) for name in ("tuned", "base", "proxy")}
    known = torch.tensor([True, True, False, True, True, True, False])
    found = from_reference(views, "tuned", ("base", "proxy"), known)
    log_p = views["tuned"].double()[:, known].log_softmax(-1)
    for name, divergence in found.items():
        log_q = views[name].double().log_softmax(-1)[:, known]
        assert torch.allclose(divergence, (log_p.exp() * (log_p - log_q)).sum(-1)), name
    whole = from_reference(views, "tuned", ("base",))["base"]
    assert not torch.allclose(whole, found["base"])
