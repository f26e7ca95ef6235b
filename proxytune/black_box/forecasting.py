"""What a run with a base behind an API would take, before it is asked anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.black_box.client import ApiClient, Question
from proxytune.config import Sampling
from proxytune.endpoints import prices
from proxytune.records import Example


@dataclass(frozen=True)
class Forecast:
    """Calls and tokens, roughly."""

    calls: int
    stored: int
    """Questions that are answered already."""
    tokens: prices.Tokens
    usd: float | None
    """None where no price is known."""
    at_most: bool
    """Whether responses may end earlier, and take less."""
    spent: float = 0.0
    """US dollars that earlier sessions spent on the same items."""

    def __str__(self) -> str:
        cost = "cost unknown (give --price IN,OUT)" if self.usd is None else f"{self.usd:.2f} USD"
        most, before = "at most " if self.at_most else "", f" ({self.stored} are stored)" * bool(self.stored)
        return (
            f"{most}{self.calls:,} calls{before}, about {self.tokens[0]:,} + {self.tokens[1]:,} tokens, "
            f"{cost}"
        )


def forecast(
    client: ApiClient,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    one_position: bool,
    alone: bool,
    responses: int = 1,
) -> Forecast:
    """What these examples would take: multiple choice (`one_position`) one call each, the base `alone` one
    call for a response, and the proxy one for each token."""
    lengths = [len(example.prompt.plain) / prices.CHARACTERS_PER_TOKEN for example in examples]
    items = [client.item(example.prompt.plain) for example in examples]
    spent = client.spent_before(items)
    if one_position:
        questions = [
            Question(item, example.prompt.plain) for item, example in zip(items, examples, strict=True)
        ]
        known = [client.known(question) for question in questions]
        calls = len(known) - sum(known)
        prompt = sum(length for length, there in zip(lengths, known, strict=True) if not there)
        tokens = round(prompt), calls
        return Forecast(calls, sum(known), tokens, client.usd(tokens), at_most=False, spent=spent)
    each = sampling.max_new_tokens
    if alone:
        tokens = round(sum(lengths)), each * len(examples)
        return Forecast(len(examples), 0, tokens, client.usd(tokens), at_most=True, spent=spent)
    calls = each * len(examples) * responses
    tokens = round((sum(lengths) + len(examples) * each / 2) * each * responses), calls
    return Forecast(calls, 0, tokens, client.usd(tokens), at_most=True, spent=spent)
