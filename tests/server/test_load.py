"""The load of benchmarks/serve.py, shortened: clients of every kind at once, and a kill of the server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.checkout import ROOT, environment
from tests.support.require import require_demo, require_or_skip

try:
    import uvicorn  # noqa: F401
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")


@pytest.mark.slow
def test_load_leaves_nothing_behind() -> None:
    """Clients that stream, leave, stall and send nonsense, to a server that was killed and started again: no
    response, no KV, no thread is left, and what it answers then is what a fresh model answers. Whether
    memory grows shows over minutes only: docs/server.md has the figures."""
    require_demo()
    done = subprocess.run(
        [sys.executable, "benchmarks/serve.py", "load",
         "--clients", "24", "--seconds", "4", "--kill-seconds", "2"],
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    found = json.loads(done.stdout or "{}")
    assert found, done.stderr
    assert found["same_as_offline"] and not any("no connection" in kind for kind in found["requests"]), found
    first, last = found["after"]
    assert last["running"] == last["waiting"] == last["kv_tokens"] == 0
    assert last["threads"] <= first["threads"]
    assert sum(found["requests"].values()) > 24 and found["around_the_kill"]
