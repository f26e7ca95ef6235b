"""Doors that open on first use: every name that a package offers leads to something of that name."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from proxytune.lazy import door


@pytest.mark.parametrize(
    "package",
    ["", ".runs", ".judges", ".analysis", ".checks", ".tasks", ".tasks.own", ".endpoints", ".sandbox"],
)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(f"proxytune{package}")
    for name in module.__all__:
        found = getattr(module, name, None) or importlib.import_module(f"proxytune{package}.{name}")
        assert name == "OnProgress" or getattr(found, "__name__", name).rpartition(".")[2] == name, name


def test_a_door_opens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("proxytune.ground_of_a_test")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    home = ModuleType(f"{package.__name__}.home")
    home.__dict__["thing"] = object()
    monkeypatch.setitem(sys.modules, home.__name__, home)
    opened = door(package.__name__, {"thing": "home"})
    assert opened("thing") is home.__dict__["thing"] is package.__dict__["thing"]
    with pytest.raises(AttributeError) as raised:
        opened("other")
    assert str(raised.value) == "module 'proxytune.ground_of_a_test' has no attribute 'other'"
