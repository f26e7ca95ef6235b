"""proxytune's own decoding under the clock: plain, speculative, one model alone, the small pair alone; and
synthetic acceptance, where weights are random."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.measure import Contender, Outcome, distinct, synchronise
from benchmarks.shapes import Bench, kv_bytes_per_token, read_bytes
from benchmarks.workloads import Item, Workload
from proxytune.config import Role
from proxytune.decoding.decoder import PREFILL_TOKENS, Decoder
from proxytune.engine.cuda.graphs import Graphs
from proxytune.engine.engine import Chosen, Engine
from proxytune.engine.ensemble import Ensemble, Term
from proxytune.engine.request import Request
from proxytune.engine.sampling import RowPosition
from proxytune.engine.speculative.draft_length import DraftLength
from proxytune.engine.speculative.drafter import Speculation

PLAIN = Speculation(k=0, lookup=False)
DEFAULT = Speculation()
"""What `--speculate auto` does: k from measured times and acceptance, and prompt lookup."""


@dataclass(frozen=True, eq=False)
class SyntheticAcceptance:
    """Synthetic acceptance: drafts that are right with a given probability, on random weights.

    The true tokens are known from plain decoding. The drafter runs, for what it costs; then its drafts are
    replaced by the true token in that share of a response's positions, and by a wrong one in the others, in
    an order shuffled per request. Times and tokens are those of an expert with this acceptance; the
    acceptance itself is made up."""

    table: Tensor
    """Drafts [tags, positions], on the device and made beforehand, so that they cost no time. A request's key
    is its tag."""

    @classmethod
    def at(
        cls,
        acceptance: float,
        truth: Mapping[int, Sequence[int]],
        vocabulary: int,
        device: torch.device,
    ) -> SyntheticAcceptance:
        """Drafts with this acceptance for the responses `truth`, by tag."""
        table = torch.zeros(max(truth) + 1, max(map(len, truth.values())), dtype=torch.long)
        for tag, tokens in truth.items():
            hits = round(acceptance * len(tokens))
            right = [True] * hits + [False] * (len(tokens) - hits)
            random.Random(tag).shuffle(right)
            pairs = zip(tokens, right, strict=True)
            drafts = [token if hit else (token + 1) % vocabulary for token, hit in pairs]
            table[tag, : len(drafts)] = torch.tensor(drafts)
        return cls(table.to(device))

    def on_device(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Drafts [R, 1] for rows of keys [R] at positions [R, 1]: what a step on a GPU asks. It has looked at
        the logits before."""
        return self.table[keys[:, None], positions.clamp(max=self.table.shape[1] - 1)]

    def __call__(self, logits: Tensor, positions: Sequence[RowPosition]) -> Tensor:
        """Drafts [P] for the positions of logits [P, V]."""
        logits.argmax(-1)  # an expert that drafts for itself looks at its logits
        where = torch.tensor([(at.row.request.key, at.position) for at in positions], device=logits.device)
        return self.on_device(where[:, 0], where[:, 1:])[:, 0]


