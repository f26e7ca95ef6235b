"""A trio that is trained where it runs, in minutes: real acceptance for a base that is larger beside its
experts than the demo's.

Text, recipe and tuning are the demo's (`proxytune.tuning.demo_models`); the base is deeper, and the text is
as much as there is time for, so that its answers are worse than those of the demo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.shapes import TRIO, Bench, bench_of
from proxytune.config import System
from proxytune.demo import world
from proxytune.demo.corpus import Amounts, TuningAmounts
from proxytune.tuning import demo_models as demo_build


@dataclass(frozen=True)
class Training:
    """What is trained, and on how much."""

    base: demo_build.ModelShape
    share: float
    """Of the demo's text."""


SMALL = demo_build.SHAPES["antiexpert"]


def trained_bench(
    training: Training, device: torch.device, dtype: torch.dtype, max_rows: int, tell: Callable[[str], None]
) -> Bench:
    """Train a base and a small model, tune the small one, and load the three."""
    miniature = world.make_world()
    with tempfile.TemporaryDirectory(prefix="proxytune-bench-") as temporary:
        folder = Path(temporary)
        shapes = {"base": training.base, "antiexpert": SMALL}
        demo_build.pretrain(miniature, folder, Amounts().scaled(training.share), shapes)
        tell("  pretrained")
        tuning = TuningAmounts().scaled(min(1.0, 2 * training.share))
        demo_build.tune(miniature, folder, folder, 0, tuning, {"expert": "antiexpert"})
        tell("  tuned")
        return bench_of(_system(folder, device, dtype), TRIO, max_rows, device)


def _system(folder: Path, device: torch.device, dtype: torch.dtype) -> System:
    made = demo_build.system_in(folder, folder)
    place = {"dtype": str(dtype).removeprefix("torch."), "device_map": str(device)}
    specs = {role: made.model_dump()[role] | place for role in TRIO}
    return System.model_validate({"name": "trained", **specs})
