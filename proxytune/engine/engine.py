"""The decoding loop: plan, draft, verify, combine, choose, advance.

A prompt is prefilled but for its last token, so every token of a response, the first included, comes out of
the same kind of step: every model is fed the row's last token, and the logits meet. Drafts only add tokens
that are fed with it; a step without drafts is plain decoding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.cuda.loop import DeviceLoop, steps_on_device
from proxytune.engine.ensemble import Ensemble
from proxytune.engine.logits import found_probability, some
from proxytune.engine.request import Plan, Request, Result, Row, Segment, TokenTrace, Work
from proxytune.engine.runners.runner import forward_all
from proxytune.engine.sampling import RowPosition, pick
from proxytune.engine.scheduler import Scheduler
from proxytune.engine.speculative.draft_length import DraftLength
from proxytune.engine.speculative.drafter import (
    Drafter,
    Drafts,
    Speculation,
    StepSeconds,
    same_prefix,
)
from proxytune.engine.timing import PrefillShare, work_clock
from proxytune.engine.token_views import TokenViews
from proxytune.errors import PromptTooLong, UserError


class Chosen(NamedTuple):
    """A token of a response with its log-probability under the combination."""

    token: int
    logprob: float
    """NaN where the logits are no distribution: then the token means nothing."""
    trace: TokenTrace | None


OnToken = Callable[[Request, Chosen], None]
"""Hears of a token of a response."""


@dataclass
class Counts:
    """What an engine has done so far."""

    seconds: float = 0.0
    """In steps."""
    prefill_seconds: float = 0.0
    """The part of them that went to prompts."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    row_steps: int = 0
    """Steps, counted once per row that decoded."""
    drafted: int = 0
    examined: int = 0
    """Drafts up to and including the first rejected one of a step."""
    accepted: int = 0


