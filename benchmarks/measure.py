"""The clock: timed runs side by side, what they read, hold and wait for.

Contenders of one comparison run in turn (A B C A B C ...), so that a slow minute of the machine hits all of
them; a figure is the median of the turns. Before that each runs once under observation (this is the warm-up):
weights and KV that its forwards read, memory, host synchronisations. A contender whose last run has made CUDA
graphs runs again first. Timed runs have no hooks."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.shapes import kv_bytes_per_token, read_bytes
from proxytune.engine.cuda.attention import DevicePacked

MIB = 2**20
WARM_UPS = 8
"""Most runs before the clock counts, where each has made new CUDA graphs."""
COPY_BYTES = {"cpu": 256 * MIB, "cuda": 4096 * MIB}


@dataclass
class Outcome:
    """One run of one contender."""

    seconds: float
    tokens: Mapping[int, Sequence[int]]
    """Response ids by the item's tag."""
    first: Sequence[float]
    """Seconds from a request's submission to its first token."""
    gaps: Sequence[float]
    """Seconds per token of a row, one entry per step."""
    drafted: int = 0
    """Drafts that the proxy looked at."""
    accepted: int = 0
    row_steps: int = 0
    """Steps, counted once per row."""

    @property
    def count(self) -> int:
        """Response tokens in all."""
        return sum(map(len, self.tokens.values()))

    @property
    def tokens_per_s(self) -> float:
        """Response tokens of all rows per second, prefill included."""
        return self.count / self.seconds


@dataclass(frozen=True)
class Contender:
    """Something to be timed."""

    name: str
    run: Callable[[], Outcome]
    modules: Callable[[], Sequence[PreTrainedModel]]
    """The models whose forwards count."""
    batch: int = 1
    owed: Callable[[], int] | None = None
    """Bytes that have to be read, where that is known beforehand: for forwards that replay a CUDA graph."""
    entrances: Callable[[], Mapping[int, nn.Module]] = dict
    """What is called in a module's place, by the module's id."""
    graphs_made: Callable[[], int] = int
    """How many CUDA graphs it has made so far: making one takes longer than many steps."""


@dataclass
class Observed:
    """What the warm-up run showed."""

    outcome: Outcome
    bytes_read: int
    """0 where it is not known."""
    memory: int | None
    """Weights of the contender's models, and what the process grew by."""
    syncs: int | None


@dataclass
class Timed:
    """A contender's runs."""

    contender: Contender
    observed: Observed
    runs: list[Outcome] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median seconds of a run."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def tokens_per_s(self) -> float:
        """Median tokens per second."""
        return statistics.median(run.tokens_per_s for run in self.runs)

    def versus(self, other: Timed) -> float:
        """How much faster this one is: the median over the turns of two speeds in the same turn, or of two
        medians where they did not run in the same turns."""
        if len(self.runs) != len(other.runs):
            return self.tokens_per_s / other.tokens_per_s
        pairs = zip(self.runs, other.runs, strict=True)
        return statistics.median(one.tokens_per_s / two.tokens_per_s for one, two in pairs)

    def gap(self, share: float) -> float:
        """A quantile of the milliseconds per token, over the steps of all runs."""
        gaps = sorted(gap for run in self.runs for gap in run.gaps)
        return 1e3 * gaps[min(len(gaps) - 1, int(share * len(gaps)))]

    @property
    def first(self) -> float:
        """Median milliseconds to a request's first token."""
        return 1e3 * statistics.median(first for run in self.runs for first in run.first)


def race(contenders: Sequence[Contender], repeats: int, tell: Callable[[str], None]) -> list[Timed]:
    """Observe every contender once, then time them in turn."""
    timed = [Timed(contender, observe(contender, tell)) for contender in contenders]
    take_turns(timed, repeats, tell)
    return timed


def take_turns(timed: Sequence[Timed], repeats: int, tell: Callable[[str], None]) -> None:
    """Time observed contenders in turn."""
    for turn in range(repeats):
        for one in timed:
            one.runs.append(one.contender.run())
            speed = one.runs[-1].tokens_per_s
            tell(f"  {one.contender.name}: {speed:.1f} tokens/s ({turn + 1} of {repeats})")


