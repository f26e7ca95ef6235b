"""Tiny random models of every family, saved to disk, and a byte-level tokenizer for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from proxytune.config import Chat, ModelSpec, System
from tests.support import tiny

VOCABULARY = 259  # <pad> <s> </s> and one token per byte


def tokenizer(
    chat_template: str | None = None,
    swapped: tuple[str, str] | None = None,
    *,
    add_eos: bool = False,
    eos: str = "</s>",
) -> PreTrainedTokenizerFast:
    """One token per byte; `<s>` is put first. `swapped` exchanges the ids of two tokens. `add_eos` puts
    `eos` behind every text, as a tokenizer does that was saved with add_eos_token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", eos, *alphabet])}
    if swapped:
        one, other = swapped
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    single = f"<s> $A {eos}" if add_eos else "<s> $A"
    special = [("<s>", 1), (eos, 2)]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        chat_template=chat_template,
    )


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**_MIXTURE, "head_dim": 8}),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}
"""Families that our packed attention serves: name -> (model_type, configuration)."""

REFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-moe-windows": (
        "qwen2_moe",
        {
            **_MIXTURE,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "gpt-neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 6},
    ),
    "codegen": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "mamba": ("mamba", {"state_size": 8}),
    "qwen3-next": (
        "qwen3_next",
        {
            **_MIXTURE,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "stablelm": ("stablelm", {}),
}
"""Families that must not take the packed path (core-notes: silently wrong, or without the keyword)."""


def build(family: str, seed: int = 0, scale: float = 0.4, **changes: Any) -> torch.nn.Module:
    """A random float64 model of the family; weights are scaled up so that logits differ clearly."""
    model_type, settings = {**PACKED, **REFERENCE}[family]
    config = AutoConfig.for_model(model_type, **{**_SMALL, **settings, **changes})
    config.dtype = torch.float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # grouped_mm refuses float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale * parameter.shape[-1] ** -0.5 * 2)
            elif "norm" not in name and "ln" not in name:
                parameter.normal_(0, 0.1)
    return model


def save(folder: Path, model: torch.nn.Module, words: PreTrainedTokenizerFast | None = None) -> Path:
    """Save a model and a tokenizer as a checkpoint folder."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (words or tokenizer()).save_pretrained(folder)
    return folder


def spec(folder: Path, chat: Chat = "none") -> ModelSpec:
    """A saved tiny model in float64."""
    return ModelSpec(model=str(folder), dtype="float64", chat=chat)


ROLES = {
    "base": (1, {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}),
    "expert": (2, {}),
    "antiexpert": (3, {}),
}


def save_trio(root: Path) -> System:
    """Three random Llamas of different sizes and seeds."""
    folders = {r: save(root / r, build("llama", seed, **shape)) for r, (seed, shape) in ROLES.items()}
    return System(name="trio", **{role: spec(folder) for role, folder in folders.items()})


def trio_of(root: Path, sizes: Sequence[int] = (259, 259, 259), **words: PreTrainedTokenizerFast) -> System:
    """A trio of tiny models with heads of these sizes; a role's tokenizer may be given."""
    roles = ("base", "expert", "antiexpert")
    folders = {
        role: tiny.save(root / role, tiny.build("llama", seed, vocab_size=size), words.get(role))
        for seed, (role, size) in enumerate(zip(roles, sizes, strict=True))
    }
    return System(name=str(root), **{role: spec(folder) for role, folder in folders.items()})
