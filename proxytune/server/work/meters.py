"""What the server counts, for Prometheus (GET /metrics). Names and units follow its conventions; `model` is
the served role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxytune.config import Role
from proxytune.decoding.open_batch import OpenBatch

COUNTED = {
    "generated_tokens": "Tokens generated.",
    "prompt_tokens": "Prompt tokens of the responses.",
    "drafted": "Tokens drafted ahead of the large model.",
    "examined": "Drafts up to and including the first rejected one of a step.",
    "accepted": "Accepted drafts; the acceptance rate is accepted / examined.",
}
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meters(Collector):
    """Counters of requests, and what the engine says of itself when it is asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "proxytune_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.refused = Counter("proxytune_refused", "Requests refused with 429.", registry=self.registry)
        self.cancelled = Counter(
            "proxytune_disconnected", "Requests whose client went away.", registry=self.registry
        )
        self.seconds = Histogram(
            "proxytune_request_seconds", "From request to the end of its answer.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "proxytune_first_token_seconds", "From request to the first piece of its answer.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batches: Mapping[Role, OpenBatch] = {}
        self.registry.register(self)

    def watch(self, batches: Mapping[Role, OpenBatch]) -> None:
        """Ask these from now on."""
        self._batches = batches

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """What the engine is doing now."""
        batches = self._batches
        running = GaugeMetricFamily("proxytune_running", "Responses that decode.", labels=["model"])
        waiting = GaugeMetricFamily("proxytune_waiting", "Responses that wait for room.", labels=["model"])
        used = GaugeMetricFamily("proxytune_kv_tokens", "Tokens in the KV cache.", labels=["model", "of"])
        room = GaugeMetricFamily("proxytune_kv_capacity", "Most tokens in it.", labels=["model", "of"])
        for role, batch in batches.items():
            running.add_metric([role], batch.running)
            waiting.add_metric([role], batch.waiting)
            for name, tokens, capacity in batch.kv():
                used.add_metric([role, name], tokens)
                room.add_metric([role, name], capacity)
        yield from (running, waiting, used, room)
        for name, help_ in COUNTED.items():
            counter = CounterMetricFamily(f"proxytune_{name}", help_, labels=["model"])
            for role, batch in batches.items():
                counter.add_metric([role], batch.counts()[name])
            yield counter