def observe(contender: Contender, tell: Callable[[str], None]) -> Observed:
    """One run under observation."""
    tell(f"  {contender.name}: warm-up")
    cuda = torch.cuda.is_available()
    with growth() as grown, reads(contender.modules, contender.entrances()) as read, host_syncs() as syncs:
        made, outcome = contender.graphs_made(), contender.run()
    for _ in range(WARM_UPS):
        if contender.graphs_made() == made:
            break
        made, _ = contender.graphs_made(), contender.run()
    weights = sum(read_bytes(module) for module in distinct(contender.modules()))
    memory = None if grown.value is None else weights + grown.value
    seen = read.forwards >= len(outcome.gaps) and not read.hidden
    bytes_read = read.bytes if seen else contender.owed() if contender.owed is not None else 0
    return Observed(outcome, bytes_read, memory, syncs.value if cuda else None)


def distinct(modules: Sequence[PreTrainedModel]) -> list[PreTrainedModel]:
    """Every module once: two roles can share one."""
    return list({id(module): module for module in modules}.values())


@dataclass
class Reading:
    """What forwards have read so far."""

    bytes: int = 0
    forwards: int = 0
    hidden: bool = False
    """Whether some forwards were of steps that become graphs, or read a cache that is not looked into."""


@contextmanager
def reads(
    modules: Callable[[], Sequence[PreTrainedModel]], entrances: Mapping[int, nn.Module]
) -> Iterator[Reading]:
    """Count the forwards of some modules, with the weights and the KV that each has to read. `entrances`:
    what is called in a module's place, by the module's id.

    A replayed CUDA graph calls no module: its forwards are not seen, nor are those by which it is made."""
    reading, hooks = Reading(), []
    for module in distinct(modules()):
        weights, per_token = read_bytes(module), kv_bytes_per_token(module)

        def count(
            _module: Any, _inputs: Any, arguments: dict[str, Any], w: int = weights, kv: int = per_token
        ) -> None:
            if isinstance(arguments.get("packed"), DevicePacked) or "cache" in arguments:
                reading.hidden = True
                return
            reading.forwards += 1
            reading.bytes += w + kv * kv_tokens(arguments)

        entrance = entrances.get(id(module), module)
        hooks.append(entrance.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield reading
    finally:
        for hook in hooks:
            hook.remove()


def kv_tokens(arguments: Mapping[str, Any]) -> int:
    """Tokens whose keys and values a forward reads: from our packed state, or from Hugging Face's cache."""
    packed, cache = arguments.get("packed"), arguments.get("past_key_values")
    if packed is not None:
        parts = getattr(packed, "parts", (packed,))
        return sum(length for part in parts for group in part.groups for length in group.lengths)
    if cache is None:
        return 0
    rows, new = arguments["input_ids"].shape
    return int(rows) * (int(cache.get_seq_length()) + int(new))


@dataclass
class Measured:
    """A number that is known when its context ends; None where it cannot be had."""

    value: int | None = None


@contextmanager
def growth() -> Iterator[Measured]:
    """Bytes that the process (CPU: resident memory, Linux only; CUDA: allocations) grew by at its fullest."""
    found = Measured()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.value = max(0, torch.cuda.max_memory_allocated() - before)
        return
    if not _reset_peak():
        yield found
        return
    before = psutil.Process().memory_info().rss
    yield found
    found.value = max(0, _peak_resident() - before)


def _reset_peak() -> bool:
    """Make the kernel forget the process's peak of resident memory (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(kilobytes)


@contextmanager
def host_syncs() -> Iterator[Measured]:
    """How often the host waited for the GPU, as torch's sync debug mode sees it (explicit waits on events and
    streams are not among them)."""
    found = Measured()
    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.value = sum("called a synchronizing" in str(warning.message) for warning in seen)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock shows work that is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, repeats: int = 9) -> float:
    """Bytes per second of a large copy on the device, read and written bytes together: the measured
    bandwidth."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size / statistics.median(seconds)