class Engine:
    """Decodes requests in one continuous batch.

    The caches outlive it. Every way out empties them: the last result, `close`, an exception, and another
    engine that begins on the same models."""

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        max_rows: int,
        prefill_tokens: int = 512,
        trace: bool = False,
        ranked: int = 0,
        on_token: OnToken | None = None,
        speculation: Speculation | None = None,
        draft_length: DraftLength | None = None,
    ) -> None:
        """`on_token` hears of every token as it is chosen; `trace` records every model's view of it, with
        its `ranked` most probable tokens; without `speculation` decoding is plain. `draft_length`: what was
        measured before (the ensemble's own)."""
        size = ensemble.runners[ensemble.target].alignment.size
        self.ensemble, self.trace, self.on_token = ensemble, trace, on_token
        self.ranked = min(ranked, size) if trace else 0
        runners, settings = ensemble.runners, speculation or Speculation(k=0)
        caches = {name: runner.rows for name, runner in runners.items()}
        longest = {name: runner.alignment.longest for name, runner in runners.items()}
        self._spelt = max(longest.values()) > 1
        self._spell = {name: runner.alignment.spell for name, runner in runners.items()}
        self.scheduler = Scheduler(caches, max_rows, prefill_tokens, longest)
        draft_models = ensemble.draft_models(settings.drafter)
        self._clock = work_clock(runner.device.type for runner in runners.values())
        self.drafter = Drafter(
            runners,
            draft_models,
            ensemble.target,
            settings,
            draft_length or ensemble.draft_length,
            clock=self._clock,
        )
        self.counts = Counts()
        self._prefill = PrefillShare()
        self._holds = self._lost = self._stepping = False
        """Whether the caches are its own; whether it lost rows to another; whether it is within a step."""
        self._cancelled: set[int] = set()
        """Tickets of rows that were cancelled within this step."""
        self.device: DeviceLoop | None = None
        if steps_on_device(runners, settings):
            graphs = ensemble.graphs(draft_models, settings.propose, trace=trace, ranked=self.ranked)
            self.device = DeviceLoop(self.scheduler, self.drafter, graphs)

    @property
    def busy(self) -> bool:
        """Whether any request is under way or waiting."""
        return bool(self.scheduler.rows or self.scheduler.waiting or self._lost)

    def submit(self, request: Request) -> int:
        """Queue a request -> its ticket. UserError if a model's context window or KV pool cannot hold it even
        alone."""
        for name, runner in self.ensemble.runners.items():
            prompt = len(request.contexts[name])
            room = runner.window - prompt
            if prompt == 0:
                raise UserError(f"the prompt of request {request.tag!r} is empty for the {name}")
            if room < 1:
                what = f"the prompt of request {request.tag!r}"
                raise PromptTooLong(what, name, prompt, runner.window)
            request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        for name, runner in self.ensemble.runners.items():
            response = request.max_new_tokens * runner.alignment.longest
            need = min(runner.window, len(request.contexts[name]) + response)
            if need > runner.rows.capacity:
                raise UserError(
                    f"request {request.tag!r} needs KV memory for {need} tokens of the {name}, but its pool "
                    f"holds {runner.rows.capacity}: raise --kv-memory or lower --max-new-tokens"
                )
        if not self._holds:
            self.ensemble.claim(self)
            self._holds = True
        ticket = self.scheduler.submit(request)
        if self.device is not None:
            self.device.expect(request)
        self.counts.prompt_tokens += len(request.contexts[self.ensemble.target])
        return ticket

    def cancel(self, ticket: int) -> bool:
        """End a sequence between two steps, or from a callback within one: its KV is free for others, and it
        has no result. -> False if it has ended already."""
        row = self.scheduler.find(ticket)
        if row is None or ticket in self._cancelled:
            return False
        if self._stepping:
            self._cancelled.add(ticket)
        else:
            self._remove(row)
        return True

    def _remove(self, row: Row) -> None:
        self.drafter.forget(row)
        self.scheduler.remove(row)

    def close(self) -> None:
        """End all sequences, without results, and give back what they have in the caches."""
        self._forget()
        self._lost = False
        if self._holds:
            self.ensemble.clear_caches()

    def evict(self) -> None:
        """Another takes the caches."""
        if self._stepping:
            raise RuntimeError("a callback of a stream cannot start another one on the same models")
        self._lost, self._holds = self.busy, False
        self._forget()

    def _forget(self) -> None:
        self.scheduler.forget()
        self.drafter.forget_all()
        self._cancelled.clear()
        if self.device is not None:
            self.device.abandon()

    def step(self) -> list[Result]:
        """Every decoding row gets a token or more, and some waiting prompts are prefilled. -> what
        finished. Steps on the device are read by the call after the one that starts them, or later. An
        exception ends all sequences."""
        if self._lost:
            raise RuntimeError("this stream was cut off: another one was started on the same models")
        self._stepping, began = True, time.perf_counter()
        try:
            results, prefill = self._step()
            for row in filter(None, map(self.scheduler.find, self._cancelled)):
                self._remove(row)
            self._cancelled.clear()
        except BaseException:
            self.close()
            raise
        finally:
            self._stepping = False
        seconds = time.perf_counter() - began
        self.counts.seconds += seconds
        self.counts.prefill_seconds += seconds * prefill
        return results

    def _step(self) -> tuple[list[Result], float]:
        """-> what finished, and the share of prompts in the time that it took."""
        device, models = self.device, len(self.ensemble.runners)
        if device is not None and device.in_flight:
            prefill = device.follow()
            self._feed(prefill)
            results, tokens = self._collect(device)
            share = self._prefill.collected(models * tokens)
            self._prefill.started(sum(len(s.ids) for own in prefill.values() for s in own))
            return results, share
        wishes = (lambda rows: [self.drafter.depths(rows)]) if device is None else device.depths
        plan = self.scheduler.plan(wishes)
        rows, prompts = self.scheduler.rows[: plan.decoding], sum(map(plan.prompt_tokens, plan.prefill))
        started = bool(rows) and device is not None and device.start(plan)
        if started or not rows:
            self._feed(plan.prefill)
            if not started:
                return [], self._prefill.alone(prompts)
            self._prefill.started(prompts)
            return [], 0.0
        began = self._clock()
        drafts = self.drafter.draft(rows, plan.depths, plan.prefill)
        drafted = self._clock()
        views = self._verify(plan, rows, drafts)
        chosen = self._accept(rows, drafts, views)
        verified = self._clock()
        closed = self._close(plan, rows, drafts, views, chosen)
        seconds = StepSeconds(drafted - began, verified - drafted, self._clock() - verified, closed)
        self._learn(rows, drafts, chosen, None if prompts else seconds)
        fed = models * (len(rows) + sum(map(len, drafts.tokens)))
        return self._advance(rows, chosen), self._prefill.together(prompts, fed)

    def _feed(self, prefill: Mapping[str, Sequence[Segment]]) -> None:
        """Prompt tokens, of which no logits are wanted."""
        forward_all(self.ensemble.runners, {name: Work(own, ()) for name, own in prefill.items()})

    def _collect(self, device: DeviceLoop) -> tuple[list[Result], int]:
        """Take in the output of a step on the device. -> what finished, and how many tokens it fed."""
        found, chosen = device.collect(), list[list[Chosen]]()
        rows = self.scheduler.rows
        for row, tokens, logprobs, views in zip(rows, found.tokens, found.logprobs, found.views, strict=True):
            traces = self._recorded(row, tokens, views)
            chosen.append([Chosen(*item) for item in zip(tokens, logprobs, traces, strict=True)])
        self._learn(rows, found.drafts, chosen, None)
        fed = len(chosen) + sum(map(len, found.drafts.tokens))
        return self._advance(rows, chosen), fed

    def _learn(
        self,
        rows: Sequence[Row],
        drafts: Drafts,
        chosen: Sequence[Sequence[Chosen]],
        seconds: StepSeconds | None,
    ) -> None:
        """Count the accepted drafts, and let the drafter know how the step went."""
        tokens = [[item.token for item in own] for own in chosen]
        self.drafter.watch(rows, tokens)
        accepted = examined = 0
        for row, own, drafted in zip(rows, tokens, drafts.tokens, strict=True):
            agreed = same_prefix(own, drafted)
            looked_at = min(agreed + 1, len(drafted))
            for counts in (self.counts, row.counts):
                counts.drafted += len(drafted)
                counts.examined += looked_at
                counts.accepted += agreed
            accepted, examined = accepted + agreed, examined + looked_at
        self.drafter.learn(drafts, accepted, examined, seconds)

    def _verify(self, plan: Plan, rows: Sequence[Row], drafts: Drafts) -> dict[str, Tensor]:
        """The verifying models on every row's last token and drafts: logits [sum of 1 + drafts, V]."""
        verifiers = [name for name in self.ensemble.runners if name not in drafts.draft_models]
        work = {name: self.drafter.verification(name, rows, drafts, plan.prefill[name]) for name in verifiers}
        return forward_all(self.ensemble.runners, work)

    def _accept(self, rows: Sequence[Row], drafts: Drafts, views: Mapping[str, Tensor]) -> list[list[Chosen]]:
        """The tokens of the proxy at the positions of the drafts, up to the first that it does not agree
        with. Where no model drafted, the token after the drafts is known too."""
        after = 0 if drafts.draft_models else 1
        positions = [
            RowPosition(row, len(row.tokens) + offset)
            for row, drafted in zip(rows, drafts.tokens, strict=True)
            for offset in range(len(drafted) + after)
        ]
        if not positions:
            return [[] for _ in rows]
        keep, at = list[int](), 0
        for drafted in drafts.tokens:
            keep += range(at, at + len(drafted) + after)
            at += len(drafted) + 1
        picked = self._settle(positions, {**some(views, keep), **drafts.logits})
        chosen, at = [], 0
        for drafted in drafts.tokens:
            own = picked[at : at + len(drafted) + after]
            chosen.append(own[: same_prefix([item.token for item in own], drafted) + 1])
            at += len(own)
        return chosen

    def _close(
        self,
        plan: Plan,
        rows: Sequence[Row],
        drafts: Drafts,
        views: Mapping[str, Tensor],
        chosen: list[list[Chosen]],
    ) -> int:
        """Where all drafts are accepted, the draft models read the last of them, and the proxy chooses one
        token more. -> in how many rows."""
        draft_models = drafts.draft_models
        ends = [at - 1 for at in accumulate(len(drafted) + 1 for drafted in drafts.tokens)]
        open_rows = [
            index
            for index, (row, drafted, own) in enumerate(zip(rows, drafts.tokens, chosen, strict=True))
            if [c.token for c in own] == drafted and not (drafted and drafted[-1] in row.request.eos)
        ]
        if not draft_models or not open_rows:
            return 0
        prefill = plan.prefill if drafts.forwards == 0 else {}
        work = {
            name: self.drafter.closing(name, rows, drafts, open_rows, prefill.get(name, ()))
            for name in draft_models
        }
        logits = forward_all(self.ensemble.runners, work)
        logits |= some(views, [ends[index] for index in open_rows])
        positions = [
            RowPosition(rows[index], len(rows[index].tokens) + len(drafts.tokens[index]))
            for index in open_rows
        ]
        for index, last in zip(open_rows, self._settle(positions, logits), strict=True):
            chosen[index].append(last)
        return len(open_rows)

    def _settle(self, positions: Sequence[RowPosition], logits: Mapping[str, Tensor]) -> list[Chosen]:
        """Combine logits [P, V] of every model and choose the tokens at P positions."""
        alphas = [at.row.request.alpha.at(at.position) for at in positions]
        device = logits[self.ensemble.target].device
        strength = torch.tensor(alphas, dtype=torch.float64, device=device)
        combined = self.ensemble.combine(logits, strength, all_moved=0.0 not in alphas)
        tokens = pick(combined, positions)
        logprobs = found_probability(combined, tokens).tolist()
        ids: list[int] = tokens.tolist()
        traces: list[TokenTrace | None] = [None] * len(ids)
        wanted = [at for at, place in enumerate(positions) if self.trace and place.row.request.trace]
        if wanted:
            mine = torch.tensor(wanted, device=device)
            seen, whole = some(logits, wanted), some({"": combined}, wanted)[""]
            views = self.ensemble.views(whole, seen, strength[mine], tokens[mine], ranked=self.ranked)
            named = self._named(views, [ids[at] for at in wanted], [alphas[at] for at in wanted])
            for at, trace in zip(wanted, named, strict=True):
                traces[at] = trace
        return [Chosen(*item) for item in zip(ids, logprobs, traces, strict=True)]

    def _recorded(self, row: Row, tokens: Sequence[int], seen: Tensor) -> Sequence[TokenTrace | None]:
        """The traces of a row's next tokens, as a step on the device packed them."""
        if not (self.trace and row.request.trace):
            return [None] * len(tokens)
        alphas = [row.request.alpha.at(len(row.tokens) + offset) for offset in range(len(tokens))]
        views = TokenViews.unpacked(seen, len(self.ensemble.watchers), self.ranked)
        return self._named(views, tokens, alphas)

    def _named(self, views: TokenViews, tokens: Sequence[int], alphas: Sequence[float]) -> list[TokenTrace]:
        return views.traces(self.ensemble.watchers, self.ensemble.measured, tokens, alphas)

    def _advance(self, rows: Sequence[Row], chosen: Sequence[Sequence[Chosen]]) -> list[Result]:
        """Append the chosen tokens to their rows, up to where a response ends; take the drafts back."""
        ended, done = list[tuple[int, Result]](), list[int]()
        for index, (row, tokens) in enumerate(zip(rows, chosen, strict=True)):
            if not tokens or row.ticket in self._cancelled:
                continue  # it came after the step was started, or a callback before this row ended it
            self.counts.row_steps += 1
            row.counts.row_steps += 1
            reason = next((found for item in tokens if (found := self._append(row, item))), None)
            if row.ticket in self._cancelled:
                continue
            if reason is not None:
                seen = tuple(row.trace)
                result = Result(row.request, tuple(row.tokens), reason, row.logprob, seen, row.counts)
                ended.append((row.ticket, result))
                self.drafter.forget(row)
                done.append(index)
                continue
            for name, ids in row.ids.items():
                known = len(ids) - len(self._spell[name](row.tokens[-1]))
                kept = self.scheduler.caches[name]
                if kept.lengths[index] > known:
                    kept.rewind(index, known)
        self.scheduler.finish(done)
        return [result for ticket, result in ended if ticket not in self._cancelled]

    def _append(self, row: Row, item: Chosen) -> str | None:
        """One token more; -> why the response ends with it, if it does, or before it."""
        if math.isnan(item.logprob):
            return "nan"
        row.tokens.append(item.token)
        row.logprob += item.logprob
        if item.trace is not None:
            row.trace.append(item.trace)
        for name, ids in row.ids.items():
            ids.extend(self._spell[name](item.token))
        self.counts.generated_tokens += 1
        if self.on_token is not None:
            self.on_token(row.request, item)
        if row.ticket in self._cancelled:
            return "cancelled"
        return finish_reason(row) or self._full(row)

    def _full(self, row: Row) -> str | None:
        """length where a model's window is full first: spelled out, a token can take several ids, and the
        limit that `submit` sets counts tokens."""
        if not self._spelt:
            return None
        full = any(len(ids) > self.ensemble.runners[name].window for name, ids in row.ids.items())
        return "length" if full else None


def finish_reason(row: Row) -> str | None:
    """eos, stop or length once the response has ended."""
    request = row.request
    if row.tokens[-1] in request.eos:
        return "eos"
    if request.stop is not None and request.stop(row.tokens):
        return "stop"
    return "length" if len(row.tokens) >= request.max_new_tokens else None
