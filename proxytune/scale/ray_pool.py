"""A pool of workers on Ray that decodes as one decoder does: examples go to whoever is free, what comes back
is handed on at once, and what a lost worker had is decoded again by another."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proxytune import __version__
from proxytune.config import AlphaSchedule, RunSpec, Sampling, TraceKind
from proxytune.errors import UserError, needs_extra
from proxytune.options import DecodeOptions, RayOptions
from proxytune.records import Completion, Example, JsonRow, RoleMemory, WorkerFacts
from proxytune.scale.parts import AskedExample, Found, Queue, Settings, WorkerState
from proxytune.scale.worker import Worker, WorkerSetup
from proxytune.terminal import WorkSoFar

LOSSES_PER_WORKER = 3
"""Workers that may be lost, for each that was asked for: what kills every worker must come to an end."""
FIRST_WORKER = 900
"""Seconds in which the first worker must have its models loaded."""
TOGETHER = 128
"""Sequences that a worker decodes together where nothing else is asked for."""


@dataclass
class Member:
    """A worker as the driver sees it."""

    actor: Any
    loading: Any
    """The reference of its state, until it is there."""
    state: WorkerState | None = None
    stream: Any = None
    part: int = 0
    """The part that it is at; 0 where it is free."""


@dataclass
class RayPool:
    """Decodes on the workers of a Ray cluster what a Decoder would here."""

    setup: WorkerSetup
    options: RayOptions
    remarks: list[str] = field(default_factory=list)
    memory: Mapping[str, RoleMemory] = field(default_factory=dict)
    workers: dict[str, WorkerFacts] = field(default_factory=dict)
    """Name -> what is known of every worker that there ever was."""
    lost: int = 0
    _members: list[Member] = field(default_factory=list)
    _places: dict[str, JsonRow] = field(default_factory=dict)
    _work: WorkSoFar = field(default_factory=WorkSoFar)
    _notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Join the cluster, start the workers and wait for the first: what is wrong with the models, or with
        the cluster, is a UserError now."""
        needs_extra("--ray", "ray", "ray")
        try:
            self._join()
            for _ in range(self.options.workers):
                self._start()
            self._wait_for_the_first()
        except BaseException:
            self.close()  # the next pool of this process joins a cluster of its own
            raise

    def _wait_for_the_first(self) -> None:
        deadline = time.monotonic() + FIRST_WORKER
        while not any(member.state for member in self._members):
            self._hear(seconds=1.0)
            if time.monotonic() > deadline:
                raise UserError(
                    f"no worker was ready within {FIRST_WORKER} seconds: see `ray status`; the cluster "
                    "may have no free processor or GPU"
                )

    def _join(self) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = None if self.options.ray == "local" else self.options.ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            ray.init(address="local", include_dashboard=False, num_cpus=self._cpus_here(), **quiet)
        else:
            try:
                _answers(address)
                ray.init(address=address, **quiet)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"--ray '{address}': no Ray cluster there ({reason}). Start one with `ray start --head`, "
                    "or leave the address out for one on this machine"
                ) from None
        have, need = ray.cluster_resources(), self.options.gpus_per_worker
        if need > have.get("GPU", 0):
            raise UserError(
                f"--gpus-per-worker {need:g}: the Ray cluster has {have.get('GPU', 0):g} GPUs. Ask for "
                "fewer, or start Ray on a machine with GPUs"
            )

    def _cpus_here(self) -> int:
        """Every worker of a cluster on this machine has at least a share of a processor."""
        return max(os.cpu_count() or 1, self.options.workers)

    def _start(self) -> None:
        import ray

        gpus = self.options.gpus_per_worker
        threads = self.setup.decode.threads or 1
        actor = ray.remote(Worker).options(num_cpus=threads, num_gpus=gpus, max_restarts=0)
        made = actor.remote(self.setup)
        self._members.append(Member(made, made.load.remote()))

    # What a run asks of its decoder

    def notes(self) -> list[str]:
        """What a user should know about how the models are run."""
        return list(dict.fromkeys(self._notes))

    def work(self) -> WorkSoFar:
        """What is known of the call that is going on."""
        return self._work

    def place(self, example_id: str) -> JsonRow:
        """Where an example was decoded, and what that process took at its fullest."""
        return self._places[example_id]

    def stream(
        self,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
    ) -> Iterator[Completion]:
        """As Decoder.stream; the completions of an example come together."""
        asked = [(example, [alpha or self.setup.system.alpha]) for example in examples]
        for _, completion in self.sweep(asked, sampling, task=task, trace=trace, forced=forced):
            yield completion

    def likelihoods(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        *,
        alpha: AlphaSchedule | None = None,
        task: str = "",
    ) -> Iterator[Completion]:
        """As Decoder.likelihoods."""
        for _, completion in self.likelihood_sweep(examples, texts, [alpha or self.setup.system.alpha], task):
            yield completion

    def sweep(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """As Decoder.sweep; the completions of an example under one alpha come together."""
        given = [AskedExample(example, tuple(alphas)) for example, alphas in asked]
        return self._decode(given, Settings(task, sampling, trace, forced))

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        """As Decoder.likelihood_sweep."""
        given = [AskedExample(example, tuple(alphas), tuple(texts(example))) for example in examples]
        return self._decode(given, Settings(task, Sampling()))

    # The loop

    def _decode(
        self, asked: Sequence[AskedExample], settings: Settings
    ) -> Iterator[tuple[AlphaSchedule, Completion]]:
        most = self.setup.decode.batch or TOGETHER
        queue, began = Queue.of(asked, most, self.options.workers), time.monotonic()
        self._work = WorkSoFar(unread=queue.left)
        while queue.left:
            for member in self._members:
                if member.state is not None and not member.part and (taken := queue.take()):
                    member.part, part = taken
                    decode = member.actor.decode.options(num_returns="streaming")
                    member.stream = decode.remote(part, settings)
            for member, found in self._hear(seconds=1.0, queue=queue):
                if not queue.came(member.part, found.key):
                    continue
                self._note(member, found)
                seconds, tokens = time.monotonic() - began, sum(len(c.token_ids) for c in found.completions)
                self._work = replace(
                    self._work,
                    finished=self._work.finished + 1,
                    finished_tokens=self._work.finished_tokens + tokens,
                    unread=queue.left,
                    decode_seconds=seconds,
                    prefill_seconds=seconds,
                )
                for completion in found.completions:
                    yield found.key[1], completion

    def _hear(self, seconds: float, queue: Queue | None = None) -> list[tuple[Member, Found]]:
        """What the workers said within so many seconds, the losses of workers dealt with."""
        import ray

        said = {m.stream if m.state else m.loading: m for m in self._members if not m.state or m.part}
        ready, _ = ray.wait(list(said), num_returns=1, timeout=seconds) if said else ([], [])
        heard: list[tuple[Member, Found]] = []
        for reference in ready:
            member = said[reference]
            try:
                if member.state is None:
                    self._loaded(member, ray.get(member.loading))
                else:
                    heard.append((member, ray.get(next(member.stream))))
            except StopIteration:
                assert queue is not None
                queue.ended(member.part)
                member.part, member.stream = 0, None
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise UserError(str(cause)) if isinstance(cause, UserError) else error from None
            except ray.exceptions.RayError as error:
                self._lose(member, queue, error)
        return heard

    def _loaded(self, member: Member, state: WorkerState) -> None:
        """A worker is ready."""
        if state.proxytune != __version__:
            raise UserError(
                f"the worker on {state.facts.host} has proxytune {state.proxytune}, and this is "
                f"{__version__}: install the same version on every machine"
            )
        member.state = state
        self.workers[state.facts.name] = state.facts
        self._notes += state.notes
        self.memory = self.memory or state.memory

    def _lose(self, member: Member, queue: Queue | None, error: Exception) -> None:
        """A worker is gone: another takes its place, and what it had is decoded again."""
        import ray

        self.lost += 1
        self._members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)
        name = "a worker that was starting" if member.state is None else member.state.facts.name
        again = queue.lost(member.part) if queue is not None and member.part else 0
        if self.lost > LOSSES_PER_WORKER * self.options.workers:
            log = None if member.state is None else member.state.facts.log
            raise UserError(
                f"{self.lost} workers were lost, the last one {name}: {str(error).splitlines()[0]}"
                + (f". Its messages are in '{log}'" if log else "")
            )
        self.remarks.append(f"{name} was lost: what it was at ({again} examples) was decoded by another")
        self._start()

    def _note(self, member: Member, found: Found) -> None:
        """What a worker said of itself beside its completions."""
        assert member.state is not None
        name = member.state.facts.name
        kv_peak = {role: memory.kv_peak for role, memory in found.memory.items()}
        self._places[found.key[0]] = {"worker": name, "process_peak": found.process_peak, "kv_peak": kv_peak}
        self.remarks += [remark for remark in found.remarks if remark not in self.remarks]

    def close(self) -> None:
        """Let go of the workers and of the cluster."""
        import ray

        for member in self._members:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(member.actor)
        self._members.clear()
        ray.shutdown()


def _answers(address: str) -> None:
    """OSError at once where nobody listens: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("an address is HOST:PORT, or auto")
    with socket.create_connection((host, int(port)), timeout=5):
        pass


def ray_decoder(
    options: RayOptions, *, trust_remote_code: bool = False
) -> Callable[[RunSpec, DecodeOptions], RayPool]:
    """What opens the pool of a run: one of `options.workers` processes that decode as its spec says."""

    def opened(spec: RunSpec, decode: DecodeOptions) -> RayPool:
        agreement = spec.trace == "agreement"
        return RayPool(WorkerSetup(spec.system, spec.role, decode, agreement, trust_remote_code), options)

    return opened
