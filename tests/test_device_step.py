"""Decoding in steps on the device, run eagerly on CPU tensors in float64: the tokens are the oracle's."""

from __future__ import annotations

import pytest
import test_decode
from proxytune.core.cache import PagedCache

@pytest.fixture(autouse=True)
def _on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.decode.SlotCache", PagedCache)
    monkeypatch.setattr("proxytune.core.device_loop.DEVICES", {"cpu"})

for name in dir(test_decode):
    if name.startswith("test_") or name in ("pace",):
        globals()[name] = getattr(test_decode, name)
layout = pytest.fixture(lambda: "pages")
