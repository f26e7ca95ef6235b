"""The two tiers: what `make check` runs in minutes, and the rest, which `make check-all` runs as well."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("PROXYTUNE_THOROUGH"))
"""Whether tests marked `thorough` take all of their examples."""


WHOLE = bool(os.environ.get("PROXYTUNE_WHOLE"))
"""Whether tests over large published sets take all of them. Otherwise `make check-all` takes a part."""


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


def every_nth(items: Sequence[pytest.Item]) -> None:
    """Of a test that is marked `every(n)`, each n-th set of parameters stays in the quick tier."""
    seen: Counter[tuple[object, str]] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is None:
            continue
        test = (item.parent, getattr(item, "originalname", item.name))
        if seen[test] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1


def examples(quick: int, thorough: int) -> int:
    """How many examples a property is tried on: a few in the quick tier, all of them in the other."""
    return thorough if THOROUGH else quick
