"""Decoders of tiny systems, prompts for them, and the oracle's answers beside theirs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.decoding.prompts import noise_key
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.speculative.drafter import Speculation
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from proxytune.records import Completion, Example, Prompt
from tests.support import oracle

GREEDY = Sampling(max_new_tokens=8)
SAMPLERS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.3},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "min_new_tokens": 4},
]

speculation = Speculation(k=0)
"""How decoders draft by default; tests may set another."""
loaded_models: dict[str, Models] = {}
"""The models of every system, by its JSON."""
plain_models: dict[str, Any] = {}
"""Models as transformers alone loads them, by folder."""


def example(text: str, number: int = 0, **parts: Any) -> Example:
    """A question in plain text; its number is its name."""
    return Example(f"{number}", Prompt(plain=text, user=text, **parts))


def ragged(count: int, seed: int = 0, longest: int = 30) -> list[Example]:
    """Prompts of 1 to `longest` characters."""
    draw = random.Random(seed)
    return [
        example("".join(draw.choice("abcdefg hij?0123") for _ in range(draw.randint(1, longest))), number)
        for number in range(count)
    ]


def decoder(system: System, role: str = "proxy", **options: Any) -> Decoder:
    """A decoder of a system, whose models are loaded once for all tests."""
    models = loaded_models.setdefault(system.model_dump_json(), Models(system))
    how = DecodeOptions(**{name: options.pop(name) for name in ("batch", "kv_memory") if name in options})
    return Decoder(models, system.require(role), how, **{"speculation": speculation, **options})


def by_id(found: Sequence[Completion]) -> dict[tuple[str, int], Completion]:
    """Completions by example and sample, each once."""
    indexed = {(c.example_id, c.sample): c for c in found}
    assert len(indexed) == len(found)
    return indexed


def ids_of(d: Decoder, texts: Sequence[str]) -> frozenset[int]:
    """The ids of one of these texts, with or without a space before it."""
    forms = {form for text in texts for form in (text, f" {text}")}
    ids = range(len(d.tokenizer)) if forms else range(0)
    return frozenset(i for i in ids if d.tokenizer.decode([i], clean_up_tokenization_spaces=False) in forms)


def settings_of(d: Decoder, s: Sampling, e: Example, sample: int = 0, alpha: str = "1") -> oracle.Settings:
    """What the oracle has to know of a sample; stops are looked for in the whole text."""
    schedule = parse_alpha(alpha)
    room = min(d.loaded[name].family.window - len(ids) for name, ids in d.contexts(e.prompt).items())

    def stop(tokens: Sequence[int]) -> bool:
        text = d.text_of(tokens)
        return any(end in text for end in s.stop)

    return oracle.Settings(
        max_new=min(s.max_new_tokens, room),
        alpha=schedule.at,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        key=noise_key(s.seed, "", e.id, sample),
        eos=frozenset([2]),
        banned=ids_of(d, s.ban),
        banned_first=ids_of(d, s.ban_first),
        min_new=s.min_new_tokens,
        stop=stop if s.stop else None,
    )


def expected(d: Decoder, e: Example, s: oracle.Settings) -> tuple[list[int], str, list[float]]:
    """The oracle's answer with the decoder's own modules, their attention set back to transformers' own."""
    names = list(d.loaded)
    contexts = d.contexts(e.prompt)
    modules = {name: plain(d, name) for name in names}
    pairs = [(t.weight, modules[t.expert], modules[t.antiexpert]) for t in d.ensemble.terms]
    ids = [(contexts[t.expert], contexts[t.antiexpert]) for t in d.ensemble.terms]
    return oracle.generate(modules[d.target], pairs, contexts[d.target], ids, s)


def plain(d: Decoder, name: str) -> Any:
    """A fresh copy of a model, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM

    folder = str(d.loaded[name].spec.model)
    if folder not in plain_models:
        plain_models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        if hasattr(plain_models[folder].config, "num_experts_per_tok"):
            plain_models[folder].set_experts_implementation("eager")
    return plain_models[folder]


def check(
    d: Decoder, examples: Sequence[Example], s: Sampling, alpha: str = "1", **options: Any
) -> list[Completion]:
    """Decode, and hold every response against the oracle."""
    found = list(d.stream(examples, s, alpha=parse_alpha(alpha), **options))
    indexed = by_id(found)
    assert len(indexed) == len(examples) * s.n
    for e in examples:
        for sample in range(s.n):
            tokens, reason, _ = expected(d, e, settings_of(d, s, e, sample, alpha))
            got = indexed[e.id, sample]
            assert (list(got.token_ids), got.finish_reason) == (tokens, reason), e
    return found


def tokens(d: Decoder, s: Sampling = GREEDY) -> dict[tuple[str, int], tuple[int, ...]]:
    """Its responses to a few prompts."""
    return {where: c.token_ids for where, c in by_id(list(d.stream(ragged(6, 3), s))).items()}


def kv_bytes(d: Decoder, tokens: int) -> int:
    """The memory in which every model's pool holds `tokens` tokens."""
    caches = [runner.rows.spec for runner in d.ensemble.runners.values()]  # type: ignore[attr-defined]
    return tokens * sum(cache.bytes_per_token for cache in caches)


def use_pages(patch: pytest.MonkeyPatch) -> None:
    """Decoders on the CPU keep their keys and values in pages, as on CUDA."""
    patch.setattr("proxytune.decoding.decoder.SlotCache", PagedCache)
