"""What is said beside figures: which responses were not asked, were cut, or are empty, and how models are
run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from proxytune import cpu_load
from proxytune.engine.kernels import why_not
from proxytune.models import Loaded
from proxytune.records import FAULTS, Completion, JsonRow

MANY = 0.5
"""Share of empty responses above which something is likely to be wrong."""

REMARKED = {
    "template": "were not asked",
    "nan": "were broken off",
    "unseen": "were left out",
    "length": "were cut short",
}
"""Why a response is not what was asked for -> what is said of such responses."""


def stored_response(completion: Completion) -> JsonRow:
    """A response as it is stored."""
    row: JsonRow = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }
    return row if completion.remark is None else {**row, "remark": completion.remark}


def notes_on(responses: Sequence[JsonRow]) -> list[str]:
    """What a reader should know of stored responses."""
    n, notes = len(responses), []
    for reason, what in REMARKED.items():
        remarks = [row["remark"] for row in responses if row["finish_reason"] == reason and row.get("remark")]
        if remarks:
            [(most, _)] = Counter(remarks).most_common(1)
            notes.append(f"{len(remarks)} of {n} responses {what}: {most}")
    sound = [row for row in responses if row["finish_reason"] not in FAULTS]
    empty = sum(not row["text"].strip() for row in sound)
    if empty > MANY * len(sound):
        notes.append(
            f"{empty} of {n} responses are empty: a model that was tuned on a chat template may end at once "
            "without it (`chat: tokenizer` in the system's YAML), and a stop string may come first"
        )
    return notes


def notes_on_models(loaded: Mapping[str, Loaded]) -> list[str]:
    """What a user should know about how the models are run."""
    notes = [
        f"the {name} takes the slow exact path (one row at a time): {model.family.reason}"
        for name, model in loaded.items()
        if model.family.path == "reference"
    ]
    notes += [note for model in loaded.values() for note in model.notes]
    on_cpu = any(
        model.family.path == "packed" and model.module.device.type == "cpu" for model in loaded.values()
    )
    if on_cpu and (reason := why_not()) is not None:
        notes.append(f"attention on the CPU goes through torch, which is slower: {reason}")
    if all(model.device.type == "cpu" for model in loaded.values()):
        notes += filter(None, [cpu_load.advice(torch.get_num_threads(), cpu_load.read())])
    return notes
