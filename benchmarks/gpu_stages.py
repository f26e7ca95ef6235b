"""What the stages of `gpu_day.py` measure: the machine, and trios of random weights made on the device.

A stage hands every figure over as soon as it has it. Stages of one trio share its weights and its pools, and
each runs by itself too: what it needs of an earlier one it measures again."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.baselines import HuggingFace, PaperLoop
from benchmarks.cases_cpu import ACCEPTANCE, vocabulary
from benchmarks.lab import CUDA, SMOKE, Lab, Table, alone_oracle, proxy_oracle
from benchmarks.measure import Outcome, Timed, observe, synchronise
from benchmarks.ours import Ours
from benchmarks.record import Line, Oracle, environment
from benchmarks.shapes import Bench, in_memory, kv_bytes_per_token, random_bench
from benchmarks.stages import NotHere, Say, Work
from benchmarks.workloads import Workload, random_contexts, uniform, workload
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.graphs import Graphs, StepShape

REPEATS = 3
"""Timed runs of ours; those that take long run once."""
FEW = 4
"""Rows of the comparison with eager steps."""
ROOM = 32
"""Tokens of a row's pages that drafts may take."""
PROFILED = 8
"""Which step of a run is profiled."""
NEAR_TIE = 0.2
"""Standard deviations of the logits, as in the tests on a GPU."""
KERNELS = 25
"""Kernels that are named, those that take longest first."""


@dataclass(frozen=True)
class Plan:
    """How much of a trio is measured."""

    shape: str
    rows: int
    """Decoded together, in the stage of a batch."""
    prompt: int
    new: int
    gigabytes: float = 0.0
    """Memory of the device without which it does not fit."""


SMALL_13B = Plan("13b+7b+7b", rows=40, prompt=64, new=96, gigabytes=75)
LARGE_13B = replace(SMALL_13B, rows=64, gigabytes=110)
PLAN_70B = Plan("70b-int8+7b+7b", rows=16, prompt=64, new=64, gigabytes=120)
SMOKE_TRIO = Plan("smoke", rows=3, prompt=6, new=10)
SMOKE_INT8 = replace(SMOKE_TRIO, shape="smoke-int8")


def lab_for(smoke: bool) -> Lab:
    """Where it is measured: the GPU, or the CPU in a smoke run."""
    return Lab(torch.device("cpu"), SMOKE) if smoke else Lab(torch.device("cuda"), CUDA)


