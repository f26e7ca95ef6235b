"""Several processes train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from proxytune.training_record import read_training
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.session import plan, tune
from tests.support.checkout import ROOT

pytest.importorskip("trl")
MODEL = "demo://antiexpert"


@pytest.mark.slow
def test_two_processes_on_the_cpu_train_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "proxytune"]
    words += ["tune", "full", "--model", MODEL, "--data", "gsm8k:generated", "--limit", "16", "--batch", "2"]
    words += ["--max-steps", "3", "--learning-rate", "1e-3", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("stored in") == 1  # the first one speaks
    options = TuneOptions(data="gsm8k:generated", limit=16, batch=4, max_steps=3, learning_rate=1e-3)
    tune(plan("full", MODEL, options), tmp_path / "one", show=False)
    two, one = (read_training(tmp_path / name) for name in ("two", "one"))
    assert one is not None and two is not None and one.tokens_seen == two.tokens_seen
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) < 1e-5
