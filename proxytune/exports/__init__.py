"""Finished runs in the files of other tools. They are made of what is stored: no task's code is run."""

from __future__ import annotations

from proxytune.exports.formats import FORMATS, export

__all__ = ["FORMATS", "export"]
