"""What a user should know about how loaded models are run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from proxytune import cpu_load
from proxytune.engine.kernels import why_not
from proxytune.models import Loaded


def notes_on_models(loaded: Mapping[str, Loaded]) -> list[str]:
    """What a user should know about how the models are run."""
    notes = [
        f"the {name} takes the slow exact path (one row at a time): {model.family.reason}"
        for name, model in loaded.items()
        if model.family.path == "reference"
    ]
    notes += [note for model in loaded.values() for note in model.notes]
    on_cpu = any(
        model.family.path == "packed" and model.module.device.type == "cpu"
        for model in loaded.values()
    )
    if on_cpu and (reason := why_not()) is not None:
        notes.append(f"attention on the CPU goes through torch, which is slower: {reason}")
    if all(model.device.type == "cpu" for model in loaded.values()):
        notes += filter(None, [cpu_load.advice(torch.get_num_threads(), cpu_load.read())])
    return notes
