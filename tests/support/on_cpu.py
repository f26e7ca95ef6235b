"""A CPU without what a compiler would have made for it."""

from __future__ import annotations

import pytest

from proxytune.engine.kernels import cpu_rows


def without_row_kernels(patch: pytest.MonkeyPatch) -> None:
    """Norms and rotations are torch's, as where there is no compiler."""
    patch.setattr(cpu_rows, "built", lambda name: None)
