"""The command line: it parses, prints and asks. What a command does, Python can do as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.cli.app import main

__all__ = ["main"]

__getattr__ = door(__name__, {"main": "app"})
