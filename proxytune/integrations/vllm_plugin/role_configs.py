"""What vLLM is told of each model of the composite: a configuration of its own, so that nothing of the base
(cache window, quantisation) reaches the others. What it made of it is asserted after loading.

vLLM keeps one configuration for a process. A layer without a window of its own takes the base's, and a layer
that is not told its quantisation takes the base's: both give wrong logits without a word."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index


@dataclass(frozen=True)
class RoleModel:
    """One model of the composite, as the system names it."""

    name: str
    model: str
    """A folder or a hub id."""
    revision: str | None = None

    @property
    def prefix(self) -> str:
        """What its layers' names begin with. The base's names are its checkpoint's own."""
        return "" if self.name == "base" else self.name


def built(whole: VllmConfig, role: RoleModel) -> tuple[nn.Module, VllmConfig]:
    """The model of a role, without weights, and the configuration that it was made by."""
    config = config_of(whole, role)
    with set_model_tag(f"proxytune_{role.name}"):
        return initialize_model(config, prefix=role.prefix), config


def config_of(whole: VllmConfig, role: RoleModel) -> VllmConfig:
    """vLLM's configuration of one role. What is shared (the registry of layers, parallelism, the scheduler)
    stays shared."""
    first = whole.model_config
    own = ModelConfig(
        model=role.model,
        tokenizer=first.tokenizer,
        revision=role.revision,
        trust_remote_code=first.trust_remote_code,
        dtype=first.dtype,
        seed=first.seed,
        max_model_len=first.max_model_len,
        enforce_eager=first.enforce_eager,
    )
    own.is_submodel_config = True  # the whole was validated; vLLM fills in nothing for a part of it
    quantised = None
    if own.quantization is not None:
        quantised = VllmConfig.get_quantization_config(own, whole.load_config)
        if role.prefix:
            mapper = WeightsMapper(orig_to_new_prefix={"": f"{role.prefix}."})
            quantised.apply_vllm_mapper(mapper)  # the layers that a checkpoint leaves as they are, by name
    cache = copy.copy(whole.cache_config)
    cache.sliding_window = window_of(own)
    return replace(whole, model_config=own, quant_config=quantised, cache_config=cache)


def window_of(own: ModelConfig) -> int | None:
    """The window of all layers of a model: only where none of them sees everything. (The rule of vLLM's
    EngineArgs.create_engine_config.)"""
    kinds = getattr(own.hf_text_config, "layer_types", None)
    if kinds is None or all(kind == "sliding_attention" for kind in kinds):
        window: int | None = own.get_sliding_window()
        return window
    return None


def assert_own(model: nn.Module, config: VllmConfig, role: RoleModel) -> None:
    """RuntimeError unless every layer has the window and the quantisation of its own model's
    configuration."""
    text: Any = config.model_config.hf_text_config
    for layer, module in model.named_modules():
        if isinstance(module, Attention):
            expected = _window_at(text, extract_layer_index(module.layer_name))
            if (module.sliding_window or None) != expected:
                raise RuntimeError(
                    f"the {role.name}: vLLM gave layer '{layer}' the window {module.sliding_window}, and "
                    f"'{role.model}' has {expected} there"
                )
    linear = [module for module in model.modules() if isinstance(module, LinearBase)]
    plain = [isinstance(module.quant_method, UnquantizedLinearMethod) for module in linear]
    if config.quant_config is None and not all(plain):
        count = plain.count(False)
        raise RuntimeError(
            f"the {role.name} is not quantised, and vLLM gave {count} of its layers a quantisation"
        )
    if config.quant_config is not None and plain and all(plain):
        raise RuntimeError(f"the {role.name} is quantised, and vLLM made all of its layers plain ones")


def _window_at(text: Any, index: int) -> int | None:
    """The window of a layer by a model's configuration."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return window