def recover() -> None:
    """After an exception: give memory back. Raises where the device does not answer any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# The machine


def machine(smoke: bool) -> Work:
    """Stages that need no large models."""
    lab = lab_for(smoke)
    return {"bandwidth": partial(bandwidth, lab), "float32": partial(float32, lab)}


def bandwidth(lab: Lab, say: Say) -> None:
    """The card, the versions, and what a copy moves."""
    found = environment(lab.device, lab.bandwidth, {})
    if lab.device.type == "cuda":
        properties = torch.cuda.get_device_properties(lab.device)
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    say("environment", **found)


def float32(lab: Lab, say: Say) -> None:
    """Ragged prompts in float32: the same weights on the CPU and on the device, the tokens of both."""
    rows, longest = 8, 32
    name = SMOKE.trio if lab.device.type == "cpu" else "110m+26m+26m"
    bench = random_bench(name, torch.device("cpu"), torch.float32, rows, rows * (40 + longest + ROOM))
    there = {role: copy.deepcopy(module).to(lab.device) for role, module in bench.plain.items()}
    device = replace(bench, plain=there, models=in_memory(there))
    work = workload("ragged", random_contexts(rows, 5, 40, vocabulary(bench)), uniform(rows, 24, longest))
    oracle = Oracle(bench, work, Ours(bench, work, max_rows=rows).run().tokens)
    found = compared(oracle, Ours(device, work, max_rows=rows).run())
    say("tokens", **found, system=name, of="the device against the CPU")
    near(found["diverged"], found["widest_tie"])


# A trio


@dataclass
class Trio:
    """Three models, and what their stages have measured so far."""

    lab: Lab
    plan: Plan
    say: Say
    """Of the stage that runs."""

    @cached_property
    def bench(self) -> Bench:
        """Its models."""
        lab, plan = self.lab, self.plan
        if lab.device.type == "cuda":
            have = torch.cuda.get_device_properties(lab.device).total_memory / 1e9
            if have < plan.gigabytes:
                raise NotHere(f"it needs {plan.gigabytes:.0f} GB, and the card has {have:.0f}")
        lab.tell(f"a copy moves {lab.bandwidth / 1e9:.0f} GB/s")  # measured before memory is short
        recover()
        tokens = plan.rows * (plan.prompt + plan.new + ROOM)
        made = lab.note(random_bench(plan.shape, lab.device, lab.dtype, plan.rows, tokens))
        self.say("system", name=made.name, **made.describe())
        return made

    @cached_property
    def ours(self) -> Ours:
        """Plain decoding of one row, over pools for many."""
        return Ours(self.bench, self.one, decoder=self.bench.decoder("proxy"))

    @cached_property
    def one(self) -> Workload:
        """A single request."""
        return self._requests(1)

    def _requests(self, rows: int) -> Workload:
        prompts = random_contexts(rows, self.plan.prompt, self.plan.prompt, vocabulary(self.bench))
        return workload(
            f"{self.plan.prompt} + {self.plan.new} tokens",
            prompts,
            [self.plan.new] * rows,
            one_by_one=rows == 1,
        )

    @cached_property
    def table(self) -> Table:
        """What hears of every line."""
        self.lab.heard = self._tell
        return Table(self.lab, self.plan.shape)

    def _tell(self, line: Line) -> None:
        self.say("line", **asdict(line))
        near(line.diverged, line.widest_tie)

    @cached_property
    def plain(self) -> Timed:
        """Ours at batch 1 without drafts."""
        [timed] = self.lab.race([self.ours.contender("plain")], REPEATS)
        return timed

    @cached_property
    def truth(self) -> Mapping[int, Any]:
        """Its tokens."""
        return self.plain.observed.outcome.tokens

    @cached_property
    def paper(self) -> Timed:
        """The paper's loop at batch 1."""
        [timed] = self.lab.race([PaperLoop(self.bench, self.one).contender("paper's loop, batch 1")], 1)
        return timed

    def eager(self) -> None:
        """Steps that the host launches kernel by kernel, and the same in CUDA graphs."""
        few = self._requests(min(FEW, self.plan.rows))
        many = replace(self.ours, workload=few, max_rows=len(few.items))
        with engine_steps():
            slow = self._once(self.ours, "plain, eager steps")
            tokens = many.run().tokens
        oracle = Oracle(self.bench, self.one, slow.observed.outcome.tokens)
        self.table.put(oracle, [slow])
        contender = replace(self.plain.contender, name="plain, against eager steps")
        self.table.put(oracle, [replace(self.plain, contender=contender)])
        found, made = compared(Oracle(self.bench, few, tokens), many.run()), self._graphs()
        self.say("tokens", **found, system=self.plan.shape, of="captured steps against eager ones", **made)
        if self.lab.device.type == "cuda" and not made["graphs"]:
            raise RuntimeError(f"no step was captured: {made}")
        near(found["diverged"], found["widest_tie"])

    def _once(self, ours: Ours, name: str) -> Timed:
        """One run, which counts."""
        seen = observe(ours.contender(name), self.lab.tell)
        return Timed(ours.contender(name), seen, [seen.outcome])

    def _graphs(self) -> dict[str, Any]:
        """What became of the captures."""
        made = self.ours.graphs
        return {
            "graphs": sum(one.made for one in made),
            "refused": [one.refused for one in made if one.refused is not None],
            "without_memory": sum(len(one.dropped) for one in made),
            "branches_in_parallel": [one.parallel for one in made],
        }

    def against_the_paper(self) -> None:
        """The paper's loop, and ours against its tokens."""
        oracle = proxy_oracle(self.bench, self.one, self.paper)
        self.table.put(oracle, [self.paper, self.plain])

    def alone(self) -> None:
        """The base without experts: Hugging Face's `generate`, and ours."""
        theirs = HuggingFace(self.bench, self.one).contender("Hugging Face generate, base alone")
        [generated] = self.lab.race([theirs], 1)
        oracle = alone_oracle(self.bench, self.one, generated)
        self.table.put(oracle, [generated])
        tokens = self.plan.prompt + self.plan.new + 2 * ROOM
        memory = tokens * kv_bytes_per_token(self.bench.plain["base"])
        small = replace(self.bench, max_rows=1, kv_memory=memory)
        [base] = self.lab.race([Ours(small, self.one, "base").contender("base alone")], REPEATS)
        self.table.put(oracle, [base])

    def drafts(self, k: int) -> None:
        """So many drafts a step, of which a fixed share is right."""
        plain, truth = self.plain, self.truth
        drafting = self.ours.with_synthetic_acceptance(ACCEPTANCE, truth, k)
        [timed] = self.lab.race([drafting.contender(f"speculative, k = {k}")], REPEATS)
        oracle = Oracle(self.bench, self.one, truth)
        self.table.put(oracle, [timed], plain=plain, synthetic_acceptance=ACCEPTANCE)

    def batch(self) -> None:
        """Many rows: ours, and the paper's loop at the largest batch that fits."""
        rows = self.plan.rows
        work = self._requests(rows)
        ours = replace(self.ours, workload=work, max_rows=rows)
        [timed] = self.lab.race([ours.contender("plain")], 1)
        own = Oracle(self.bench, work, timed.observed.outcome.tokens)
        self.table.put(own, [timed])
        while rows >= 1:
            loop = PaperLoop(self.bench, work, rows)
            try:
                seen = observe(loop.contender("paper's loop"), self.lab.tell)
            except torch.cuda.OutOfMemoryError:
                self.lab.tell(f"the paper's loop does not fit at batch {rows}")
                rows //= 2
            else:
                self.table.put(own, [Timed(loop.contender("paper's loop"), seen, [seen.outcome])])
                return
            recover()

    def replay(self) -> None:
        """The kernels of one step, by name."""
        self.plain.contender.run()  # warm, whatever ran before
        seen = one_step(self.plain.contender.run, self.lab.device)
        if not seen and self.lab.device.type == "cpu":
            raise NotHere("on the CPU no step is one that a GPU replays")
        if not seen:
            raise RuntimeError(f"no step ran on the device: {self._graphs()}")
        shape, averages = seen[0]
        timed = [(one.key, one.count, own_us(one, self.lab.device)) for one in averages]
        kernels = [one for one in timed if one[2] > 0]
        whole = sum(us for *_, us in kernels)
        kernels.sort(key=lambda one: -one[2])
        self.say(
            "profile",
            system=self.plan.shape,
            rows=shape.rows,
            k=shape.ahead.k,
            kernels=sum(count for _, count, _ in kernels),
            ms=round(whole / 1e3, 3),
            step_ms=round(self.plain.gap(0.5), 3),
            top=[
                (name[:90], count, round(us, 1), round(us / whole, 4))
                for name, count, us in kernels[:KERNELS]
            ],
        )


