"""A whole system of tiny random Llamas on disk, in float64, with the demo world's questions."""

from __future__ import annotations

from pathlib import Path

from tests.support import tiny

YAML = """\
# proxytune eval gsm --system tiny.yaml
description: random models
base: {model: ./base, dtype: float64}
antiexpert: {model: ./antiexpert, dtype: float64}
expert: {model: ./expert, dtype: float64}
tuned: {model: ./tuned, dtype: float64}
alpha: 1.0
data: {gsm: generated, truthfulqa: generated, truthfulqa_mc: generated}
"""
WINDOW = 1024


def write(folder: Path) -> Path:
    """Save the models and the YAML; returns the YAML's path."""
    shapes = {"base": 48, "tuned": 48, "expert": 32, "antiexpert": 32}
    for seed, (role, width) in enumerate(shapes.items()):
        model = tiny.build("llama", seed=seed, hidden_size=width, max_position_embeddings=WINDOW)
        tiny.save(folder / role, model)
    path = folder / "tiny.yaml"
    path.write_text(YAML)
    return path
