"""What a run of the benchmarks puts down: one line per contender, ratios, the environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.measure import Outcome, Timed
from benchmarks.paper_loop import combined_logits
from benchmarks.shapes import TRIO, Bench
from benchmarks.workloads import Workload
from proxytune import __version__
from proxytune.engine.kernels.cpu_attention import why_not
from proxytune.provenance import provenance


@dataclass(frozen=True)
class Line:
    """One contender's figures. Null means that the figure cannot be had there."""

    case: str
    system: str
    workload: str
    name: str
    batch: int
    """Rows decoded together, at most."""
    requests: int
    prompt_tokens: float
    """Mean length of the base's prompts."""
    new_tokens: int
    """Response tokens in all."""
    runs: list[float]
    """Tokens per second of every timed run."""
    seconds: float
    """Median seconds of a run."""
    tokens_per_s: float
    """All rows together, prefill included; median."""
    ms_per_token_p50: float
    ms_per_token_p95: float
    """Milliseconds between the tokens of one row, over all steps of all runs."""
    first_token_ms: float
    """From a request's submission to its first token; median. Where all requests come at once, waiting
    included."""
    gb_per_s: float | None
    """Weights and KV that the forwards had to read, per second."""
    floor_percent: float | None
    """The same in percent of the copy bandwidth measured in this process."""
    memory_mb: float | None
    """Weights of its models and what the process grew by."""
    syncs_per_token: float | None
    """Host waits for the device per step token, CUDA only."""
    acceptance: float | None
    """Share of the examined drafts that were accepted."""
    accepted_per_step: float | None
    """Mean accepted drafts per row and step."""
    tokens_equal: bool
    """Whether the tokens of every run are those of the oracle."""
    diverged: int
    """Rows that differ from it, over all runs."""
    widest_tie: float | None
    """The largest margin, in standard deviations of the logits, that a divergence began at."""
    dial: float | None = None
    """The synthetic acceptance, where it is not measured. (The name of the stored key.)"""
    versus_plain: float | None = None
    """Speed against plain decoding of the same workload."""


@dataclass
class Report:
    """What a case found."""

    lines: list[Line] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Append another case's findings."""
        self.lines += other.lines
        self.ratios |= other.ratios

    def as_json(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The promised object."""
        return {
            "ratios": self.ratios,
            "rows": [asdict(line) for line in self.lines],
            "environment": dict(environment),
        }


@dataclass(frozen=True)
class Oracle:
    """The right tokens, and the models that give them: the paper's loop, or Hugging Face's `generate` for a
    model alone."""

    bench: Bench
    workload: Workload
    tokens: Mapping[int, Sequence[int]]
    roles: tuple[str, ...] = TRIO

    def check(self, timed: Timed) -> tuple[int, float | None]:
        """Rows that diverged in any run, and the widest margin at which one began to. The warm-up can be one
        of the runs."""
        runs = {id(run): run for run in (timed.observed.outcome, *timed.runs)}
        return self.compare(runs.values())

    def compare(self, runs: Iterable[Outcome]) -> tuple[int, float | None]:
        """The same of single runs."""
        diverged, widest = 0, 0.0
        for run in runs:
            for item in self.workload.items:
                generated, wanted = run.tokens[item.tag], self.tokens[item.tag]
                if list(generated) == list(wanted):
                    continue
                diverged += 1
                widest = max(widest, self._margin(item.contexts, generated, wanted))
        return diverged, widest if diverged else None

    def _margin(
        self, contexts: Mapping[str, Sequence[int]], generated: Sequence[int], wanted: Sequence[int]
    ) -> float:
        """How far apart the two tokens were where the responses part."""
        pairs = enumerate(zip(generated, wanted, strict=False))
        at = next((index for index, (one, other) in pairs if one != other), None)
        if at is None:
            raise RuntimeError(f"{len(generated)} tokens where {len(wanted)} were forced")
        models = {role: self.bench.plain[role] for role in self.roles}
        prompts = {role: contexts.get(role, contexts["base"]) for role in self.roles}
        logits = combined_logits(models, prompts, wanted[:at])
        return float((logits[generated[at]] - logits[wanted[at]]).abs() / logits.std())


def line(
    case: str,
    oracle: Oracle,
    timed: Timed,
    bandwidth: float,
    *,
    synthetic_acceptance: float | None = None,
    plain: Timed | None = None,
) -> Line:
    """The figures of one contender."""
    workload, observed = oracle.workload, timed.observed
    seen = observed.bytes_read > 0
    drafted, accepted, steps = (
        sum(getattr(run, name) for run in timed.runs) for name in ("drafted", "accepted", "row_steps")
    )
    speed = observed.bytes_read / timed.seconds
    diverged, widest = oracle.check(timed)
    return Line(
        case=case,
        system=oracle.bench.name,
        workload=workload.name,
        name=timed.contender.name,
        batch=timed.contender.batch,
        requests=len(workload.items),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.tokens,
        runs=[run.tokens_per_s for run in timed.runs],
        seconds=timed.seconds,
        tokens_per_s=timed.tokens_per_s,
        ms_per_token_p50=timed.gap(0.5),
        ms_per_token_p95=timed.gap(0.95),
        first_token_ms=timed.first,
        gb_per_s=speed / 1e9 if seen else None,
        floor_percent=100 * speed / bandwidth if seen else None,
        memory_mb=None if observed.memory is None else observed.memory / 1e6,
        syncs_per_token=None if observed.syncs is None else observed.syncs / observed.outcome.count,
        acceptance=accepted / drafted if drafted else None,
        accepted_per_step=accepted / steps if steps else None,
        tokens_equal=diverged == 0,
        diverged=diverged,
        widest_tie=widest,
        dial=synthetic_acceptance,
        versus_plain=None if plain is None else timed.versus(plain),
    )


def environment(
    device: torch.device, bandwidth: float, systems: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The machine, the versions and the systems."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    made = provenance(__version__, name, torch.get_num_threads())
    return {
        **made.model_dump(mode="json"),
        "copy_gb_per_s": bandwidth / 1e9,
        "cpu_attention": why_not() or "our kernel",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "systems": dict(systems),
    }


def _processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as content:
            names = [text.split(":", 1)[1].strip() for text in content if text.startswith("model name")]
    except OSError:
        names = []
    return f"cpu: {names[0]}, {len(names)} cores" if names else "cpu"
