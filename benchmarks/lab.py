"""How much is measured, and the systems it is measured on: made once, shared by the cases of one run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.baselines import PaperLoop
from benchmarks.measure import Contender, Timed, copy_bandwidth, observe, race, take_turns
from benchmarks.record import Line, Oracle, Report, line
from benchmarks.shapes import Bench, demo_bench, random_bench
from benchmarks.trained import Training, trained_bench
from benchmarks.workloads import Workload
from proxytune.errors import UserError
from proxytune.tuning import demo_models as demo_build

Draw = tuple[int, int, int]
"""Requests, shortest and longest response."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    repeats: int
    long_repeats: int
    """Of mixtures, of the table of synthetic acceptance and of the paper's Table 12."""
    trio: str
    """The random trio's name in SHAPES."""
    training: Training
    """The trio that is trained here."""
    demo_prompts: int
    demo_longest: int
    trio_prompts: int
    trio_tokens: int
    mixed: Draw
    long_tail: Draw
    mixed_trio: Draw
    batches: tuple[int, ...]
    """Batch sizes of the paper's loop to choose its best from."""
    pair_tokens: int
    draft_lengths: tuple[int, ...]
    acceptances: tuple[float, ...]
    acceptance_batches: tuple[int, ...]
    acceptance_tokens: int
    """Per row, at batch 1 to 8; half of it above."""
    acceptance_systems: tuple[str, ...]
    table12: tuple[tuple[int, int], ...] = ((8, 512), (512, 8), (8, 8))
    """Prompt and output lengths."""
    table12_systems: tuple[str, ...] = ("demo", "trio")


FULL = Size(
    repeats=5,
    long_repeats=3,
    trio="110m+26m+26m",
    training=Training(demo_build.ModelShape(256, 8, 4, 2e-3), 0.15),
    demo_prompts=16,
    demo_longest=128,
    trio_prompts=2,
    trio_tokens=96,
    mixed=(128, 8, 256),
    long_tail=(192, 8, 256),
    mixed_trio=(64, 8, 128),
    batches=(8, 16, 32, 64, 128),
    pair_tokens=96,
    draft_lengths=(1, 2, 3, 4, 6),
    acceptances=(0.1, 0.4, 0.7, 0.8, 0.95),
    acceptance_batches=(1, 2, 4, 8, 16, 32, 64),
    acceptance_tokens=64,
    acceptance_systems=("demo", "trio"),
)
QUICK = Size(
    repeats=1,
    long_repeats=1,
    trio="110m+26m+26m",
    training=Training(demo_build.ModelShape(128, 2, 4, 3e-3), 0.005),
    demo_prompts=4,
    demo_longest=48,
    trio_prompts=1,
    trio_tokens=16,
    mixed=(24, 4, 64),
    long_tail=(24, 4, 64),
    mixed_trio=(12, 2, 16),
    batches=(8, 32),
    pair_tokens=16,
    draft_lengths=(3,),
    acceptances=(0.1, 0.8),
    acceptance_batches=(1, 8),
    acceptance_tokens=32,
    acceptance_systems=("demo",),
    table12=((8, 32), (32, 8), (8, 8)),
    table12_systems=("demo",),
)
CUDA = replace(
    FULL,
    trio="13b+7b+7b",
    training=Training(demo_build.ModelShape(512, 16, 8, 1e-3), 1.0),
    trio_prompts=2,
    trio_tokens=256,
    mixed_trio=(128, 8, 256),
    batches=(8, 16, 32, 64, 128),
    draft_lengths=(2, 3, 4, 6),
)
SMOKE = Size(
    repeats=1,
    long_repeats=1,
    trio="smoke",
    training=Training(demo_build.ModelShape(64, 2, 4, 5e-3), 0.002),
    demo_prompts=2,
    demo_longest=12,
    trio_prompts=1,
    trio_tokens=8,
    mixed=(10, 2, 12),
    long_tail=(10, 2, 12),
    mixed_trio=(6, 2, 8),
    batches=(8,),
    pair_tokens=6,
    draft_lengths=(2,),
    acceptances=(0.8,),
    acceptance_batches=(2,),
    acceptance_tokens=8,
    acceptance_systems=("demo",),
    table12=((8, 4), (8, 2)),
)
MAX_ROWS = 128


