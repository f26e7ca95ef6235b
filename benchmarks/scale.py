"""Data-parallel throughput against the number of workers, simulated with measured step times.

    python benchmarks/scale.py --measure                     # the demo's step times here, then the table
    python benchmarks/scale.py --step 0.020,0.0004 --tokens 250 --examples 10000 --load 60

Examples are given out by the code of the Ray pool (`proxytune.scale.parts.Queue`). What is simulated is
the rest: a worker's step takes `fixed + per_row * rows` seconds, rows leave as their responses end, some
workers are slow, some die and are started again. No network is simulated: an example and its response are
some kilobytes."""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from proxytune.config import AlphaSchedule, Sampling, load_system
from proxytune.decoding import Decoder
from proxytune.models import Models
from proxytune.options import DecodeOptions
from proxytune.records import Example, Prompt
from proxytune.scale.parts import AskedExample, Queue

ALPHA = AlphaSchedule()
WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Workload:
    """What is decoded, and how fast one worker does it."""

    fixed: float
    """Seconds of a step, whatever its rows."""
    per_row: float
    """Seconds of a step for each row."""
    batch: int
    """Rows that a worker decodes together at most."""
    lengths: tuple[int, ...]
    """Tokens of every response."""
    load: float
    """Seconds until a worker has its models loaded."""

    def step(self, rows: int) -> float:
        """Seconds of a step of so many rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Trouble:
    """What goes wrong."""

    name: str
    slow: float = 0.0
    """Share of the workers that are slow."""
    factor: float = 1.0
    """How much longer a step of those takes."""
    between: float | None = None
    """Seconds that a worker lives, on average; None where none is lost."""


TROUBLES = (
    Trouble("none"),
    Trouble("1 in 8 half as fast", slow=1 / 8, factor=2.0),
    Trouble("each lost once an hour", between=3600.0),
)


@dataclass(frozen=True)
class Outcome:
    """How a simulated run went."""

    workers: int
    seconds: float
    tokens: int
    lost: int
    """Workers that died."""
    repeated: int
    """Tokens that were decoded again."""

    @property
    def speed(self) -> float:
        """Tokens of the results per second of the run, loading included."""
        return self.tokens / self.seconds


def finished_at(workload: Workload, lengths: Sequence[int], factor: float) -> list[float]:
    """Seconds after which each response of a part ends: rows are replaced as they end, as in the engine."""
    waiting, ends = list(enumerate(lengths))[::-1], [0.0] * len(lengths)
    rows: list[tuple[int, int]] = []  # (step at which it ends, place)
    step, now = 0, 0.0
    while waiting or rows:
        while waiting and len(rows) < workload.batch:
            place, length = waiting.pop()
            heapq.heappush(rows, (step + length, place))
        until = rows[0][0]
        now += (until - step) * workload.step(len(rows)) * factor
        step = until
        while rows and rows[0][0] == step:
            ends[heapq.heappop(rows)[1]] = now
    return ends


def simulate(workload: Workload, workers: int, trouble: Trouble, seed: int = 0) -> Outcome:
    """One run."""
    noise = random.Random(seed)
    factors = [trouble.factor if i < round(workers * trouble.slow) else 1.0 for i in range(workers)]
    asked = [AskedExample(Example(str(i), Prompt("", "")), (ALPHA,)) for i in range(len(workload.lengths))]
    queue = Queue.of(asked, workload.batch, workers)

    def dies(now: float) -> float:
        return now + noise.expovariate(1 / trouble.between) if trouble.between else float("inf")

    free = [(workload.load, worker) for worker in range(workers)]
    heapq.heapify(free)
    death = [dies(workload.load) for _ in range(workers)]
    idle: list[tuple[float, int]] = []
    losses: list[tuple[float, int, int]] = []  # when, part, worker: what of it has not come back is lost then
    end, lost, repeated = 0.0, 0, 0
    while queue.left:
        if losses and (not free or losses[0][0] <= free[0][0]):
            when, part, worker = heapq.heappop(losses)
            queue.lost(part)
            free += [(max(when, since), who) for since, who in idle] + [(when + workload.load, worker)]
            heapq.heapify(free)
            idle.clear()
            continue
        now, worker = heapq.heappop(free)
        taken = queue.take()
        if taken is None:
            idle.append((now, worker))
            continue
        part, examples = taken
        lengths = [workload.lengths[int(one.example.id)] for one in examples]
        ends = [now + seconds for seconds in finished_at(workload, lengths, factors[worker])]
        for one, length, at in zip(examples, lengths, ends, strict=True):
            if at <= death[worker]:
                queue.came(part, (one.example.id, ALPHA))
                end = max(end, at)
            else:
                repeated += length
        if max(ends) <= death[worker]:
            queue.ended(part)
            heapq.heappush(free, (max(ends), worker))
            continue
        lost += 1
        when = max(death[worker], now)
        heapq.heappush(losses, (when, part, worker))
        death[worker] = dies(when + workload.load)
    return Outcome(workers, end, sum(workload.lengths), lost, repeated)


def lengths_of(examples: int, mean: float, seed: int = 0) -> tuple[int, ...]:
    """Lengths of responses: geometric, as where every token is as likely to be the last."""
    noise = random.Random(seed)
    return tuple(1 + int(noise.expovariate(1 / max(mean - 1, 1e-9))) for _ in range(examples))


def measured(batches: Sequence[int] = (1, 8, 32), tokens: int = 32) -> tuple[float, float]:
    """(fixed, per row): a line through the step times of the demo's proxy on this machine, by least
    squares."""
    system = load_system("demo")
    decoder = Decoder(Models(system), "proxy", DecodeOptions(speculate="off"))
    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens)
    points = []
    for batch in batches:
        examples = [Example(str(i), Prompt(f"Question {i}: how many", "")) for i in range(batch)]
        list(decoder.stream(examples, sampling))  # caches are made
        before = decoder.stats.seconds - decoder.stats.prefill_seconds
        list(decoder.stream(examples, sampling))
        after = decoder.stats.seconds - decoder.stats.prefill_seconds
        points.append((batch, (after - before) / tokens))
    slope, fixed = linear_regression(*zip(*points, strict=True))
    return fixed, slope


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="take the step times of the demo here")
    parser.add_argument("--step", default="0.030,0.0004", help="seconds of a step: fixed,per row")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--tokens", type=float, default=250, help="mean tokens of a response")
    parser.add_argument("--load", type=float, default=60, help="seconds until a worker is ready")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    began = time.perf_counter()
    fixed, per_row = measured() if given.measure else map(float, given.step.split(","))
    workload = Workload(fixed, per_row, given.batch, lengths_of(given.examples, given.tokens), given.load)
    rows = [(trouble, simulate(workload, n, trouble)) for trouble in TROUBLES for n in WORKERS]
    alone = next(
        outcome.speed for trouble, outcome in rows if outcome.workers == 1 and trouble.name == "none"
    )
    if given.json:
        table = [
            {"trouble": trouble.name, "scaling": outcome.speed / alone, **vars(outcome)}
            for trouble, outcome in rows
        ]
        print(json.dumps({"fixed": fixed, "per_row": per_row, "rows": table}))
        return
    print(f"a step: {fixed * 1e3:.2f} ms + {per_row * 1e3:.3f} ms per row; {given.examples} responses")
    print("| trouble | workers | minutes | tokens/s | times one | of ideal | lost | decoded again |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for trouble, outcome in rows:
        times = outcome.speed / alone
        again = outcome.repeated / outcome.tokens
        print(
            f"| {trouble.name} | {outcome.workers} | {outcome.seconds / 60:.1f} | {outcome.speed:.0f} | "
            f"{times:.2f} | {times / outcome.workers:.0%} | {outcome.lost} | {again:.1%} |"
        )
    print(f"simulated in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
