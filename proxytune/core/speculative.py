"""Speculative proxy-tuned decoding: an expert runs ahead, the other models read its drafts in one forward.

The expert has to see every position anyway, so its drafts cost nothing extra where they hold. A draft is what
the expert alone would say at a spot, drawn with the noise of that spot (shared-Gumbel coupling, Daliri,
Musco and Suresh 2024, arXiv 2408.07978); it stands if the proxy says the same there. So the response is a
function of the seed and the proxy's distribution alone: token for token that of plain decoding, whatever
drafts, how far and how well. Where the response has said something before, that passage is a draft for the
expert itself.

Models on the drafter's own weights (an antiexpert whose adapter it is) run ahead with it: the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.core.logits import some
from proxytune.core.pace import Pace
from proxytune.core.runner import Runner, Segment, Work, forward_all
from proxytune.core.sampling import Pick, Propose, Spot, pick
from proxytune.core.scheduler import Row

NGRAM = 3
"""How many tokens of a passage must have been said before for its continuation to be a draft."""
PASSAGE = 6
"""Most tokens that are taken from an earlier passage."""


@dataclass(frozen=True)
class Speculation:
    """How a batch speculates. Nothing here can change a token."""

    k: int | None = None
    """Draft length; None chooses it from measured times and acceptance, 0 decodes plainly."""
    lookup: bool = True
    """Whether earlier passages are drafts for the drafter."""
    drafter: str | None = None
    """The expert that drafts; None is the first."""
    pick: Pick = pick
    """Turns the drafter's logits into drafts. Any function is exact; a bad one is slow."""
    propose: Propose | None = None
    """What says the same where the host cannot look; a `pick` of another kind decodes on a GPU only with
    it."""


@dataclass
class Passages:
    """Where the n-grams of a growing sequence of ids were last followed by something."""

    ids: list[int] = field(default_factory=list)
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, ids: Sequence[int]) -> None:
        """Append ids; an n-gram is known once something follows it."""
        for token in ids:
            if len(self.ids) >= NGRAM:
                self.after[tuple(self.ids[-NGRAM:])] = len(self.ids)
            self.ids.append(token)

    def continuation(self, count: int) -> list[int]:
        """Up to `count` ids that followed the last n-gram when it occurred before."""
        at = self.after.get(tuple(self.ids[-NGRAM:]))
        return [] if at is None else self.ids[at : at + count]


@dataclass
class Drafts:
    """What the front has said ahead of the others."""

    tokens: list[list[int]]
    """Per decoding row."""
    logits: Mapping[str, Tensor]
    """Per model of the front: logits [N, V] at the spots of all drafts, row by row."""
    forwards: int = 0
    """How often the front ran."""


