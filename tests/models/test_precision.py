"""Where rounding may change a token: batched and alone, every divergence must be a near-tie.

Matrix products round differently by batch shape, so in float32 and bfloat16 a token may differ between a
batch and a lone row. It may only where the two best combined logits all but tie: their margin, by the float64
oracle on the same (rounded) weights, has to be below the stated bound at the first token that differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune.config import DType, ModelSpec, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from proxytune.records import Example
from tests.support import oracle, tiny
from tests.support.decoders import ragged

EXAMPLES = ragged(24, 21, longest=40)
LONG = Sampling(max_new_tokens=24, min_new_tokens=24)
BOUNDS: dict[DType, float] = {"float32": 1e-5, "bfloat16": 0.1}
"""The largest top-two margin of the combined logits (their spread is 1.4) at which a token may differ."""


class Bench:
    """One trio in one dtype, its tokens by batch size, and the float64 oracle on the same weights.

    With `twins` the output head gives every logit twice, the second time a few units in the last place off:
    then almost every position is a near-tie, and rounding does decide."""

    def __init__(self, folder: Path, dtype: DType, twins: bool) -> None:
        self.folders = {role: folder / role for role in tiny.ROLES}
        for role, (seed, shape) in tiny.ROLES.items():
            model = tiny.build("llama", seed, **shape)
            if twins:
                with torch.no_grad():
                    head = model.lm_head.weight
                    head[131:] = head[3:131] * (1 + 2e-7 * torch.randn_like(head[131:]))
            tiny.save(self.folders[role], model.to(getattr(torch, dtype)))
        self.system = System(**{r: ModelSpec(model=str(f), dtype=dtype) for r, f in self.folders.items()})
        self.models = Models(self.system)
        self.exact = {
            role: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64)
            for role, f in self.folders.items()
        }
        self.contexts = {e.id: Decoder(self.models, "proxy").contexts(e.prompt) for e in EXAMPLES}

    def tokens(self, batch: int, examples: Sequence[Example] = EXAMPLES) -> dict[str, tuple[int, ...]]:
        d = Decoder(self.models, "proxy", DecodeOptions(batch=batch))
        return {c.example_id: c.token_ids for c in d.stream(examples, LONG)}

    def exact_logits(self, example: str, tokens: Sequence[int]) -> torch.Tensor:
        """The oracle's combined logits after these tokens, end-of-sequence banned."""
        logits = {
            role: oracle.last_logits(self.exact[role], [*ids, *tokens])
            for role, ids in self.contexts[example].items()
        }
        z = logits["base"] + logits["expert"] - logits["antiexpert"]
        z[2] = -torch.inf
        return z

    def margin(self, example: str, tokens: Sequence[int]) -> float:
        """The distance of the two best of these logits."""
        return float(-self.exact_logits(example, tokens).topk(2).values.diff())

    def divergences(self) -> list[float]:
        """The margin wherever a row of a batch first differs from the same row alone."""
        alone = {e.id: self.tokens(1, [e])[e.id] for e in EXAMPLES}
        margins = []
        for batch, examples in [(3, EXAMPLES), (16, EXAMPLES), (128, EXAMPLES), (128, EXAMPLES[::-1])]:
            for name, found in self.tokens(batch, examples).items():
                at = first_difference(found, alone[name])
                if at is not None:
                    margins.append(self.margin(name, found[:at]))
        return margins


Make = Callable[[DType, bool], Bench]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("precision")
    return cache(lambda dtype, twins: Bench(root / f"{dtype}{twins}", dtype, twins))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


ROWS = 4 * len(EXAMPLES)


def test_ordinary_float32_rows_do_not_differ_at_all(bench: Make) -> None:
    margins = bench("float32", False).divergences()
    assert all(margin < BOUNDS["float32"] for margin in margins), margins
    assert len(margins) <= 1, f"{len(margins)} of {ROWS} rows differ"


def test_every_divergence_is_a_near_tie(bench: Make) -> None:
    """Here rows do differ, so that the bound has something to judge."""
    margins = bench("float32", True).divergences()
    assert len(margins) > ROWS // 4, f"{len(margins)} of {ROWS} rows differ"
    assert all(margin < BOUNDS["float32"] for margin in margins), margins


@pytest.mark.slow
def test_in_bfloat16_few_rows_differ_and_those_in_near_ties(bench: Make) -> None:
    """The head gives float32 logits, so that ties by rounding are rare (none where this was written)."""
    margins = bench("bfloat16", False).divergences()
    assert len(margins) < ROWS // 4, f"{len(margins)} of {ROWS} rows differ"
    assert all(margin < BOUNDS["bfloat16"] for margin in margins), margins


@pytest.mark.parametrize("dtype, twins", [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.every(3)
def test_every_token_is_the_exact_best_or_a_near_tie(dtype: DType, twins: bool, bench: Make) -> None:
    """Against float64 itself: the chosen token is within the bound of the best."""
    made = bench(dtype, twins)
    behind = []
    for name, found in made.tokens(128).items():
        for at in range(0, len(found), 3):
            z = made.exact_logits(name, found[:at])
            behind.append(float(z.max() - z[found[at]]))
    assert max(behind) < BOUNDS[dtype]
    best = sum(gap == 0 for gap in behind) / len(behind)
    assert best >= {"float32": 0.5 if twins else 0.99, "bfloat16": 0.9}[dtype]


def test_the_bound_is_tight_enough_to_mean_something(bench: Make) -> None:
    """Typical margins are far above the float32 bound: a wrong token would not pass as a near-tie."""
    made = bench("float32", False)
    found = made.tokens(128)
    margins = sorted(made.margin(name, tokens[:at]) for name, tokens in found.items() for at in (0, 7, 15))
    assert margins[1] > 10 * BOUNDS["float32"]
    assert margins[len(margins) // 2] > 10_000 * BOUNDS["float32"]
