"""One decoding step as a function of tensors alone: draft, verify, combine, choose, accept, move on.

Shapes depend on the number of rows and the draft length only, and the host reads nothing, so that a CUDA
graph can hold the whole step. The draft models draft k tokens; then they read the last of them while the
other models verify them all. (The eager loop spares the draft models that last forward where no row needs it;
here it always runs, as the first forward of a step that drafts one token more.) Or prompt lookup drafts, and
all models read the drafts at once.

A token of a row that has no room for it, and every token of padding, is fed at position 0 and stored in the
spare page; what comes out for it is never looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.cuda.attention import DevicePacked, DevicePart, slots_of
from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.cuda.state import DeviceBatch
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.logits import found_probability, widen
from proxytune.engine.runners.runner import ModelRunner, Runner
from proxytune.engine.sampling import Propose
from proxytune.engine.speculative.draft_length import Ahead
from proxytune.engine.speculative.prompt_lookup import continuations
from proxytune.engine.token_views import TokenViews

Logits = dict[str, Tensor]
"""Per model [R, Q, V] over the base's vocabulary."""
Branches = Callable[[Sequence[Callable[[], Logits]]], list[Logits]]
"""Runs functions that do not depend on each other."""


def first_of_largest(logits: Tensor) -> Tensor:
    """[N, V] -> [N], as `logits.largest` does, by an operation of the device."""
    return logits.argmax(-1)


def in_turn(branches: Sequence[Callable[[], Logits]]) -> list[Logits]:
    """One after the other."""
    return [branch() for branch in branches]


class Tracing(NamedTuple):
    """What a step tells of its tokens beside their log-probabilities."""

    views: Callable[[Tensor, Mapping[str, Tensor], Tensor, Tensor, Callable[[Tensor], Tensor]], TokenViews]
    """`Ensemble.views`."""
    width: int
    """Numbers per token."""


class StepOutput(NamedTuple):
    """The output of a step, as the host reads it; R rows, k drafts."""

    accepted: Tensor  # [R] how many of the tokens are accepted
    tokens: Tensor  # [R, k + 1] the proxy's
    drafts: Tensor  # [R, k]; -1 in rows where prompt lookup found nothing
    logprobs: (
        Tensor  # [R, k + 1] float64; NaN where the logits are no distribution, and the host ends the row
    )
    views: Tensor  # [R, k + 1, W] packed `TokenViews`; W is 0 without a trace

    def packed(self) -> Tensor:
        """All of it as one [R, 3k + 3 + (k + 1) W] of int64, to be copied at once."""
        bits = self.logprobs.contiguous().view(torch.long)
        return torch.cat([self.accepted[:, None], self.tokens, self.drafts, bits, self.views.flatten(1)], 1)

    @classmethod
    def unpacked(cls, numbers: Tensor, k: int) -> StepOutput:
        """`packed` undone."""
        sizes = [1, k + 1, k, k + 1]
        sizes.append(numbers.shape[1] - sum(sizes))
        accepted, tokens, drafts, bits, views = torch.split_with_sizes(numbers, sizes, 1)
        wide = bits.contiguous().view(torch.float64)
        width = views.shape[1] // (k + 1)
        return cls(accepted[:, 0], tokens, drafts, wide, views.reshape(len(numbers), k + 1, width))


