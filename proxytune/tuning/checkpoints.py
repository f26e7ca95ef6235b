"""Checkpoints that a kill cannot spoil, and what the libraries leave out of them.

transformers writes a checkpoint file by file, and would go on from a torn one. Here a checkpoint counts once
it has its mark, which is written last; others are deleted. PEFT saves of P-tuning the table of embeddings
alone, and lomo-optim's AdaLomo keeps its state outside of what transformers saves: both are added, and put
back where training goes on, so that it goes on exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from proxytune.run_files import write_atomically

FOLDER = "checkpoints"
WHOLE = "whole"
"""The mark of a checkpoint that has all of its files."""
REST = "proxytune.safetensors"
"""What the libraries do not save."""
ENCODER, ADALOMO = "prompt_encoder.", "adalomo."
_STATES = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


def newest(out: Path) -> Path | None:
    """The last whole checkpoint of a training; None if it has none. Torn ones are deleted."""
    found = []
    for path in (out / FOLDER).glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if (path / WHOLE).is_file() and step.isdecimal():
            found.append((int(step), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Adds what is missing to each checkpoint and marks it; puts it back where training goes on from one."""

    def __init__(self, out: Path, resumed: Path | None) -> None:
        self.out, self.resumed = out, resumed

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A checkpoint has been written by transformers."""
        if not state.is_world_process_zero:
            return
        folder = self.out / FOLDER / f"checkpoint-{state.global_step}"
        rest = rest_of(given["model"], given.get("optimizer"))
        if rest:
            save_file(rest, folder / REST)
        write_atomically(folder / WHOLE, b"")

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Weights and the optimiser have been read back by transformers."""
        if self.resumed is not None and (self.resumed / REST).is_file():
            put_back(load_file(self.resumed / REST), given["model"], given.get("optimizer"))


def rest_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What the libraries do not save: the network behind a soft prompt, AdaLomo's state."""
    encoders = getattr(model, "prompt_encoder", None)
    found: dict[str, Tensor] = {}
    if encoders is not None:
        found |= {f"{ENCODER}{key}": value for key, value in encoders.state_dict().items()}
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner).__name__ == "AdaLomo":
        for state in _STATES:
            found |= {f"{ADALOMO}{state}.{name}": value for name, value in getattr(inner, state, {}).items()}
        found[f"{ADALOMO}num_steps"] = torch.tensor(inner.num_steps)
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def put_back(rest: dict[str, Tensor], model: nn.Module, optimizer: Any) -> None:
    """The opposite of `rest_of`."""
    encoder = {k.removeprefix(ENCODER): v for k, v in rest.items() if k.startswith(ENCODER)}
    if encoder:
        encoders: Any = model.prompt_encoder
        encoders.load_state_dict(encoder)
    inner = getattr(optimizer, "optimizer", optimizer)
    for key, value in rest.items():
        if key == f"{ADALOMO}num_steps":
            inner.num_steps = int(value)
        elif key.startswith(ADALOMO):
            state, _, name = key.removeprefix(ADALOMO).partition(".")
            own = getattr(inner, state)
            own[name] = value.to(own[name].device) if name in own else value
