"""Tiny checkpoints of adapters on one antiexpert, and systems of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from proxytune.config import ModelSpec, System
from tests.support import tiny
from tests.support.tiny import spec


def fresh(folder: Path) -> Any:
    """A model as transformers alone loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # grouped_mm refuses float64
    return model


def save_all(root: Path) -> dict[str, Path]:
    """base, anti, and LoRA, DoRA, prompt-tuning and P-tuning checkpoints on anti."""
    found = {
        "base": tiny.save(root / "base", tiny.build("llama", 1, hidden_size=48)),
        "anti": tiny.save(root / "anti", tiny.build("llama", 3)),
        "qwen": tiny.save(root / "qwen", tiny.build("qwen2", 4)),
    }
    lora: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    configs: dict[str, tuple[str, Any]] = {
        "lora": ("anti", LoraConfig(**lora)),
        "lora2": ("anti", LoraConfig(**{**lora, "r": 2, "lora_alpha": 16})),
        "head": ("anti", LoraConfig(**lora, modules_to_save=["lm_head"])),
        "bias": ("qwen", LoraConfig(**{**lora, "bias": "lora_only"})),
        "prompt": ("anti", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
        "mlp": ("anti", p_tuning(PromptEncoderReparameterizationType.MLP)),
        "lstm": ("anti", p_tuning(PromptEncoderReparameterizationType.LSTM)),
    }
    for number, (name, (host, config)) in enumerate(configs.items()):
        torch.manual_seed(number)
        model = get_peft_model(fresh(found[host]), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if any(part in key for part in ("lora_", "prompt_encoder", "modules_to_save")):
                    parameter.normal_(0, 0.4)  # B too, which begins as 0
                if config.peft_type == "LORA" and config.bias != "none" and key.endswith("bias"):
                    parameter.normal_(0, 2)
        found[name] = root / name
        model.save_pretrained(found[name])
    return found


def p_tuning(kind: PromptEncoderReparameterizationType) -> PromptEncoderConfig:
    """P-tuning by this kind of encoder."""
    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=16,
        encoder_num_layers=2,
    )


def system(folders: dict[str, Path], expert: ModelSpec | None = None, **more: Any) -> System:
    """base and anti, and an expert."""
    parts: dict[str, Any] = {"base": spec(folders["base"]), "antiexpert": spec(folders["anti"])}
    return System(**{**parts, **({} if expert is None else {"expert": expert}), **more})


def on_anti(folders: dict[str, Path], name: str) -> ModelSpec:
    """An adapter, whose checkpoint names the antiexpert."""
    return ModelSpec(adapter=str(folders[name]))
