"""Sandboxes that tests open, and the interpreter for those who may not get at ours."""

from __future__ import annotations

import os
import sys

from proxytune.errors import UserError
from proxytune.sandbox import Limits, Sandbox
from proxytune.sandbox.root import Interpreter, closed_folder
from proxytune.sandbox.sandbox import Backend
from tests.support.require import require_or_skip

SYSTEM_PYTHON = "/usr/bin/python3"


def open_or_skip(backend: Backend, limits: Limits) -> Sandbox:
    """The backend, or a skip with the reason. Under root, weak runs as a user who may not get at our
    Python."""
    python = sys.executable
    if backend == "weak" and os.geteuid() == 0 and closed_folder(Interpreter.find(python), isolated=False):
        python = SYSTEM_PYTHON
    try:
        return Sandbox.open(backend, python, workers=2).limited(limits)
    except UserError as error:
        require_or_skip("sandbox", str(error))
        raise
