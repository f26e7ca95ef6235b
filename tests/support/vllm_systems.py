"""Systems that vLLM's CPU build can run: its attention needs heads of 32 and more, and the demo's small
models have 16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import tiny
from tests.support.checkout import WEIGHTS

HEAD = 64
YAML = """\
description: {description}
base: {{model: ./base, dtype: float32}}
antiexpert: {{model: ./antiexpert, dtype: float32}}
expert: {{model: ./expert, dtype: float32}}
data: {{gsm: generated, truthfulqa_mc: generated}}
"""


def write_demo(folder: Path) -> Path:
    """The demo with chat none for all roles and heads of 64; -> the system's file."""
    for role in ("base", "expert", "antiexpert"):
        widen(WEIGHTS.parent / role, folder / role)
    return _yaml(folder, "the demo, its heads widened")


def write_random(folder: Path, families: Mapping[str, str], **changes: Any) -> Path:
    """Random models in float32, one per role, of different weights; -> the system's file."""
    for seed, (role, family) in enumerate(families.items()):
        small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        tied = (
            {"tie_word_embeddings": True} if family.startswith("gemma") else {}
        )  # vLLM's Gemma has no other
        settings = {**small, **tied, **changes}
        model = tiny.build(family, seed=seed, max_position_embeddings=512, **settings)
        model.float()
        model.config.dtype = torch.float32  # type: ignore[union-attr]
        tiny.save(folder / role, model)
    return _yaml(folder, f"random models: {families}")


def _yaml(folder: Path, description: str) -> Path:
    path = folder / f"{folder.name}.yaml"
    path.write_text(YAML.format(description=json.dumps(description)))
    return path


def widen(source: Path, target: Path) -> None:
    """Copy a Llama with its heads padded to 64, which changes no logit but by rounding.

    A head of d becomes one of D by zeros behind each of the two halves that rotate together. With the base
    of the rotations raised to the power D / d, pairs keep their frequencies. Queries grow by sqrt(D / d),
    by which vLLM and transformers then divide more."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    ratio = HEAD / old
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    if old != HEAD:
        for name, tensor in weights.items():
            if ".q_proj." in name:
                weights[name] = _padded(tensor, old) * ratio**0.5
            elif ".k_proj." in name or ".v_proj." in name:
                weights[name] = _padded(tensor, old)
            elif ".o_proj." in name:
                weights[name] = _padded(tensor.T, old).T
        rotation = config["rope_parameters"]
        rotation["rope_theta"] = float(rotation["rope_theta"]) ** ratio
    config |= {"head_dim": HEAD, "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    saved = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(saved, target / "model.safetensors", {"format": "pt"})


def quantise(source: Path, target: Path) -> Path:
    """Copy a checkpoint with its projections in 8 bits, a scale per row, as compressed-tensors stores them;
    activations are quantised per token as they come. -> another copy, with the same weights in float32."""
    plain = target.with_name(f"{target.name}-plain")
    weights, packed = load_file(source / "model.safetensors"), dict[str, Tensor]()
    for folder in (target, plain):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    for name, tensor in weights.items():
        if "_proj.weight" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            packed[name], packed[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
            weights[name] = packed[name] * scale
        else:
            packed[name] = tensor
    save_file(packed, target / "model.safetensors", {"format": "pt"})
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    eight: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (target / "config.json").write_text(json.dumps(config))
    return plain


def _padded(rows: Tensor, old: int) -> Tensor:
    """Rows [heads * old, d] with zeros behind each half of a head: [heads * 64, d]."""
    halves = rows.view(-1, 2, old // 2, rows.shape[-1])
    wide = torch.zeros(halves.shape[0], 2, HEAD // 2, rows.shape[-1])
    wide[:, :, : old // 2] = halves
    return wide.view(-1, rows.shape[-1])
