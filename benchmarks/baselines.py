"""The baselines under the clock: the paper's loop and Hugging Face's `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.measure import Contender, Outcome, synchronise
from benchmarks.paper_loop import hf_generate, paper_generate
from benchmarks.shapes import TRIO, Bench
from benchmarks.workloads import Item, Workload
from proxytune.decoding.decoder import PREFILL_TOKENS


@dataclass
class Steps:
    """When the steps of one batch ended."""

    began: float
    ends: list[float]

    @classmethod
    def start(cls) -> Steps:
        """Now."""
        return cls(time.perf_counter(), [])

    def tick(self) -> None:
        """A step ended."""
        self.ends.append(time.perf_counter())

    @property
    def gaps(self) -> list[float]:
        """Seconds of every step."""
        return [end - start for start, end in zip([self.began, *self.ends], self.ends, strict=False)]


@dataclass(frozen=True)
class PaperLoop:
    """The paper's loop over a workload in static batches, in the order of the requests."""

    bench: Bench
    workload: Workload
    batch: int = 1

    def contender(self, name: str) -> Contender:
        """This, to be raced."""
        return Contender(name, self.run, lambda: [self.bench.plain[role] for role in TRIO], self.batch)

    def run(self) -> Outcome:
        """Decode the workload once."""
        models: dict[str, PreTrainedModel] = {role: self.bench.plain[role] for role in TRIO}

        def decode(items: Sequence[Item], on_step: Callable[[], None]) -> list[list[int]]:
            contexts, lengths = [item.contexts for item in items], [item.new_tokens for item in items]
            return paper_generate(models, contexts, lengths, on_step=on_step)

        return in_batches(self.bench, self.workload, self.batch, decode)


@dataclass(frozen=True)
class HuggingFace:
    """`generate` of one model alone at batch 1."""

    bench: Bench
    workload: Workload
    role: str = "base"
    static: bool = False

    def contender(self, name: str) -> Contender:
        """This, to be raced."""
        return Contender(name, self.run, lambda: [self._model], 1)

    @property
    def _model(self) -> PreTrainedModel:
        return self.bench.plain[self.role]

    def run(self) -> Outcome:
        """Decode the workload once."""

        def decode(items: Sequence[Item], on_step: Callable[[], None]) -> list[list[int]]:
            [item] = items
            prompt = item.contexts[self.role if self.role in item.contexts else "base"]
            return [hf_generate(self._model, prompt, item.new_tokens, static=self.static, on_step=on_step)]

        return in_batches(self.bench, self.workload, 1, decode)


@dataclass(frozen=True)
class HuggingFaceBatching:
    """Hugging Face's continuous batching of one model alone, as it comes but for its sizes: rows, tokens per
    forward, and a cache that the rows need, without a margin in which no row is let in. Setting it up is not
    timed."""

    bench: Bench
    workload: Workload
    max_rows: int

    def contender(self, name: str) -> Contender:
        """This, to be raced."""
        return Contender(name, self.run, lambda: [self.bench.plain["base"]], self.max_rows)

    def run(self) -> Outcome:
        """Decode the workload once."""
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        model: Any = self.bench.plain["base"]
        with model.continuous_batching_context_manager(
            greedy, continuous_batching_config=self._room()
        ) as manager:
            began = time.perf_counter()
            tags = {
                manager.add_request(
                    list(item.contexts["base"]), max_new_tokens=item.new_tokens, record_timestamps=True
                ): item.tag
                for item in self.workload.items
            }
            done = dict[int, Any]()
            while len(done) < len(tags):
                found = manager.get_result(timeout=PATIENCE)
                if found is None or found.error is not None:
                    raise RuntimeError(f"continuous batching stopped: {found and found.error}")
                done[tags[found.request_id]] = found
            seconds = time.perf_counter() - began
        gaps = [b - a for one in done.values() for a, b in pairwise(one.timestamps)]
        first = [one.timestamps[0] - began for one in done.values()]
        return Outcome(seconds, {tag: one.generated_tokens for tag, one in done.items()}, first, gaps)

    def _room(self) -> ContinuousBatchingConfig:
        longest = max(len(item.contexts["base"]) + item.new_tokens for item in self.workload.items)
        default: Any = ContinuousBatchingConfig()
        page = default.page_size if hasattr(default, "page_size") else default.block_size  # 5.17
        return ContinuousBatchingConfig(
            num_blocks=self.max_rows * -(-longest // page) + 1,
            max_batch_tokens=self.max_rows + PREFILL_TOKENS[self.bench.device.type],
            max_requests_per_batch=self.max_rows,
            safety_margin=0.0,
        )


PATIENCE = 600
"""Seconds without a finished response after which continuous batching is given up."""


def in_batches(
    bench: Bench,
    workload: Workload,
    size: int,
    decode: Callable[[Sequence[Item], Callable[[], None]], list[list[int]]],
) -> Outcome:
    """Decode batches of `size` items one after the other. Where the workload comes all at once, a request of
    the second batch waits for the first."""
    items, responses, first, gaps = workload.items, dict[int, list[int]](), list[float](), list[float]()
    began = time.perf_counter()
    for start in range(0, len(items), size):
        batch, steps = items[start : start + size], Steps.start()
        submitted = steps.began if workload.one_by_one else began
        for item, tokens in zip(batch, decode(batch, steps.tick), strict=True):
            responses[item.tag] = tokens
            first.append(steps.ends[0] - submitted)
        gaps += steps.gaps
    synchronise(bench.device)
    return Outcome(time.perf_counter() - began, responses, first, gaps)
