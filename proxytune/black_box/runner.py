"""A base behind an API as a model of the engine: what it shows of a position is its logits, and all the rest
is minus infinity.

So everything that the engine does with a model, it does with an endpoint: batches, alphas, stops, sampling.
A row is the number of its prompt, and the tokens so far, in the experts' ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxytune.black_box.client import ApiClient, Question
from proxytune.black_box.token_bytes import TokenBytes
from proxytune.black_box.visible import Continued, VisiblePosition
from proxytune.engine.kv import ReferenceRows, Rows
from proxytune.engine.runners import VocabMap, Work
from proxytune.errors import UserError

ROOM = 1 << 40
"""Tokens that rows may have: nobody's memory is filled here, and the endpoint knows its own window."""


@dataclass(frozen=True)
class PromptText:
    """A prompt as the endpoint is asked."""

    text: str
    ids: tuple[int, ...]
    """The same in the experts' ids, for endpoints that are given ids."""
    item: int
    """Its number at the client."""


@dataclass
class ApiRunner:
    """Gives the engine the logits of a base behind an API."""

    client: ApiClient
    tokens: TokenBytes
    expert: str
    """The model whose vocabulary this is, for messages."""
    lenient: bool
    """Leave tokens out that the experts do not have, in place of an error."""
    device: torch.device
    window: int = ROOM
    alignment: VocabMap = field(init=False)
    prompts: list[PromptText] = field(default_factory=list)
    faults: dict[tuple[int, ...], str] = field(default_factory=dict)
    """A row -> why it could not go on."""
    remarks: set[str] = field(default_factory=set)
    """What a reader of the responses should know."""
    _rows: ReferenceRows = field(default_factory=lambda: ReferenceRows(ROOM))
    _places: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alignment = VocabMap(len(self.tokens.data))

    @property
    def rows(self) -> Rows:
        """The rows, as ids."""
        return self._rows

    @property
    def weights(self) -> object:
        """Nobody else's."""
        return self

    def prompt(self, text: str, ids: tuple[int, ...]) -> int:
        """The number that stands for a prompt: its id in the contexts of the base."""
        if text not in self._places:
            self._places[text] = len(self.prompts)
            self.prompts.append(PromptText(text, ids, self.client.item(text)))
        return self._places[text]

    def forward(self, work: Work) -> Tensor:
        """Feed the segments, and ask about the positions that are to be kept, all at the same time."""
        wanted, start = list[tuple[int, ...]](), 0
        for index, ids in work.segments:
            before = self._rows.ids[index]
            ends = [at - start + 1 for at in work.keep if start <= at < start + len(ids)]
            wanted += [(*before, *ids[:end]) for end in ends]
            self._rows.ids[index] = [*before, *ids]
            self._rows.lengths[index] += len(ids)
            start += len(ids)
        logits = torch.full((len(wanted), len(self.tokens.data)), -math.inf, dtype=torch.float64)
        for place, (row, reply) in enumerate(zip(wanted, self._asked(wanted), strict=True)):
            if reply is None:
                logits[place] = math.nan
            else:
                self._fill(logits[place], reply, row)
        return logits.to(self.device)

    def _asked(self, rows: Sequence[tuple[int, ...]]) -> list[Continued | None]:
        """What the endpoint goes on with after each row; None where it cannot be asked."""
        questions = [self._question(row) for row in rows]
        replies = iter(self.client.ask([question for question in questions if question is not None]))
        return [None if question is None else next(replies) for question in questions]

    def _question(self, row: tuple[int, ...]) -> Question | None:
        number, *tokens = row
        prompt = self.prompts[number]
        if self.client.spec.prompt_as == "ids":
            return Question(prompt.item, (*prompt.ids, *tokens))
        try:
            return Question(prompt.item, prompt.text + self.tokens.text(tokens).decode())
        except UnicodeDecodeError:
            last = self.tokens.data[tokens[-1]]
            self.faults[row] = (
                f"the response came to a part of a letter ({last!r}), with which no text can be sent on: "
                "`prompt_as: ids` in the system's file sends tokens, where the endpoint takes them"
            )
            return None

    def _fill(self, logits: Tensor, reply: Continued, row: tuple[int, ...]) -> None:
        """Put the visible tokens of a position into its logits [V]."""
        if not reply.positions:
            if reply.ended and self.tokens.eos is not None:
                logits[self.tokens.eos] = 0.0
                self.remarks.add("where the base ends a response, the endpoint shows no other token")
                return
            self.faults[row] = "the endpoint shows no token here: a part of a letter, perhaps"
            logits.fill_(math.nan)
            return
        position = reply.positions[0]
        self._note_fewer(position)
        same_ids = self.tokens.same_ids(position)
        found = False
        for token in position.tokens:
            ids = self.tokens.find(token, same_ids=same_ids)
            if not ids and not self.lenient:
                raise UserError(
                    f"the base's token {token.shown} is no token of the {self.expert}, so their states "
                    "cannot be kept in step: use an expert with the base's tokenizer, --vocab intersect to "
                    "leave such tokens out, --defer 0.3, or --mode choices"
                )
            if not ids:
                self.remarks.add(
                    f"tokens of the base that the {self.expert} does not have were left out ({token.shown}, "
                    "for example)"
                )
                continue
            found = True
            at = ids[0]
            logits[at] = max(token.logprob, float(logits[at]))
        if not found:
            self.faults[row] = f"no visible token of the base is one of the {self.expert}"
            logits.fill_(math.nan)

    def _note_fewer(self, position: VisiblePosition) -> None:
        asked, shown = self.client.spec.top_logprobs, len(position.tokens)
        if shown < min(asked, len(self.tokens.data)) // 2:
            self.remarks.add(
                f"the endpoint was asked for {asked} tokens of a position, and shows no more than {shown}"
            )
