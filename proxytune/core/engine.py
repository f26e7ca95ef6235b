"""The decoding loop: plan, forward every model, combine, choose, advance.

A prompt is prefilled but for its last token, so every token of a response, the first included, comes out of
the same kind of step: every model is fed the row's last token, and the logits meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from proxytune.core.divergence import from_reference
from proxytune.core.logits import Choice, Shift, ban, choose, combine, log_probability
from proxytune.core.runner import Runner
from proxytune.core.scheduler import Request, Row, Scheduler, TokenTrace
from proxytune.errors import UserError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Term:
    """One expert of an ensemble, by the names of its runners."""

    expert: str
    antiexpert: str
    weight: float = 1.0


@dataclass(frozen=True)
class Ensemble:
    """Models that decode together: logits = lead + alpha * sum of the terms. One model alone has no terms."""

    runners: Mapping[str, Runner]
    lead: str
    terms: tuple[Term, ...] = ()
    observed: Ensemble | None = None
    """What is traced as the proxy where it is not this combination that decodes."""
    reference: str | None = None
    """The model whose divergence from the proxy and from its lead is traced; it only watches."""

    def combine(self, logits: Mapping[str, Tensor], alpha: Tensor) -> Tensor:
        """Logits [B, V] per model, alpha [B] -> [B, V] on the lead's device."""
        lead = logits[self.lead]
        shifts = [
            Shift(
                logits[t.expert].to(lead.device),
                logits[t.antiexpert].to(lead.device),
                t.weight,
                self._shared(t),
            )
            for t in self.terms
        ]
        return combine(lead, shifts, alpha)

    def views(
        self, combined: Tensor, logits: Mapping[str, Tensor], alphas: Sequence[float]
    ) -> dict[str, Tensor]:
        """Every model's logits [B, V] and those of the proxy, on one device, for the trace."""
        views = {name: values.to(combined.device) for name, values in logits.items()}
        if self.observed is None:
            return {**views, "proxy": combined}
        strength = torch.tensor(alphas, dtype=torch.float64, device=combined.device)
        return {**views, "proxy": self.observed.combine(views, strength)}

    def divergence(self, views: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """`proxy` and its lead -> divergence of the reference from it, per row; nothing without a
        reference."""
        if self.reference is None:
            return {}
        lead = (self.observed or self).lead
        known = self.runners[self.reference].alignment.shared
        return from_reference(views, self.reference, ("proxy", lead), known)

    def _shared(self, term: Term) -> Tensor | None:
        known = [self.runners[name].alignment.shared for name in (term.expert, term.antiexpert)]
        masks = [mask for mask in known if mask is not None]
        return None if not masks else torch.stack(masks).all(0)


@dataclass(frozen=True)
class Result:
    """A finished response."""

    request: Request
    tokens: tuple[int, ...]
    finish_reason: str
    logprob: float
    trace: tuple[TokenTrace, ...]


class Engine:
    """Decodes requests in one continuous batch."""

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        max_rows: int,
        prefill_tokens: int = 512,
        trace: bool = False,
        on_token: Callable[[Request, int], None] | None = None,
    ) -> None:
        """`on_token` hears of every token as it is chosen; `trace` records every model's view of it."""
        self.ensemble, self.trace, self.on_token = ensemble, trace, on_token
        caches = {name: runner.rows for name, runner in ensemble.runners.items()}
        self.scheduler = Scheduler(caches, max_rows, prefill_tokens)
        self.prompt_tokens = self.generated_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any request is under way or waiting."""
        return bool(self.scheduler.rows or self.scheduler.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request; UserError if a model's context window or KV pool cannot hold it even alone."""
        for name, runner in self.ensemble.runners.items():
            prompt = len(request.contexts[name])
            room = runner.window - prompt
            if prompt == 0:
                raise UserError(f"the prompt of request {request.tag!r} is empty for the {name}")
            if room < 1:
                raise UserError(
                    f"the prompt of request {request.tag!r} has {prompt} tokens for the {name}, "
                    f"whose context window is {runner.window}: shorten the prompt"
                )
            request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        for name, runner in self.ensemble.runners.items():
            response = request.max_new_tokens * runner.alignment.longest
            need = min(runner.window, len(request.contexts[name]) + response)
            if need > runner.rows.capacity:
                raise UserError(
                    f"request {request.tag!r} needs KV memory for {need} tokens of the {name}, but its pool "
                    f"holds {runner.rows.capacity}: raise --kv-memory or lower --max-new-tokens"
                )
        self.scheduler.submit(request)
        self.prompt_tokens += len(request.contexts[self.ensemble.lead])

    def step(self) -> list[Result]:
        """Every decoding row gets one token, and some waiting prompts are prefilled. -> what finished."""
        plan = self.scheduler.plan()
        rows = self.scheduler.rows[: plan.decoding]
        logits = {
            name: runner.forward(plan.segments[name], range(plan.decoding))
            for name, runner in self.ensemble.runners.items()
            if plan.segments[name]
        }
        if not rows:
            return []
        alphas = [row.request.alpha.at(len(row.tokens)) for row in rows]
        device = logits[self.ensemble.lead].device
        combined = self.ensemble.combine(logits, torch.tensor(alphas, dtype=torch.float64, device=device))
        tokens = self._choose(combined, rows)
        if self.trace:
            self._record(combined, logits, tokens, rows, alphas)
        return self._advance(rows, tokens, log_probability(combined, tokens))

    def _choose(self, combined: Tensor, rows: list[Row]) -> Tensor:
        device, requests = combined.device, [row.request for row in rows]
        where, ids = banned(rows)
        allowed = ban(combined, torch.tensor(where, device=device), torch.tensor(ids, device=device))
        choice = Choice(
            temperature=torch.tensor([r.temperature for r in requests], dtype=torch.float64, device=device),
            top_k=torch.tensor([r.top_k for r in requests], device=device),
            top_p=torch.tensor([r.top_p for r in requests], dtype=torch.float64, device=device),
            keys=torch.tensor([r.key for r in requests], device=device),
            positions=torch.tensor([len(row.tokens) for row in rows], device=device),
            sampled=tuple(index for index, r in enumerate(requests) if r.temperature > 0),
        )
        tokens = choose(allowed, choice)
        forced = [
            (i, r.forced[at]) for i, r in enumerate(requests) if (at := len(rows[i].tokens)) < len(r.forced)
        ]
        for index, token in forced:
            tokens[index] = token
        return tokens

    def _record(
        self,
        combined: Tensor,
        logits: Mapping[str, Tensor],
        tokens: Tensor,
        rows: list[Row],
        alphas: list[float],
    ) -> None:
        views = self.ensemble.views(combined, logits, alphas)
        chosen = {name: log_probability(values, tokens).exp().tolist() for name, values in views.items()}
        top = {name: values.argmax(-1).tolist() for name, values in views.items()}
        apart = self.ensemble.divergence(views)
        for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.trace.append(
                TokenTrace(token, alphas[index], _at(index, chosen), _at(index, top), _at(index, apart))
            )

    def _advance(self, rows: list[Row], tokens: Tensor, logprobs: Tensor) -> list[Result]:
        results, done = [], []
        for index, (row, token, logprob) in enumerate(
            zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            if logprob != logprob:
                raise FloatingPointError(f"logits of request {row.request.tag!r} are not numbers (overflow?)")
            row.tokens.append(token)
            row.logprob += logprob
            for name, ids in row.ids.items():
                ids.extend(self.ensemble.runners[name].alignment.spell(token))
            if self.on_token is not None:
                self.on_token(row.request, token)
            reason = finish_reason(row) or self._full(row)
            if reason is not None:
                results.append(Result(row.request, tuple(row.tokens), reason, row.logprob, tuple(row.trace)))
                done.append(index)
        self.generated_tokens += len(rows)
        self.scheduler.finish(done)
        return results

    def _full(self, row: Row) -> str | None:
        """length where a model's window is full first: spelled out, a token can take several ids."""
        full = any(len(ids) > self.ensemble.runners[name].window for name, ids in row.ids.items())
        return "length" if full else None


def _at(index: int, values: Mapping[str, list[Number]]) -> dict[str, Number]:
    """One row of per-model lists."""
    return {name: found[index] for name, found in values.items()}


def banned(rows: list[Row]) -> tuple[list[int], list[int]]:
    """Pairs (row, token) that may not be chosen now: bans, and end-of-sequence before the minimum length."""
    where: list[int] = []
    ids: list[int] = []
    for index, row in enumerate(rows):
        request, position = row.request, len(row.tokens)
        bans = set(request.banned)
        if position == 0:
            bans |= request.banned_first
        if position < request.min_new_tokens:
            bans |= request.eos
        where += [index] * len(bans)
        ids += sorted(bans)
    return where, ids


def finish_reason(row: Row) -> str | None:
    """eos, stop or length once the response has ended."""
    request = row.request
    if row.tokens[-1] in request.eos:
        return "eos"
    if request.stop is not None and request.stop(row.tokens):
        return "stop"
    return "length" if len(row.tokens) >= request.max_new_tokens else None