class DeviceStep:
    """The step of one ensemble."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        draft_models: Sequence[str],
        target: str,
        combine: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        propose: Propose | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`runners` are ModelRunners on pages, whose tokens take one id each. `draft_models`: the drafter
        and the models on its weights, or nothing; `combine` is `Ensemble.combine`, `propose` a
        Speculation's."""
        self.draft_models, self.target = tuple(draft_models), target
        self.combine, self.propose, self.tracing = combine, propose, tracing
        self.runners: dict[str, ModelRunner] = {}
        self.spelt: dict[str, Tensor] = {}
        together: dict[int, list[str]] = {}
        for name, runner in runners.items():
            assert isinstance(runner, ModelRunner)
            self.runners[name] = runner
            if runner.alignment.spelled is not None:
                ids = [ids[0] for ids in runner.alignment.spelled]
                self.spelt[name] = torch.tensor(ids, device=runner.device)
            if name not in self.draft_models:
                together.setdefault(id(runner.weights), []).append(name)
        self.verifiers = [tuple(names) for names in together.values()]

    def output_width(self, k: int) -> int:
        """Columns of its packed output."""
        return 3 * k + 3 + (k + 1) * (0 if self.tracing is None else self.tracing.width)

    @torch.inference_mode()
    def __call__(
        self, batch: DeviceBatch, ahead: Ahead, needs: SamplingNeeds, branches: Branches = in_turn
    ) -> StepOutput:
        """Every row gets up to k + 1 tokens more; the batch's position, limit, history and last move on."""
        k = ahead.k
        rows, device = batch.position.shape[0], batch.position.device
        positions = batch.position[:, None] + torch.arange(k + 1, device=device)  # [R, k + 1]
        size = self.runners[self.target].alignment.size
        before: list[Logits] = []
        if ahead.lookup:
            drafts = self._look_up(batch, k, size)
        else:
            drafts, before = self._draft(batch, positions, k, needs)
        fed, since = drafts.clamp(min=0), len(before)  # what the draft models have read of the drafts already
        work: list[Callable[[], Logits]] = [
            lambda names=names: self._forward(names, batch, fed, 0)  # type: ignore[misc]
            for names in self.verifiers
        ]
        if self.draft_models:
            rest = fed[:, since - 1 :] if since else fed
            work.insert(0, lambda: self._forward(self.draft_models, batch, rest, since))
        views: Logits = {}
        for found in branches(work):
            views |= found
        views |= {name: torch.cat([*(b[name] for b in before), views[name]], 1) for name in self.draft_models}
        flat = {name: logits.flatten(0, 1) for name, logits in views.items()}
        alpha = batch.alpha(positions).flatten()
        combined = self.combine(flat, alpha)  # [R * (k + 1), V]
        tokens = batch.sampler.pick(combined.view(rows, k + 1, size), positions, needs)
        logprobs = found_probability(combined, tokens.flatten()).double().view(rows, k + 1)
        seen = tokens.new_empty(rows, k + 1, 0)
        if self.tracing is not None:
            views_of = self.tracing.views(combined, flat, alpha, tokens.flatten(), first_of_largest)
            seen = views_of.packed().view(rows, k + 1, -1)
        return StepOutput(self.accept(batch, tokens, drafts), tokens, drafts, logprobs, seen)

    def _draft(
        self, batch: DeviceBatch, positions: Tensor, k: int, needs: SamplingNeeds
    ) -> tuple[Tensor, list[Logits]]:
        """The drafts [R, k] of the next k positions, and the logits of the draft models at each."""
        drafts, before = positions.new_zeros(positions.shape[0], 0), list[Logits]()
        for j in range(k):
            before.append(self._forward(self.draft_models, batch, drafts[:, -1:], j))
            position = positions[:, j : j + 1]
            chosen = batch.sampler.pick(before[-1][self.draft_models[0]], position, needs)
            if self.propose is not None:
                chosen = self.propose(batch.sampler.key, position)
            drafts = torch.cat([drafts, chosen], 1)
        return drafts, before

    def _look_up(self, batch: DeviceBatch, k: int, size: int) -> Tensor:
        """Prompt lookup: drafts [R, k], -1 where there are none."""
        found = continuations(batch.history[:, :-1], batch.known(self.target), k)
        return found.masked_fill(found >= size, -1)  # virtual tokens of a soft prompt are never generated

    def accept(self, batch: DeviceBatch, tokens: Tensor, drafts: Tensor) -> Tensor:
        """How many tokens [R] are accepted: up to the first that no draft predicted, to the end of the
        response and to its limit. The batch moves on by them."""
        agreed = (tokens[:, :-1] == drafts).long().cumprod(1).sum(1)
        ends = batch.sampler.ends(tokens).long()
        unended = (ends.cumsum(1) - ends == 0).sum(1)  # the first end included
        room = batch.limit - batch.position
        count = torch.minimum(torch.minimum(agreed + 1, unended), room)
        further = torch.arange(tokens.shape[1], device=tokens.device)
        waste = batch.history.shape[1] - 1
        place = torch.where(further < count[:, None], batch.known(self.target)[:, None] + further, waste)
        batch.history.scatter_(1, place, tokens)
        final = (count - 1).clamp(min=0)[:, None]
        some, last = count > 0, tokens.gather(1, final)[:, 0]
        ended = some & (ends.gather(1, final)[:, 0] > 0)
        batch.position.add_(count)
        batch.limit.copy_(torch.where(ended, batch.position, batch.limit))
        for name, mine in batch.last.items():
            mine.copy_(torch.where(some, self._spell(name, last), mine))
        return count

    def _spell(self, name: str, tokens: Tensor) -> Tensor:
        """A model's ids of the base's tokens."""
        spelt = self.spelt.get(name)
        return tokens if spelt is None else spelt[tokens]

    def _forward(self, names: Sequence[str], batch: DeviceBatch, drafts: Tensor, ahead: int) -> Logits:
        """One forward of models on the same weights: with `ahead` 0 of every row's last token and the drafts
        [R, N] that follow it, else of the drafts alone, which are `ahead` tokens further."""
        parts, ids, places, spans = list[DevicePart](), list[Tensor](), list[Tensor](), dict[str, slice]()
        tokens = drafts.numel() + (batch.position.shape[0] if ahead == 0 else 0)
        for number, name in enumerate(names):
            runner, mine = self.runners[name], self._spell(name, drafts)
            if ahead == 0:
                mine = torch.cat([batch.last[name][:, None], mine], 1)
            span = slice(number * tokens, (number + 1) * tokens)
            part, at = self._part(name, batch, mine.shape[1], ahead, span)
            parts.append(part)
            places.append(at.flatten())
            ids.append(mine.flatten())
            if runner.adapter is not None:
                spans[runner.adapter] = span
        logits = self._run([self.runners[name] for name in names], ids, places, spans, DevicePacked(parts))
        rows, aligned = batch.position.shape[0], {}
        for part, name in zip(parts, names, strict=True):
            own = self.runners[name].alignment.align(logits[part.tokens])
            aligned[name] = own.view(rows, -1, own.shape[-1])
        return aligned

    def _part(
        self, name: str, batch: DeviceBatch, new: int, ahead: int, span: slice
    ) -> tuple[DevicePart, Tensor]:
        """Where the `new` next tokens of every row go, and their positions [R, new]."""
        runner = self.runners[name]
        assert isinstance(runner.cache, PagedCache)
        further = ahead + torch.arange(new, device=batch.position.device)
        real = further < (batch.limit - batch.position)[:, None]  # [R, new]
        start = batch.offset[name] + batch.position
        at = (start[:, None] + further).masked_fill(~real, 0)
        lengths = (start + ahead + new).masked_fill(~real[:, 0], 0)
        slots = slots_of(batch.table[name], at, real, runner.cache.spare)
        return DevicePart(runner.cache, batch.table[name], lengths, slots, span), at

    def _run(
        self,
        runners: Sequence[ModelRunner],
        ids: Sequence[Tensor],
        places: Sequence[Tensor],
        spans: Mapping[str, slice],
        packed: DevicePacked,
    ) -> Tensor:
        """The packed forward: logits [T, V of the models], in float32 at least."""
        first = runners[0]
        if first.lora is not None:
            first.lora.place(spans, sum(map(len, ids)))
        if first.embed is None:
            inputs = {"input_ids": torch.cat(list(ids))[None]}
        else:
            pieces = []
            for runner, own in zip(runners, ids, strict=True):
                assert runner.embed is not None
                pieces.append(runner.embed(own[None]))
            inputs = {"inputs_embeds": torch.cat(pieces, 1)}
        out = first.model(
            **inputs,
            position_ids=torch.cat(list(places))[None],
            use_cache=False,
            logits_to_keep=0,
            packed=packed,
        )
        return widen(out.logits[0])
