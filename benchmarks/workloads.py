"""What is decoded: prompts by role and forced response lengths. Everything follows from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxytune.config import Sampling
from proxytune.decoding.decoder import Decoder
from proxytune.records import Example
from proxytune.tasks import TASKS, read_source

SEED = 1
Context = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Item:
    """One request."""

    tag: int
    contexts: Context
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests, and whether they come one after the other (one client, batch 1) or all at once."""

    name: str
    items: tuple[Item, ...]
    one_by_one: bool = False

    @property
    def tokens(self) -> int:
        """Response tokens in all."""
        return sum(item.new_tokens for item in self.items)

    @property
    def prompt_tokens(self) -> float:
        """Mean length of the base's prompts."""
        return sum(len(item.contexts["base"]) for item in self.items) / len(self.items)


def workload(
    name: str, contexts: Sequence[Context], lengths: Sequence[int], *, one_by_one: bool = False
) -> Workload:
    """Item i: contexts[i], lengths[i]."""
    pairs = enumerate(zip(contexts, lengths, strict=True))
    return Workload(name, tuple(Item(tag, c, n) for tag, (c, n) in pairs), one_by_one)


def uniform(count: int, low: int, high: int) -> list[int]:
    """Lengths drawn uniformly from low..high."""
    draw = random.Random(SEED)
    return [draw.randint(low, high) for _ in range(count)]


def log_uniform(count: int, low: int, high: int) -> list[int]:
    """Lengths whose logarithm is uniform: many short ones and a long tail."""
    draw = random.Random(SEED)
    return [round(math.exp(draw.uniform(math.log(low), math.log(high)))) for _ in range(count)]


def random_contexts(count: int, low: int, high: int, vocabulary: int) -> list[Context]:
    """Random prompts of low..high ids, the same for every role."""
    draw = random.Random(SEED + 1)
    prompts = [
        tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))) for _ in range(count)
    ]
    return [{"base": p, "expert": p, "antiexpert": p} for p in prompts]


def same_token(length: int, token: int = 5) -> Context:
    """One token repeated: the prompt of the paper's timing ("hi hi hi ...")."""
    prompt = (token,) * length
    return {"base": prompt, "expert": prompt, "antiexpert": prompt}


def demo_prompts(decoder: Decoder, count: int, tasks: Sequence[str]) -> list[tuple[Context, Example]]:
    """Prompts of the demo's own tasks, task by task in turn; the expert's are its chat prompts."""
    per_task = -(-count // len(tasks))
    groups = [read_source(TASKS[task], "generated", per_task).examples for task in tasks]
    mixed = [example for group in zip(*groups, strict=True) for example in group]
    return [(decoder.contexts(example.prompt), example) for example in mixed[:count]]


def natural_lengths(decoder: Decoder, examples: Sequence[Example], longest: int) -> list[int]:
    """How long the proxy's own answers are, end-of-sequence included: forced later, so that every row
    generates its own answer."""
    sampling, lengths = Sampling(max_new_tokens=longest), []
    for example in examples:  # one by one: ids of different tasks can be the same
        [done] = decoder.stream([example], sampling)
        lengths.append(len(done.token_ids))
    return lengths
