"""P-tuning in its own paper's setting, in miniature: what a pretrained model knows, asked for by a text
around the subject (Liu et al. 2021, section 4.1, on LAMA).

Facts are those of the demo world's people: "Pobas Tikel" and "birthplace" -> "Logor". Four ways to ask, each
a way to put a subject into a text that the value follows:

- MP: a manual wording. Nothing is trained. There are several of each relation, because their spread is the
  method's argument.
- FT: the subject alone; all weights are tuned on the training people's facts.
- MP+FT: the wording that is best on dev people, with all weights tuned.
- P-tuning: pseudo tokens before and after the subject, whose embeddings a bidirectional LSTM and an MLP make;
  the model stays as it is.

One training for each relation, as in the paper. Learning rates are chosen on dev people; the figures are of
the test people, none of whom any training has seen. P@1 is exact: every token of the value is the most
probable one.

`make reproduce-fact-probing` runs it. The loop is its own: trl's takes ids, not embeddings between them."""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PromptEncoder, PromptEncoderConfig
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from proxytune.config import ModelSpec
from proxytune.demo import world
from proxytune.models import Tokenizer, plain
from proxytune.run_files import write_atomically
from proxytune.terminal import say, show

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "birthplace": (
        "{name} was born in",
        "The almanac says {name} was born in",
        "Where was {name} born? {name} was born in",
        "{name} comes from",
        "The birthplace of {name} is",
    ),
    "job": (
        "{name} works as a",
        "The almanac says {name} works as a",
        "What work does {name} do? {name} works as a",
        "{name} is a",
        "The job of {name} is",
    ),
    "instrument": (
        "{name} plays the",
        "The almanac says {name} plays the",
        "What does {name} play? {name} plays the",
        "{name} is good at the",
        "The instrument of {name} is the",
    ),
}
"""Relation -> manual wordings: the first three are in words that pretraining had, the others are not."""
PSEUDO = (3, 3)
"""Pseudo tokens before and after the subject."""
WEIGHT_RATES, PROMPT_RATES = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2)
BATCH = 16
RESULT, TABLE = "fact-probing.json", "fact-probing.md"
HOLE = -1
"""The place of a pseudo token among ids."""


@dataclass(frozen=True)
class Fact:
    """What is asked, and the answer."""

    subject: str
    value: str


@dataclass(frozen=True)
class AskedFact:
    """A fact as ids: the text before the value, with HOLE for pseudo tokens, and the value."""

    before: tuple[int, ...]
    value: tuple[int, ...]


Asking = Callable[[Fact], AskedFact]


class ProbingScore(BaseModel):
    """P@1 of one way to ask, on one relation."""

    model_config = ConfigDict(frozen=True)

    way: str
    relation: str
    wording: str | None = None
    seed: int | None = None
    """None where nothing is random."""
    rate: float | None = None
    """Chosen on dev people; None without a training."""
    trained: int = 0
    dev: float
    test: float


def facts_of(relation: str, split: str, n: int | None = None) -> list[Fact]:
    """The facts of a relation about a split's people."""
    miniature = world.make_world()
    index = [attribute.name for attribute in miniature.attributes].index(relation)
    return [Fact(person.name, person.truths[index]) for person in miniature.people[split][:n]]


def by_wording(tokenizer: Tokenizer, wording: str, fact: Fact) -> AskedFact:
    """A manual wording; `{name}` alone is the subject and nothing else."""
    before = tuple(tokenizer(wording.format(name=fact.subject))["input_ids"])
    return AskedFact(before, _value(tokenizer, fact))


def by_pseudo_tokens(tokenizer: Tokenizer, fact: Fact) -> AskedFact:
    """Pseudo tokens around the subject."""
    first, *subject = tokenizer(fact.subject)["input_ids"]  # <s> stays in front
    before, after = PSEUDO
    return AskedFact((first, *[HOLE] * before, *subject, *[HOLE] * after), _value(tokenizer, fact))


