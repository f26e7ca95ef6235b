"""`quantization: int8` or `int4`: every linear layer but the output head quantised while it is loaded.

transformers brings one tensor after another to its device, has it quantised there and drops it, so a card
holds the small model and one matrix at full width, whatever the size of the checkpoint. The output head stays
as it is: its errors go straight into the logits, it is often tied to the embeddings, and it is under 1% of a
70B Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from proxytune.engine.kernels import int4, int8

Bits = Literal[4, 8]
LAYERS: dict[Bits, type[int8.Int8Linear] | type[int4.Int4Linear]] = {8: int8.Int8Linear, 4: int4.Int4Linear}
METHOD = "proxytune_weight_only"
"""Our name in transformers' registry of quantisation methods."""


def _linears(model: PreTrainedModel, bits: Bits) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are quantised, by name: linear ones, neither the output head nor tied to anything."""
    left = set(HfQuantizer.get_modules_to_not_convert(model))
    for name, module in model.named_modules():
        sized = bits == 8 or (
            type(module) is nn.Linear and int4.fits(module.in_features, module.out_features)
        )
        if type(module) is nn.Linear and name not in left and sized:
            yield name, module


def _replace(model: PreTrainedModel, bits: Bits) -> None:
    """Put empty layers in place. ValueError if there are none."""
    found = list(_linears(model, bits))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers that `quantization: int{bits}` could quantise"
        )
    for name, module in found:
        new = LAYERS[bits](module.in_features, module.out_features, bias=None, device="meta")
        # the loader casts what it reads to the dtype that it finds here, so small numbers must come later
        new.weight, new.bias = module.weight, module.bias
        model.set_submodule(name, new)


def bytes_needed(skeleton: PreTrainedModel, itemsize: int, bits: Bits) -> int:
    """Bytes of a model's weights after quantisation; `itemsize` is that of what stays as it is."""
    total: int = sum(parameter.numel() for parameter in skeleton.parameters()) * itemsize
    for _, module in _linears(skeleton, bits):
        numbers = module.weight.numel()
        scales = 4 * module.out_features if bits == 8 else 4 * numbers // int4.GROUP
        total -= numbers * itemsize - numbers * bits // 8 - scales
    return total


@register_quantization_config(METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` is given."""

    def __init__(self, bits: Bits) -> None:
        self.quant_method, self.bits = METHOD, bits


class _Quantize(ConversionOps):  # type: ignore[misc]
    """One weight on its way from the checkpoint into the model."""

    def __init__(self, bits: Bits) -> None:
        self.bits = bits

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **_: object) -> dict[str, Tensor]:
        """The loader's call: a tensor, or a list of one, under one name."""
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        if not value.is_floating_point():
            raise ValueError(f"{full_layer_name} is {value.dtype} and cannot be quantised")
        weight, scale = LAYERS[self.bits].quantize(value)
        return {full_layer_name: weight, f"{full_layer_name}_scale": scale}


@register_quantizer(METHOD)
class WeightOnlyQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads a model."""

    quantized_element_size = 1
    is_trainable = False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Whether the weight of that name is to be quantised."""
        path, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), tuple(LAYERS.values()))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        _replace(model, self.quantization_config.bits)

    def get_quantize_ops(self) -> _Quantize:
        """A fresh operation, for one weight."""
        return _Quantize(self.quantization_config.bits)

    def is_serializable(self) -> bool:
        """Checkpoints are kept at full width."""
        return False


def random_int8(
    config: Any, device: torch.device | str, *, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of that configuration with random int8 linear layers, made on the device, for benchmarks.

    No weight ever exists at full width. Entries are uniform over -127..127 with the standard deviation of
    the configuration's `initializer_range`; embeddings and head are normal, norms one, biases zero."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _replace(model, 8)
    generator = torch.Generator(device).manual_seed(seed)
    deviation = float(getattr(config.get_text_config(), "initializer_range", 0.02))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, own = name.rpartition(".")
        eight = own == "weight" and isinstance(model.get_submodule(path), int8.Int8Linear)
        new = torch.empty(parameter.shape, dtype=torch.int8 if eight else parameter.dtype, device=device)
        if eight:
            new.random_(-127, 128, generator=generator)
        elif own == "weight_scale":
            new.fill_(deviation / (127 * 128 / 3) ** 0.5)
        elif new.dim() == 1:
            new.fill_(float(own == "weight"))
        else:
            new.normal_(0, deviation, generator=generator)
        setattr(model.get_submodule(path), own, nn.Parameter(new, requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()