@dataclass(frozen=True)
class Ours:
    """One way of decoding a workload with proxytune."""

    bench: Bench
    workload: Workload
    role: Role = "proxy"
    speculation: Speculation = PLAIN
    max_rows: int = 1
    pair_only: bool = False
    """Decode expert and antiexpert alone: one step of the pair is what a proxy step adds to the base."""
    decoder: Decoder | None = None
    """One with pools already; None makes its own, so that its memory can be measured."""

    def contender(self, name: str) -> Contender:
        """This, to be raced."""
        owed = self._owed if self.speculation is PLAIN and self.max_rows == 1 else None
        entrances, made = self._entrances, lambda: self._ensemble.graphs_made
        return Contender(name, self.run, self._modules, self.max_rows, owed, entrances, made)

    @cached_property
    def _decoder(self) -> Decoder:
        return self.decoder or self.bench.decoder(self.role)

    @cached_property
    def _draft_length(self) -> DraftLength:
        """What the warm-up and the runs have measured, kept as a Decoder keeps it."""
        return DraftLength()

    def _owed(self) -> int:
        """Bytes that plain decoding of one row at a time has to read, prefill left out."""
        return sum(
            read_bytes(module) * item.new_tokens
            + kv_bytes_per_token(module) * sum(range(len(prompt), len(prompt) + item.new_tokens))
            for module in distinct(self._modules())
            for item in self.workload.items
            for prompt in [item.contexts["base"]]
        )

    def _modules(self) -> list[PreTrainedModel]:
        names = self._ensemble.runners
        return [self._decoder.loaded[name].module for name in names]

    def _entrances(self) -> dict[int, nn.Module]:
        """What the decoder calls in the place of a module."""
        loaded = [self._decoder.loaded[name] for name in self._ensemble.runners]
        return {id(m.module): m.forward for m in loaded if isinstance(m.forward, nn.Module)}

    @cached_property
    def _ensemble(self) -> Ensemble:
        whole = self._decoder.ensemble
        if not self.pair_only:
            return whole
        pair = {name: whole.runners[name] for name in ("antiexpert", "expert")}
        return Ensemble(pair, "antiexpert", (Term("expert", "antiexpert"),))

    @property
    def graphs(self) -> list[Graphs]:
        """The captured steps of its models, by what drafts."""
        return list(self._ensemble._graphs.values())

    def run(self) -> Outcome:
        """Decode the workload once."""
        responses: dict[int, list[int]] = {}
        submitted: dict[int, float] = {}
        first: dict[int, float] = {}
        in_step: list[int] = []

        def hear(request: Request, chosen: Chosen) -> None:
            tag = request.tag
            assert isinstance(tag, int)
            in_step.append(tag)
            if tag not in responses:
                responses[tag] = []
                first[tag] = time.perf_counter() - submitted[tag]
            responses[tag].append(chosen.token)

        engine = Engine(
            self._ensemble,
            max_rows=self.max_rows,
            prefill_tokens=PREFILL_TOKENS[self.bench.device.type],
            on_token=hear,
            speculation=self.speculation,
            draft_length=self._draft_length,
        )
        groups = (
            [[item] for item in self.workload.items] if self.workload.one_by_one else [self.workload.items]
        )
        gaps: list[float] = []
        began = last = time.perf_counter()
        for group in groups:
            for item in group:
                submitted[item.tag] = last
                engine.submit(self._request(item))
            while engine.busy:
                engine.step()
                now = time.perf_counter()
                if in_step:
                    gaps.append((now - last) * len(set(in_step)) / len(in_step))
                    in_step.clear()
                    last = now
        synchronise(self.bench.device)
        seconds = time.perf_counter() - began
        counts = engine.counts
        return Outcome(
            seconds,
            responses,
            list(first.values()),
            gaps,
            drafted=counts.examined,
            accepted=counts.accepted,
            row_steps=counts.row_steps,
        )

    def _request(self, item: Item) -> Request:
        contexts = {name: item.contexts.get(name, item.contexts["base"]) for name in self._ensemble.runners}
        return Request(contexts=contexts, key=item.tag, max_new_tokens=item.new_tokens, tag=item.tag)

    def with_synthetic_acceptance(
        self, acceptance: float, truth: Mapping[int, Sequence[int]], k: int | None = None
    ) -> Ours:
        """The same with synthetic acceptance of the drafts, and without prompt lookup."""
        vocabulary = int(self.bench.plain["base"].config.vocab_size)
        drafts = SyntheticAcceptance.at(acceptance, truth, vocabulary, self.bench.device)
        return self.speculating(Speculation(k=k, lookup=False, pick=drafts, propose=drafts.on_device))

    def speculating(self, speculation: Speculation) -> Ours:
        """The same with drafts."""
        return replace(self, speculation=speculation)