@dataclass
class Lab:
    """One run's settings and systems."""

    device: torch.device
    size: Size
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was measured, for the record."""
    heard: Callable[[Line], None] = lambda line: None
    """Gets every line as soon as it is known."""
    _began: float = field(default_factory=time.perf_counter)

    @property
    def dtype(self) -> torch.dtype:
        """float32 on the CPU, as proxytune has it; bfloat16 on a GPU."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a copy, measured once."""
        return copy_bandwidth(self.device)

    @cached_property
    def demo(self) -> Bench:
        """The demo system."""
        return self.note(demo_bench(MAX_ROWS))

    @cached_property
    def trained(self) -> Bench:
        """The trio that is trained here."""
        self.tell("a trio is trained")
        return self.note(trained_bench(self.size.training, self.device, self.dtype, MAX_ROWS, self.tell))

    @cached_property
    def trio(self) -> Bench:
        """The random trio on the CPU."""
        return self.note(random_bench(self.size.trio, self.device, self.dtype, MAX_ROWS))

    def note(self, bench: Bench) -> Bench:
        """Put a system on record."""
        self.systems[bench.name] = bench.describe()
        return bench

    def tell(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"{time.perf_counter() - self._began:7.1f} s {text}", file=sys.stderr, flush=True)

    def race(self, contenders: Sequence[Contender], repeats: int | None = None) -> list[Timed]:
        """Observe, then time in turn."""
        return race(contenders, repeats or self.size.repeats, self.tell)

    def _searched(self, contender: Contender) -> Timed | None:
        """One run; None where the batch does not fit into the GPU's memory."""
        try:
            return Timed(contender, observe(contender, self.tell))
        except torch.cuda.OutOfMemoryError:
            self.tell(f"  {contender.name}, batch {contender.batch}: does not fit")
            torch.cuda.empty_cache()
            return None

    def best_batch(self, bench: Bench, workload: Workload, rivals: Sequence[Contender]) -> PaperRace:
        """The paper's loop at its best batch, raced against others.

        Every batch size runs once; the two best then run in turn with the rivals, and the better median of
        them is the best batch."""
        count = len(workload.items)
        sizes = sorted({min(size, count) for size in self.size.batches})
        short = Workload("warm-up", tuple(workload.items[:2]))
        PaperLoop(bench, short, 2).run()
        loops = [PaperLoop(bench, workload, size).contender("paper's loop") for size in sizes]
        searched = [found for loop in loops if (found := self._searched(loop)) is not None]
        if not searched:
            raise UserError(f"no batch of the paper's loop fits: {sizes}")
        by_speed = sorted(searched, key=lambda one: one.observed.outcome.tokens_per_s, reverse=True)
        finalists, others = by_speed[:2], by_speed[2:]
        for one in others:
            one.runs.append(one.observed.outcome)
        timed = [Timed(rival, observe(rival, self.tell)) for rival in rivals]
        take_turns([*finalists, *timed], self.size.long_repeats, self.tell)
        best = max(finalists, key=lambda one: one.tokens_per_s)
        return PaperRace(best, [one for one in searched if one is not best], timed)


@dataclass(frozen=True)
class PaperRace:
    """The paper's loop at its best batch, at the others, and the rivals."""

    best: Timed
    losing: list[Timed]
    rivals: list[Timed]


@dataclass
class Table:
    """Collects the lines of one case."""

    lab: Lab
    case: str
    report: Report = field(default_factory=Report)

    def put(
        self,
        oracle: Oracle,
        timed: Sequence[Timed],
        *,
        synthetic_acceptance: float | None = None,
        plain: Timed | None = None,
    ) -> None:
        """Add lines."""
        for one in timed:
            found = line(
                self.case,
                oracle,
                one,
                self.lab.bandwidth,
                synthetic_acceptance=synthetic_acceptance,
                plain=plain,
            )
            self.report.lines.append(found)
            self.lab.heard(found)

    def ratio(self, name: str, one: Timed, other: Timed) -> None:
        """How much faster one is than the other."""
        self.report.ratios[name] = one.versus(other)


def proxy_oracle(bench: Bench, workload: Workload, paper: Timed) -> Oracle:
    """The right tokens of the proxy, from the paper's loop."""
    return Oracle(bench, workload, paper.observed.outcome.tokens)


def alone_oracle(bench: Bench, workload: Workload, hugging_face: Timed, role: str = "base") -> Oracle:
    """The right tokens of one model alone, from `generate`."""
    return Oracle(bench, workload, hugging_face.observed.outcome.tokens, (role,))
