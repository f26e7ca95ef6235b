"""The two tiers: what `make check` runs in minutes, and the rest, which `make check-all` runs as well."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("PROXYTUNE_THOROUGH"))
"""Whether tests marked `thorough` take all of their examples."""


def slow(*values: Any) -> Any:
    """A parameter set of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


CROSSED = {"speculation", "k", "layout"}
"""Ways of drafting and caches: parameters of the engine's tests that are crossed with others."""


def on_the_diagonal(items: Sequence[pytest.Item]) -> None:
    """Of the tests that cross one of these parameters with others, every third stays in the quick tier: all
    values of each, and not every combination of them."""
    for item in items:
        indices = getattr(getattr(item, "callspec", None), "indices", {})
        if CROSSED & set(indices) and len(indices) > 1 and sum(indices.values()) % 3:
            item.add_marker(pytest.mark.slow)


def examples(quick: int, thorough: int) -> int:
    """How many examples a property is tried on: a few in the quick tier, all of them in the other."""
    return thorough if THOROUGH else quick
