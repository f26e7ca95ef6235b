"""The models that decode together, and how their logits combine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from proxytune.engine.cuda.graphs import Graphs
from proxytune.engine.cuda.step import DeviceStep, Tracing
from proxytune.engine.divergence import from_reference
from proxytune.engine.logits import Shift, combine, largest
from proxytune.engine.runners.runner import ModelRunner, Runner
from proxytune.engine.sampling import Propose
from proxytune.engine.speculative.draft_length import DraftLength
from proxytune.engine.speculative.drafter import (
    LOOKUP,
)
from proxytune.engine.token_views import TokenViews
from proxytune.errors import UserError


@dataclass(frozen=True)
class Term:
    """One expert of an ensemble, by the names of its runners."""

    expert: str
    antiexpert: str
    weight: float = 1.0


class Holder(Protocol):
    """What has rows in the caches of an ensemble."""

    def evict(self) -> None:
        """Another takes the caches: its rows are gone."""
        ...


@dataclass(frozen=True)
class Ensemble:
    """Models that decode together: logits = target + alpha * sum of the terms. One model alone has no
    terms."""

    runners: Mapping[str, Runner]
    target: str
    terms: tuple[Term, ...] = ()
    observed: Ensemble | None = None
    """What is traced as the proxy where it is not this combination that decodes."""
    reference: str | None = None
    """The model whose divergence from the proxy and from its target model is traced; it only watches."""
    draft_length: DraftLength = field(default_factory=DraftLength)
    """What its engines have measured so far."""
    _graphs: dict[tuple[tuple[str, ...], Propose | None, bool, int], Graphs] = field(default_factory=dict)
    """By draft models, what drafts, and whether they trace: they outlive the engine that made them."""
    _holders: list[weakref.ref[Holder]] = field(default_factory=list)
    """Who has rows in the caches: nobody, or one."""

    @property
    def window(self) -> int:
        """Tokens that a prompt and its response may have together: what the shortest context window holds."""
        return min(runner.window for runner in self.runners.values())

    def claim(self, holder: Holder | None) -> None:
        """Empty all caches for `holder`, or for rows that nobody keeps. Whoever had rows in them loses them:
        an abandoned stream must not block the next one."""
        before = [found for reference in self._holders if (found := reference()) is not None]
        for other in before:
            other.evict()
        self._holders[:] = [] if holder is None else [weakref.ref(holder)]
        self.clear_caches()

    def clear_caches(self) -> None:
        """Free the rows of every model."""
        for runner in self.runners.values():
            runner.rows.clear()

    def combine(self, logits: Mapping[str, Tensor], alpha: Tensor, *, all_moved: bool = False) -> Tensor:
        """Logits [B, V] per model, alpha [B] -> [B, V] on the target's device; `all_moved`: no alpha is 0."""
        target = logits[self.target]
        shifts = [
            Shift(
                logits[t.expert].to(target.device),
                logits[t.antiexpert].to(target.device),
                t.weight,
                self.shared_by(t, target.device),
            )
            for t in self.terms
        ]
        return combine(target, shifts, alpha, all_moved=all_moved)

    def draft_models(self, drafter: str | None = None) -> tuple[str, ...]:
        """The expert that drafts (the first unless named) and the models on its weights; empty without
        experts, and where prompt lookup alone drafts."""
        experts = [term.expert for term in self.terms]
        if not experts or drafter == LOOKUP:
            return ()
        if drafter is not None and drafter not in experts:
            raise UserError(f"no expert '{drafter}' to draft: choose {' or '.join([*experts, LOOKUP])}")
        first = drafter or experts[0]
        weights = self.runners[first].weights
        return (first, *(n for n, runner in self.runners.items() if n != first and runner.weights is weights))

    @property
    def watchers(self) -> tuple[str, ...]:
        """Whose view of a token is traced: every model's, and the proxy's."""
        return (*self.runners, "proxy")

    @property
    def measured(self) -> tuple[str, ...]:
        """Whose divergence from the reference is traced: the proxy's and its target model's; nobody's without
        a reference."""
        return () if self.reference is None else ("proxy", (self.observed or self).target)

    def views(
        self,
        combined: Tensor,
        logits: Mapping[str, Tensor],
        alpha: Tensor,
        tokens: Tensor,
        first: Callable[[Tensor], Tensor] = largest,
        ranked: int = 0,
    ) -> TokenViews:
        """How tokens [B] were seen, for the trace: by every model, logits [B, V], and by the proxy; with so
        many of the most probable tokens of each."""
        views = {name: logits[name].to(combined.device) for name in self.runners}
        proxy = combined if self.observed is None else self.observed.combine(views, alpha)
        views["proxy"] = proxy
        apart: dict[str, Tensor] = {}
        if self.reference is not None:
            known = self.runners[self.reference].alignment.shared
            apart = from_reference(views, self.reference, self.measured, known)
        return TokenViews.of(views, apart, tokens, first, ranked)

    def graphs(
        self,
        draft_models: tuple[str, ...],
        propose: Propose | None = None,
        *,
        trace: bool = False,
        ranked: int = 0,
    ) -> Graphs:
        """The steps of this ensemble on its device, where all its models are; with `trace` they tell how
        every token was seen, with so many ranked tokens."""
        key = draft_models, propose, trace, ranked
        if key not in self._graphs:
            runner = self.runners[self.target]
            assert isinstance(runner, ModelRunner)
            width = (2 + 2 * ranked) * len(self.watchers) + len(self.measured)
            tracing = Tracing(partial(self.views, ranked=ranked), width) if trace else None
            step = DeviceStep(self.runners, draft_models, self.target, self.combine, propose, tracing)
            self._graphs[key] = Graphs(step, runner.device)
        return self._graphs[key]

    @property
    def graphs_made(self) -> int:
        """How many steps have been captured."""
        return sum(graphs.made for graphs in self._graphs.values())

    def forget_graphs(self) -> None:
        """Give back the memory of all captured steps; they are made anew when they are next needed."""
        self._graphs.clear()

    def shared_by(self, term: Term, device: torch.device) -> Tensor | None:
        """Which tokens both models of a term know, [V] on a device; None means all."""
        known = [self.runners[name].alignment.shared for name in (term.expert, term.antiexpert)]
        masks = [mask.to(device) for mask in known if mask is not None]
        return None if not masks else torch.stack(masks).all(0)
