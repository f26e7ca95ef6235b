"""When a missing thing is a failure, and where the reference data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, WEIGHTS

REFERENCE = Path(os.environ.get("PROXYTUNE_REFERENCE_DATA") or ROOT.parent / "shared")


def require_or_skip(kind: str, reason: str) -> None:
    """Skip the test (or the file that is imported), or fail it where the comma list PROXYTUNE_REQUIRE names
    the kind.

    Kinds: golden (reference data), gpu, tune (bitsandbytes, peft), wheel (a build), demo (its weights),
    sandbox (its backends), judges (httpx2), browser (playwright and a Chromium), triton (its interpreter
    runs the CUDA kernels), compiler (of C++, for the CPU's kernels), gguf, lm-eval and inspect (the
    packages; inspect_ai in an environment of its own), ray, real (a real model from PyPI), serve (fastapi
    and the other packages of the server), schemathesis, vllm (in an environment of its own)."""
    if kind in os.environ.get("PROXYTUNE_REQUIRE", "").split(","):
        pytest.fail(f"PROXYTUNE_REQUIRE names '{kind}', but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_demo() -> None:
    """The demo's weights are here, or the test is skipped or fails."""
    if not WEIGHTS.is_dir():
        require_or_skip("demo", "the demo's weights are not here (make demo-models)")
