"""A run of alpaca_farm as the `alpaca_eval` tool reads it: the run's outputs, and the baseline's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from proxytune.exports.format import Format
from proxytune.runs import verdicts
from proxytune.terminal import json_text


def files(folder: Path) -> dict[str, bytes]:
    """The two files of outputs."""
    run, rows = verdicts.read_finished("alpaca_farm", folder)
    name = f"{run.spec.system.name}-{run.spec.role}"
    sides = {"model_outputs.json": ("output_2", name), "reference_outputs.json": ("output_1", None)}
    found = {
        file: [
            {
                "dataset": row.get("dataset", ""),
                "instruction": row["instruction"],
                "output": row[column],
                "generator": generator or row.get("generator_1", ""),
            }
            for row in rows
        ]
        for file, (column, generator) in sides.items()
    }
    return {file: f"{json_text(outputs)}\n".encode() for file, outputs in found.items()}


def then(written: Sequence[str]) -> tuple[str, ...]:
    """How the tool judges them, and how its verdicts are scored."""
    outputs, reference = map(shlex.quote, written)
    return (
        f"then: alpaca_eval --model_outputs {outputs} --reference_outputs {reference}",
        "and:  proxytune score alpaca_farm annotations.json",
    )


FORMAT = Format("alpaca_eval's model_outputs.json and reference_outputs.json", files, then)
