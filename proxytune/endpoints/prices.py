"""What tokens cost."""

from __future__ import annotations

Price = tuple[float, float]
"""US dollars per million tokens, in and out."""
Tokens = tuple[int, int]
"""Of the prompt, and of the completion."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly."""
PRICES: dict[str, Price] = {
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4-turbo": (10.0, 30.0),
}
"""As listed in 2025; --price gives the present ones."""


def usd(tokens: Tokens, price: Price | None) -> float | None:
    """What tokens cost; None where no price is known."""
    return None if price is None else (tokens[0] * price[0] + tokens[1] * price[1]) / 1e6
