"""A training that is killed goes on exactly: the weights are those of one that was left alone, bit by bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proxytune.training_record import read_training
from proxytune.tuning.checkpoints import FOLDER, WHOLE, WholeCheckpoints, newest
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.session import plan, tune
from tests.support.kills import in_another_process
from tests.support.require import require_or_skip

pytest.importorskip("trl")

MODEL = "demo://antiexpert"
SETTINGS: dict[str, Any] = {
    "data": "gsm8k:generated",
    "limit": 30,
    "batch": 4,
    "epochs": 2,
    "save_every": 3,
    "learning_rate": 1e-2,
    "seed": 3,
}
TORN = 9
"""The step of the checkpoint that the kill leaves without its mark; the one before is of an epoch before."""
CASES: dict[str, dict[str, Any]] = {
    "full": {"accumulate": 2, "save_every": 1},
    "lora": {"validation": "0.2", "patience": 5, "rank": 8},
    "qlora": {"rank": 8, "max_steps": 12},
    "p-tuning": {"virtual_tokens": 4},
    "lomo": {},
    "through": {"through": "base", "base": "demo://base", "rank": 8, "max_steps": 12},
}


def work(case: str, out: Path, *, die_at: int | None = None) -> None:
    """Tune, and be killed between the files of a checkpoint and its mark."""
    torch.set_num_threads(1)
    if die_at is not None:
        whole = WholeCheckpoints.on_save

        def on_save(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            whole(self, args, state, control, **given)

        WholeCheckpoints.on_save = on_save  # type: ignore[method-assign]
    options = TuneOptions(**{**SETTINGS, **CASES[case]})
    tune(plan("lora" if case == "through" else case, MODEL, options), out, show=False)


def ended(case: str, out: Path, die_at: int | None = None) -> int:
    child = in_another_process(lambda: work(case, out, die_at=die_at))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_same_weights(case: str, tmp_path: Path) -> None:
    if case == "qlora":
        pytest.importorskip("bitsandbytes")
    if case == "lomo" and __import__("importlib.util").util.find_spec("lomo_optim") is None:
        require_or_skip("tune", "lomo-optim is not installed")
    import trl  # before the forks, which then share it
    import trl.trainer.sft_trainer  # noqa: F401

    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert ended(case, alone) == 0
    torn = TORN if case != "full" else 5
    assert ended(case, killed, die_at=torn) == -signal.SIGKILL
    left = sorted(path.name for path in (killed / FOLDER).iterdir())
    assert f"checkpoint-{torn}" in left and not (killed / FOLDER / f"checkpoint-{torn}" / WHOLE).exists()
    record = read_training(killed)
    assert record is not None and record.status == "unfinished"
    assert ended(case, killed) == 0

    first, second = read_training(alone), read_training(killed)
    assert first is not None and second is not None
    assert (first.status, second.status, second.resumed) == ("finished", "finished", 1)
    assert [p.loss for p in first.curve] == [p.loss for p in second.curve]
    assert (first.steps, first.tokens_seen, first.best_step) == (
        second.steps,
        second.tokens_seen,
        second.best_step,
    )
    weights = [load_file(next(folder.glob("*model*.safetensors"))) for folder in (alone, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert newest(killed) is None and not (killed / FOLDER).exists()


def test_the_newest_checkpoint_is_that_of_the_last_step(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-900", "checkpoint-1000"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        (tmp_path / FOLDER / name / WHOLE).touch()
        assert newest(tmp_path) == tmp_path / FOLDER / name
    for torn in ("checkpoint-2000", "checkpoint-tmp"):
        (tmp_path / FOLDER / torn).mkdir()
    assert newest(tmp_path) == tmp_path / FOLDER / "checkpoint-1000"
    assert len(list((tmp_path / FOLDER).iterdir())) == 5, "torn ones are gone"
