"""Speculative proxy-tuned decoding: an expert drafts, the other models verify its drafts in one forward.

The expert has to see every position anyway, so its drafts cost nothing extra where they are accepted. A draft
is the token that the expert alone would choose at a position, drawn with the noise of that position
(shared-Gumbel coupling, Daliri, Musco and Suresh 2024, arXiv 2408.07978); it is accepted if the proxy chooses
the same there. So the response is a function of the seed and the proxy's distribution alone: token for token
that of plain decoding, whatever drafts, how far and how well. Prompt lookup drafts for the expert itself, or,
where that measures faster, for all models at once.

Models on the drafter's own weights (an antiexpert whose adapter it is) run with it: these are the draft
models. The others verify."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.logits import some
from proxytune.engine.request import Row, Segment, Work
from proxytune.engine.runners.runner import Runner, forward_all
from proxytune.engine.sampling import Pick, Propose, RowPosition, pick
from proxytune.engine.speculative.draft_length import PROMPT_LOOKUP_LENGTH, PROMPT_LOOKUP_ROWS, DraftLength
from proxytune.engine.speculative.prompt_lookup import PromptLookup
from proxytune.engine.timing import Clock

LOOKUP = "lookup"
"""The drafter's name where prompt lookup drafts for all models, and no expert does."""


@dataclass(frozen=True)
class Speculation:
    """How a batch speculates. Nothing here can change a token."""

    k: int | None = None
    """Draft length; None chooses it from measured times and acceptance, 0 decodes plainly."""
    lookup: bool = True
    """Whether prompt lookup drafts."""
    drafter: str | None = None
    """The expert that drafts, or LOOKUP; None is the first expert."""
    pick: Pick = pick
    """Turns the drafter's logits into drafts. Any function is exact; a bad one is slow."""
    propose: Propose | None = None
    """What drafts the same where the host cannot look; a `pick` of another kind decodes on a GPU only with
    it."""


@dataclass
class Drafts:
    """The drafts of one step, before they are verified."""

    tokens: list[list[int]]
    """Per decoding row."""
    logits: Mapping[str, Tensor]
    """Per draft model: logits [N, V] at the positions of all drafts, row by row."""
    draft_models: tuple[str, ...]
    """The models that drafted; none where prompt lookup drafts, which all models verify."""
    forwards: int = 0
    """How often the draft models ran."""


class StepSeconds(NamedTuple):
    """How long the three parts of a step took by the engine's clock, each up to where its tokens were read by
    the host."""

    draft: float
    verify: float
    close: float
    closed: int
    """Rows that the last part was for."""


def same_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items two sequences share from the start."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