def _value(tokenizer: Tokenizer, fact: Fact) -> tuple[int, ...]:
    return tuple(tokenizer(f" {fact.value}", add_special_tokens=False)["input_ids"])


class Prober(nn.Module):
    """A model, and the network that makes pseudo tokens where there are any."""

    def __init__(self, model: Any, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    def forward(self, asked: Sequence[AskedFact]) -> tuple[Tensor, Tensor]:
        """The logits [N, V] that predict the tokens of the values, and those tokens [N]."""
        rows = [torch.tensor((*one.before, *one.value)) for one in asked]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        embedded = self.model.get_input_embeddings()(ids.clamp(min=0))
        if self.encoder is not None:
            made = self.encoder(torch.arange(sum(PSEUDO))[None])[0]
            holes = ids == HOLE
            embedded = embedded.masked_scatter(holes[..., None], made.repeat(len(rows), 1))
        # what stands after a row does not reach back into it: padding needs no mask
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits
        found = [logits[i, len(one.before) - 1 : len(rows[i]) - 1] for i, one in enumerate(asked)]
        return torch.cat(found), torch.tensor([token for one in asked for token in one.value])

    def trained(self) -> list[nn.Parameter]:
        """The network's parameters where there is one, or else the model's."""
        return list((self.encoder or self.model).parameters())


@torch.no_grad()
def precision(prober: Prober, asked: Sequence[AskedFact]) -> float:
    """P@1: the share of facts of which every token of the value is the most probable one."""
    prober.eval()
    right = 0
    for start in range(0, len(asked), 4 * BATCH):
        batch = asked[start : start + 4 * BATCH]
        logits, wanted = prober(batch)
        hits = (logits.argmax(-1) == wanted).split([len(one.value) for one in batch])
        right += sum(bool(hit.all()) for hit in hits)
    return right / len(asked)


def fit(prober: Prober, asked: Sequence[AskedFact], rate: float, steps: int, seed: int) -> None:
    """AdamW on the values' tokens, with a rate that falls to 0."""
    prober.train()
    parameters = prober.trained()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in _batches(asked, steps, random.Random(f"probing/{seed}")):
        loss: Any = nn.functional.cross_entropy(*prober(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()


def _batches(asked: Sequence[AskedFact], steps: int, rng: random.Random) -> Iterator[list[AskedFact]]:
    waiting = list[AskedFact]()
    for _ in range(steps):
        if len(waiting) < BATCH:
            waiting += rng.sample(asked, len(asked))
        yield waiting[:BATCH]
        del waiting[:BATCH]


@dataclass(frozen=True)
class ProbingTrial:
    """What is asked of which model."""

    model: Any
    tokenizer: Tokenizer
    steps: int
    seeds: int
    splits: Mapping[str, int | None]
    """Split -> how many of its people; None: all."""

    def measured(self, relation: str) -> Iterator[ProbingScore]:
        """All ways to ask of one relation."""
        best: tuple[float, str] | None = None
        for wording in WORDINGS[relation]:
            found = self._scores(Prober(self.model), relation, partial(by_wording, self.tokenizer, wording))
            dev, test = found
            yield ProbingScore(way="MP", relation=relation, wording=wording, dev=dev, test=test)
            if best is None or dev > best[0]:
                best = dev, wording
        assert best is not None
        bare, chosen = (partial(by_wording, self.tokenizer, text) for text in ("{name}", best[1]))
        yield from self._tuned("FT", relation, bare, WEIGHT_RATES, self._whole)
        yield from self._tuned("MP+FT", relation, chosen, WEIGHT_RATES, self._whole)
        pseudo = partial(by_pseudo_tokens, self.tokenizer)
        yield from self._tuned("P-tuning", relation, pseudo, PROMPT_RATES, self._prompted)

    def _tuned(
        self,
        way: str,
        relation: str,
        ask: Asking,
        rates: Sequence[float],
        make: Callable[[], Prober],
    ) -> Iterator[ProbingScore]:
        """A training of each seed, at the rate that is best on dev people with the first seed."""
        first = [self._trained(way, relation, ask, make, rate, 0) for rate in rates]
        best = max(first, key=lambda one: one.dev)
        yield best
        assert best.rate is not None
        for seed in range(1, self.seeds):
            yield self._trained(way, relation, ask, make, best.rate, seed)

    def _trained(
        self, way: str, relation: str, ask: Asking, make: Callable[[], Prober], rate: float, seed: int
    ) -> ProbingScore:
        torch.manual_seed(seed)
        prober = make()
        fit(prober, self._asked(relation, "train", ask), rate, self.steps, seed)
        count = sum(parameter.numel() for parameter in prober.trained())
        dev, test = self._scores(prober, relation, ask)
        say(f"{relation}, {way}, learning rate {rate:g}, seed {seed}: P@1 {dev:.3f} on dev people")
        return ProbingScore(
            way=way, relation=relation, seed=seed, rate=rate, trained=count, dev=dev, test=test
        )

    def _asked(self, relation: str, split: str, ask: Asking) -> list[AskedFact]:
        return [ask(fact) for fact in facts_of(relation, split, self.splits.get(split))]

    def _scores(self, prober: Prober, relation: str, ask: Asking) -> tuple[float, float]:
        """P@1 on dev and on test people."""
        dev, test = (precision(prober, self._asked(relation, split, ask)) for split in ("dev", "test"))
        return dev, test

    def _whole(self) -> Prober:
        return Prober(copy.deepcopy(self.model))

    def _prompted(self) -> Prober:
        hidden = self.model.config.get_text_config().hidden_size
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=sum(PSEUDO),
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=hidden,
            token_dim=hidden,
            num_transformer_submodules=1,
        )
        return Prober(self.model, PromptEncoder(config))


def table(scores: Sequence[ProbingScore]) -> str:
    """In Markdown: the ways by relation, then every wording."""
    lines = ["| way | trained parameters | " + " | ".join(WORDINGS) + " | mean |"]
    lines.append("| --- | --- |" + " --- |" * (len(WORDINGS) + 1))
    manual = [one for one in scores if one.wording is not None]
    best = [max((o for o in manual if o.relation == r), key=lambda one: one.dev) for r in WORDINGS]
    by_way = {"MP, all wordings": manual, "MP, the best on dev": best}
    for way in dict.fromkeys(one.way for one in scores if one.wording is None):
        by_way[way] = [one for one in scores if one.way == way]
    for way, own in by_way.items():
        by_relation = [[100 * one.test for one in own if one.relation == r] for r in WORDINGS]
        cells = [_spread(found) for found in by_relation]
        middle = mean(mean(found) for found in by_relation)
        lines.append(f"| {way} | {own[0].trained:,} | {' | '.join(cells)} | {middle:.1f} |")
    lines += ["", "| wording | P@1, dev | P@1, test |", "| --- | --- | --- |"]
    for one in manual:
        lines.append(f"| {one.wording} | {100 * one.dev:.1f} | {100 * one.test:.1f} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """The command line of `python -m proxytune.tuning.trials.fact_probing`."""
    parser = argparse.ArgumentParser(description="Ask a demo model for facts in several ways.")
    parser.add_argument("--out", type=Path, default=Path("results/tuning-demo"))
    parser.add_argument("--model", default="demo://antiexpert", help="a pretrained model of the demo")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, help="people of each split; all without")
    given = parser.parse_args()
    spec = ModelSpec(model=given.model, dtype="float32")
    splits = dict.fromkeys(("train", "dev", "test"), given.people)
    trial = ProbingTrial(plain.load(spec), plain.load_tokenizer(spec), given.steps, given.seeds, splits)
    given.out.mkdir(parents=True, exist_ok=True)
    scores = list[ProbingScore]()
    for relation in WORDINGS:
        scores += trial.measured(relation)
    found = [one.model_dump(mode="json", exclude_none=True) for one in scores]
    write_atomically(given.out / RESULT, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(given.out / TABLE, table(scores).encode())
    show(table(scores))


if __name__ == "__main__":
    main()