def trio(plan: Plan, smoke: bool) -> Work:
    """The stages of a trio."""
    state = Trio(lab_for(smoke), plan, nobody)

    def stage(method: Callable[[], None]) -> Callable[[Say], None]:
        def run(say: Say) -> None:
            state.say = say
            method()

        return run

    drafting = {f"synthetic acceptance, k = {k}": stage(partial(state.drafts, k)) for k in (1, 3, 4)}
    return {
        "graphs and eager steps": stage(state.eager),
        "the paper's loop": stage(state.against_the_paper),
        "base alone": stage(state.alone),
        **drafting,
        "batch": stage(state.batch),
        "one replay": stage(state.replay),
    }


def nobody(kind: str, **found: object) -> None:
    """No stage runs."""
    raise AssertionError(f"{kind}: said outside of a stage")


def trio_13b(smoke: bool) -> Work:
    """The 13B trio, with more rows where there is more memory."""
    if smoke:
        return trio(SMOKE_TRIO, smoke)
    large = torch.cuda.get_device_properties(0).total_memory / 1e9 >= LARGE_13B.gigabytes
    return trio(LARGE_13B if large else SMALL_13B, smoke)


def trio_70b(smoke: bool) -> Work:
    """The trio with a 70B base in 8 bits."""
    return trio(SMOKE_INT8 if smoke else PLAN_70B, smoke)


# What they share


def compared(oracle: Oracle, outcome: Outcome) -> dict[str, Any]:
    """How far tokens agree with the oracle's."""
    diverged, widest = oracle.compare([outcome])
    return {"rows": len(oracle.workload.items), "diverged": diverged, "widest_tie": widest}


def near(diverged: int, widest: float | None) -> None:
    """Rows may part where two tokens are about as good as each other, and nowhere else."""
    if widest is not None and not widest < NEAR_TIE:
        raise RuntimeError(f"{diverged} rows part, at margins up to {widest:.2g} sd: more than a near-tie")


@contextmanager
def engine_steps() -> Iterator[None]:
    """The engine's own steps in place of those that live on the device."""
    with mock.patch.object(device_loop, "DEVICES", set[str]()):
        yield


def one_step(run: Callable[[], object], device: torch.device) -> list[tuple[StepShape, Any]]:
    """A run in which one step is profiled -> its shape and profile; empty where no step ran on the device."""
    original, seen, count = Graphs.run, list[tuple[StepShape, Any]](), 0

    def watched(graphs: Graphs, shape: StepShape) -> Tensor:
        nonlocal count
        count += 1
        if count != PROFILED:
            return original(graphs, shape)
        synchronise(device)
        what = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[what]) as profiled:
            output = original(graphs, shape)
            synchronise(device)
        seen.append((shape, profiled.key_averages()))
        return output

    with mock.patch.object(Graphs, "run", watched):
        run()
    return seen


def own_us(event: Any, device: torch.device) -> float:
    """Microseconds of a kernel on the GPU; on the CPU, of an operation without those in it."""
    return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
