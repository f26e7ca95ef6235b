"""The Triton kernels become machine code for GPUs that are not here: ptxas comes with Triton and needs none.

This says that they compile, fit and use the units that they should, not that they are right there: the
interpreter runs them for that (test_paged_attention, test_int8), and test_gpu on a device."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, environment
from tests.support.require import require_or_skip

LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program can have (CUDA programming guide, compute capabilities)."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        require_or_skip("triton", "triton is not installed")
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 33
    for case in cases:
        assert case["shared"] <= LARGEST_SHARED[capability], case
        assert case["stack"] <= 128, f"{case} spills registers"
        assert not case["tf32"], f"{case} rounds float32 to tf32"
        half = "fp16" in case["name"] or "bf16" in case["name"]
        multiplies = "combine" not in case["name"] and "rows" not in case["name"]
        assert case["tensor_cores"] == (half and multiplies) or "scalar" in case["name"], case
