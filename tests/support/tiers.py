"""The two tiers: what `make check` runs in minutes, and the rest, which `make check-all` runs as well."""

from __future__ import annotations

import os
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("PROXYTUNE_THOROUGH"))
"""Whether tests marked `thorough` take all of their examples."""


def slow(*values: Any) -> Any:
    """A parameter set of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def examples(quick: int, thorough: int) -> int:
    """How many examples a property is tried on: a few in the quick tier, all of them in the other."""
    return thorough if THOROUGH else quick