class Drafter:
    """Lets the draft models of an ensemble draft, and keeps count of what is accepted."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        draft_models: Sequence[str],
        target: str,
        settings: Speculation,
        draft_length: DraftLength | None = None,
        *,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`draft_models`: the drafter and the models on its weights; empty where a model decodes alone and
        only prompt lookup can draft. `target` is the model whose ids the response has, `draft_length` what
        earlier engines with the same models have measured, `clock` what it is measured by."""
        self._clock = clock
        self.runners, self.draft_models = runners, tuple(draft_models)
        self.target, self.settings = target, settings
        self.draft_length = draft_length or DraftLength()
        self._looking_up = False
        """Whether prompt lookup drafts for all models in the next step."""
        self._longest = {name: runner.alignment.longest for name, runner in runners.items()}
        self._able = all(runner.rows.rewinds for runner in runners.values())
        self._lookups: dict[int, PromptLookup] = {}

    def depths(self, rows: Sequence[Row]) -> list[int]:
        """How far to draft in every decoding row: the token after the drafts is the proxy's own, and every
        window holds them."""
        k = self._choose(len(rows))
        self._looking_up = False
        if self.watches(len(rows)):
            found = [len(self.look_up(row, self._depth(row, PROMPT_LOOKUP_LENGTH))) for row in rows]
            if self.draft_length.prefers_lookup(found, k):
                self._looking_up = True
                return found
        return [self._depth(row, k) for row in rows]

    def watches(self, rows: int) -> bool:
        """Whether prompt lookup is tried in so many rows, to draft where that would do better."""
        settings = self.settings
        return self._able and settings.lookup and settings.k is None and rows <= PROMPT_LOOKUP_ROWS

    def _choose(self, rows: int) -> int:
        if self.settings.k is not None:
            return self.settings.k
        if not self._able or not self.draft_models:
            return 0  # a model whose own cache cannot go back would compute the row anew each time
        return self.draft_length.choose(rows)

    def _depth(self, row: Row, k: int) -> int:
        room = row.request.max_new_tokens - len(row.tokens) - 1
        for name, ids in row.ids.items():
            room = min(room, (self.runners[name].window - len(ids)) // self._longest[name])
        return max(0, min(k, room))

    def draft(
        self, rows: Sequence[Row], depths: Sequence[int], prefill: Mapping[str, Sequence[Segment]]
    ) -> Drafts:
        """Run ahead by up to depths[i] tokens in row i; prompts ride along in the first forward."""
        if not self.draft_models or self._looking_up:
            return Drafts([self.look_up(row, n) for row, n in zip(rows, depths, strict=True)], {}, ())
        drafted: list[list[int]] = [[] for _ in rows]
        kept: list[dict[str, Tensor]] = []
        order: list[tuple[int, int]] = []
        wanted = [index for index, depth in enumerate(depths) if depth > 0]
        alone = not any(prefill.values())
        while wanted:
            began = self._clock()
            guesses = {
                i: [] if drafted[i] else self._guess(rows[i], depths[i] - 1, len(wanted)) for i in wanted
            }
            logits = forward_all(
                self.runners,
                {
                    name: self._feed(
                        name,
                        [(i, rows[i], drafted[i], guesses[i]) for i in wanted],
                        () if kept else prefill.get(name, ()),
                    )
                    for name in self.draft_models
                },
            )
            positions = [
                RowPosition(rows[i], len(rows[i].tokens) + len(drafted[i]) + j)
                for i in wanted
                for j in range(len(guesses[i]) + 1)
            ]
            picked = self.settings.pick(logits[self.draft_models[0]], positions).tolist()
            if alone:
                self.draft_length.read.add(len(positions), self._clock() - began)
            keep = self._keep(rows, drafted, guesses, picked, order)
            kept.append(some(logits, keep))
            wanted = [
                i for i in wanted if len(drafted[i]) < depths[i] and drafted[i][-1] not in rows[i].request.eos
            ]
        return Drafts(drafted, _in_order(kept, order), self.draft_models, len(kept))

    def _keep(
        self,
        rows: Sequence[Row],
        drafted: list[list[int]],
        guesses: Mapping[int, Sequence[int]],
        picked: Sequence[int],
        order: list[tuple[int, int]],
    ) -> list[int]:
        """Append to `drafted` what the drafter agrees with and its own next token; what follows is forgotten.
        -> which of the logits belong to it, their places appended to `order`."""
        keep, at = list[int](), 0
        for i, guess in guesses.items():
            own = picked[at : at + len(guess) + 1]
            new = own[: same_prefix(guess, own) + 1]
            if guess:
                self.draft_length.guesses.add(len(new) - 1, min(len(guess), len(new)))
            ended = next((n for n, token in enumerate(new, 1) if token in rows[i].request.eos), len(new))
            new = new[:ended]
            keep += range(at, at + len(new))
            order += [(i, len(drafted[i]) + j) for j in range(len(new))]
            drafted[i] += new
            at += len(guess) + 1
            for name in self.draft_models:
                rejected = sum(len(self._spell(name, token)) for token in guess[len(new) - 1 :])
                if rejected:
                    runner_rows = self.runners[name].rows
                    runner_rows.rewind(i, runner_rows.lengths[i] - rejected)
        return keep

    def _feed(
        self,
        name: str,
        parts: Sequence[tuple[int, Row, Sequence[int], Sequence[int]]],
        prefill: Sequence[Segment],
    ) -> Work:
        """The work of one model: of every (index, row, drafted, guessed) the last token, which is the row's
        own if nothing is drafted, and those guessed to follow it, with logits after each; then prompts."""
        segments, keep, at = [], list[int](), 0
        as_they_are = self.runners[name].alignment.spelled is None
        for index, row, drafted, guess in parts:
            if as_they_are:
                ids = (drafted[-1] if drafted else row.ids[name][-1], *guess)
                keep += range(at, at + len(ids))
            else:
                last = self._spell(name, drafted[-1]) if drafted else row.ids[name][-1:]
                spelled = [last, *(self._spell(name, token) for token in guess)]
                ids = tuple(i for token in spelled for i in token)
                keep += accumulate((len(token) for token in spelled[1:]), initial=at + len(last) - 1)
            segments.append(Segment(index, ids))
            at += len(ids)
        return Work((*segments, *prefill), keep)

    def verification(
        self, name: str, rows: Sequence[Row], drafts: Drafts, prefill: Sequence[Segment]
    ) -> Work:
        """What a verifying model is fed: every row's last token and its drafts."""
        parts = [
            (i, row, (), drafted) for i, (row, drafted) in enumerate(zip(rows, drafts.tokens, strict=True))
        ]
        return self._feed(name, parts, prefill)

    def closing(
        self,
        name: str,
        rows: Sequence[Row],
        drafts: Drafts,
        open_rows: Sequence[int],
        prefill: Sequence[Segment],
    ) -> Work:
        """What a draft model is fed where all drafts are accepted: the last of them, or the row's last
        token."""
        return self._feed(name, [(i, rows[i], drafts.tokens[i], ()) for i in open_rows], prefill)

    def _spell(self, name: str, token: int) -> Sequence[int]:
        return self.runners[name].alignment.spell(token)

    def _guess(self, row: Row, count: int, rows: int) -> list[int]:
        """Tokens of prompt lookup for the drafter itself, if they are worth reading with so many rows."""
        found = self.look_up(row, min(count, PROMPT_LOOKUP_LENGTH))
        return found if found and self.draft_length.guessing(rows, len(found)) else []

    def look_up(self, row: Row, count: int) -> list[int]:
        """Prompt lookup: `count` tokens that followed the last few when they occurred before; none if they
        are new."""
        if not self.settings.lookup or count <= 0:
            return []
        lookup = self._lookups.setdefault(row.ticket, PromptLookup())
        lookup.extend(row.ids[self.target][len(lookup.ids) :])
        found, size = lookup.continuation(count), self.runners[self.target].alignment.size
        for n, token in enumerate(found):
            if token >= size:
                return found[:n]  # virtual tokens of a soft prompt are never generated
            if token in row.request.eos:
                return found[: n + 1]
        return found

    def learn(self, drafts: Drafts, accepted: int, examined: int, seconds: StepSeconds | None) -> None:
        """Note how a step went; its times only where no prompts rode along."""
        if examined and drafts.draft_models:
            self.draft_length.acceptance.add(accepted, examined)
        if seconds is None:
            return
        drafted = sum(map(len, drafts.tokens))
        if drafts.forwards:
            drafting = sum(1 for own in drafts.tokens if own)
            self.draft_length.saw_drafts(drafting, drafts.forwards, drafted, seconds.draft)
        verified = self.draft_length.lookup if self._looking_up else self.draft_length.verify
        verified.add(drafted + len(drafts.tokens), seconds.verify)
        if seconds.closed:
            self.draft_length.close.add(seconds.closed, seconds.close)

    def watch(self, rows: Sequence[Row], chosen: Sequence[Sequence[int]]) -> None:
        """Note whether prompt lookup was right about what the proxy chooses next, drafts or not; `chosen` are
        the tokens that come next in the rows, some of which may be given none."""
        if not self.watches(len(rows)):
            return
        accepted = examined = 0
        for row, tokens in zip(rows, chosen, strict=True):
            found = self.look_up(row, PROMPT_LOOKUP_LENGTH)
            right = same_prefix(found, tokens)
            accepted += right
            examined += min(right + 1, len(found), len(tokens))
        if examined:
            self.draft_length.lookup_acceptance.add(accepted, examined)

    def forget(self, row: Row) -> None:
        """A row has finished."""
        self._lookups.pop(row.ticket, None)

    def forget_all(self) -> None:
        """No row is under way."""
        self._lookups.clear()
        self._looking_up = False


def _in_order(kept: Sequence[Mapping[str, Tensor]], order: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Logits of several forwards, row by row."""
    if not kept:
        return {}
    ranked = sorted(range(len(order)), key=order.__getitem__)
    return some({name: torch.cat([part[name] for part in kept]) for name in kept[0]}, ranked)