class StepSeconds(NamedTuple):
    """How long the three parts of a step took, each up to where its tokens were read by the host."""

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
    """Lets the front of an ensemble run ahead, and keeps count of how that goes."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        front: Sequence[str],
        lead: str,
        settings: Speculation,
        pace: Pace | None = None,
    ) -> None:
        """`front`: the drafter and the models that stand on its weights; empty where a model decodes alone
        and only earlier passages can be drafts. `lead` is the model whose ids the response has, `pace` what
        earlier engines with the same models have measured."""
        self.runners, self.front, self.lead, self.settings = runners, tuple(front), lead, settings
        self.pace = pace or Pace()
        self._longest = {name: runner.alignment.longest for name, runner in runners.items()}
        self._able = all(runner.rows.rewinds for runner in runners.values())
        self._passages: dict[int, Passages] = {}

    def depths(self, rows: Sequence[Row]) -> list[int]:
        """How far to draft in every decoding row: the token after the drafts is the proxy's own, and every
        window holds them."""
        k = self._choose(len(rows))
        return [self._depth(row, k) for row in rows]

    def _choose(self, rows: int) -> int:
        if self.settings.k is not None:
            return self.settings.k
        if not self._able or not (self.front or self.settings.lookup):
            return 0  # a model whose own cache cannot go back would compute the row anew each time
        return self.pace.choose(rows)

    def _depth(self, row: Row, k: int) -> int:
        room = row.request.max_new_tokens - len(row.tokens) - 1
        for name, ids in row.ids.items():
            room = min(room, (self.runners[name].window - len(ids)) // self._longest[name])
        return max(0, min(k, room))

    def draft(
        self, rows: Sequence[Row], depths: Sequence[int], prefill: Mapping[str, Sequence[Segment]]
    ) -> Drafts:
        """Run ahead by up to depths[i] tokens in row i; prompts ride along in the first forward."""
        if not self.front:
            return Drafts([self._guess(row, depth) for row, depth in zip(rows, depths, strict=True)], {})
        said: list[list[int]] = [[] for _ in rows]
        kept: list[dict[str, Tensor]] = []
        order: list[tuple[int, int]] = []
        wanted = [index for index, depth in enumerate(depths) if depth > 0]
        while wanted:
            guesses = {i: [] if said[i] else self._guess(rows[i], depths[i] - 1) for i in wanted}
            logits = forward_all(
                self.runners,
                {
                    name: self._feed(
                        name,
                        [(i, rows[i], said[i], guesses[i]) for i in wanted],
                        () if kept else prefill.get(name, ()),
                    )
                    for name in self.front
                },
            )
            spots = [
                Spot(rows[i], len(rows[i].tokens) + len(said[i]) + j)
                for i in wanted
                for j in range(len(guesses[i]) + 1)
            ]
            picked = self.settings.pick(logits[self.front[0]], spots).tolist()
            keep = self._keep(rows, said, guesses, picked, order)
            kept.append(some(logits, keep))
            wanted = [
                i for i in wanted if len(said[i]) < depths[i] and said[i][-1] not in rows[i].request.eos
            ]
        return Drafts(said, _in_order(kept, order), len(kept))

    def _keep(
        self,
        rows: Sequence[Row],
        said: list[list[int]],
        guesses: Mapping[int, Sequence[int]],
        picked: Sequence[int],
        order: list[tuple[int, int]],
    ) -> list[int]:
        """Append to `said` what the drafter agrees with and its own next token; what follows is forgotten.
        -> which of the logits belong to it, their spots appended to `order`."""
        keep, at = list[int](), 0
        for i, guess in guesses.items():
            own = picked[at : at + len(guess) + 1]
            new = own[: same_prefix(guess, own) + 1]
            if guess:
                self.pace.saw_guess(len(new) - 1, len(guess))
            ended = next((n for n, token in enumerate(new, 1) if token in rows[i].request.eos), len(new))
            new = new[:ended]
            keep += range(at, at + len(new))
            order += [(i, len(said[i]) + j) for j in range(len(new))]
            said[i] += new
            at += len(guess) + 1
            for name in self.front:
                unsaid = sum(len(self._spell(name, token)) for token in guess[len(new) - 1 :])
                if unsaid:
                    runner_rows = self.runners[name].rows
                    runner_rows.rewind(i, runner_rows.lengths[i] - unsaid)
        return keep

    def _feed(
        self,
        name: str,
        parts: Sequence[tuple[int, Row, Sequence[int], Sequence[int]]],
        prefill: Sequence[Segment],
    ) -> Work:
        """The work of one model: of every (index, row, said, guessed) the last token, which is the row's own
        if nothing is said, and those guessed to follow it, with logits after each; then prompts."""
        segments, keep, at = [], list[int](), 0
        as_they_are = self.runners[name].alignment.spelled is None
        for index, row, said, guess in parts:
            if as_they_are:
                ids = (said[-1] if said else row.ids[name][-1], *guess)
                keep += range(at, at + len(ids))
            else:
                last = self._spell(name, said[-1]) if said else row.ids[name][-1:]
                spelled = [last, *(self._spell(name, token) for token in guess)]
                ids = tuple(i for token in spelled for i in token)
                keep += accumulate((len(token) for token in spelled[1:]), initial=at + len(last) - 1)
            segments.append(Segment(index, ids))
            at += len(ids)
        return Work((*segments, *prefill), keep)

    def verification(
        self, name: str, rows: Sequence[Row], drafts: Drafts, prefill: Sequence[Segment]
    ) -> Work:
        """What a model behind the front is fed: every row's last token and its drafts."""
        parts = [(i, row, (), said) for i, (row, said) in enumerate(zip(rows, drafts.tokens, strict=True))]
        return self._feed(name, parts, prefill)

    def closing(
        self,
        name: str,
        rows: Sequence[Row],
        drafts: Drafts,
        open_rows: Sequence[int],
        prefill: Sequence[Segment],
    ) -> Work:
        """What the front is fed where all drafts stood: the last of them, or the row's last token."""
        return self._feed(name, [(i, rows[i], drafts.tokens[i], ()) for i in open_rows], prefill)

    def _spell(self, name: str, token: int) -> Sequence[int]:
        return self.runners[name].alignment.spell(token)

    def _guess(self, row: Row, count: int) -> list[int]:
        """Tokens that followed the last few when they were said before."""
        if not self.settings.lookup or count <= 0 or not self.pace.guessing():
            return []
        passages = self._passages.setdefault(row.ticket, Passages())
        passages.extend(row.ids[self.lead][len(passages.ids) :])
        return passages.continuation(min(count, PASSAGE))

    def learn(self, drafts: Drafts, accepted: int, examined: int, seconds: StepSeconds | None) -> None:
        """Note how a step went; its times only where no prompts rode along."""
        if examined:
            self.pace.saw_acceptance(accepted, examined)
        if seconds is None:
            return
        drafted = sum(map(len, drafts.tokens))
        if drafts.forwards:
            drafting = sum(1 for said in drafts.tokens if said)
            self.pace.saw_drafts(drafting, drafts.forwards, drafted, seconds.draft)
        self.pace.verify.add(drafted + len(drafts.tokens), seconds.verify)
        if seconds.closed:
            self.pace.close.add(seconds.closed, seconds.close)

    def forget(self, row: Row) -> None:
        """A row has finished."""
        self._passages.pop(row.ticket, None)


def _in_order(kept: Sequence[Mapping[str, Tensor]], order: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Logits of several forwards, row by row."""
    if not kept:
        return {}
    ranked = sorted(range(len(order)), key=order.__getitem__)
    return some({name: torch.cat([part[name] for part in kept]) for name in kept[0]}, ranked)
