"""Reads a checkpoint: dtype, device, quantisation. safetensors or GGUF; remote code only when asked."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from proxytune import processes
from proxytune.config import ModelSpec
from proxytune.engine.kernels import int4
from proxytune.errors import UserError, needs_extra
from proxytune.models.adapter_files import BAD_CHECKPOINT, brings_tokenizer, first_line, own_template
from proxytune.models.checkpoint import CheckpointSource, check_weights, load_config, locate, reading
from proxytune.models.memory import GIB, check_memory, place_of
from proxytune.models.support import UNBOUNDED
from proxytune.models.vocabulary import Tokenizer
from proxytune.models.weight_only import WeightOnlyConfig

SMALL = GIB
"""Bytes of weights under which loading takes no time worth a progress bar."""


def load_tokenizer(spec: ModelSpec, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies beside a model, or beside its adapter where one does."""
    assert spec.model is not None
    beside = spec.adapter is not None and brings_tokenizer(spec.adapter)
    named = spec.adapter if beside else spec.model
    source = CheckpointSource(str(Path(spec.adapter or "").expanduser())) if beside else locate(spec.model)
    with reading(f"the tokenizer of '{named}'"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location,
            revision=None if beside else spec.revision,
            trust_remote_code=spec.trust_remote_code or trust_remote_code,
            gguf_file=source.tokenizer_gguf,
        )
        words = len(tokenizer.get_vocab())
    if not words:
        raise UserError(f"cannot load the tokenizer of '{named}': it has no tokens")
    tokenizer.model_max_length = UNBOUNDED  # our own check of the length names the numbers
    if spec.adapter is not None and (template := own_template(spec.adapter)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_module(spec: ModelSpec, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a spec in evaluation mode. UserError if it cannot be found, is no safetensors or does not
    fit."""
    assert spec.model is not None
    source = locate(spec.model)
    remote = spec.trust_remote_code or trust_remote_code
    quantization = _quantization(spec, source)
    config = load_config(spec, trust_remote_code=trust_remote_code)
    try:
        size = check_memory(spec, config, remote)
        (disable_progress_bar if size < SMALL else enable_progress_bar)()
        module, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            revision=spec.revision,
            gguf_file=source.gguf,
            trust_remote_code=remote,
            use_safetensors=True,
            dtype=spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
            device_map=_place(spec),
            distributed_config=_split(spec),
            quantization_config=quantization,
            output_loading_info=True,
        )
    except BAD_CHECKPOINT as error:
        raise UserError(f"cannot load the model '{spec.model}': {first_line(error)}") from None
    _require_all(spec.model, report)
    if spec.dtype == "float64":
        with suppress(
            AttributeError, ValueError
        ):  # only mixtures of experts have it; grouped_mm refuses float64
            module.set_experts_implementation("eager")
    if spec.quantization == "4bit":
        _keep_as_stored(module)
    module.config.distributed_config = None  # small copies of the model are whole
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _keep_as_stored(module: PreTrainedModel) -> None:
    """Weights of bitsandbytes in 4 bits stay as they were stored. On a CPU with AVX512-BF16 the first forward
    would pack them anew, whatever the dtype. That rounds their scales to bfloat16 (a model that has run is no
    longer the one that was loaded), takes the gradient from a training that is measured in between, and fails
    where a width is no multiple of 64."""
    from bitsandbytes.nn import Linear4bit

    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _place(spec: ModelSpec) -> Any:
    """Where transformers puts the layers; None where it splits them."""
    if spec.device_map == processes.TENSOR:
        return None
    return spec.device_map or {"": place_of(spec)}


def _split(spec: ModelSpec) -> DistributedConfig | None:
    """How transformers splits the layers of a model over processes. UserError outside torchrun, and for what
    cannot be split."""
    if spec.device_map != processes.TENSOR:
        return None
    if processes.world() == 1:
        raise UserError(
            f"'{spec.model}' has `device_map: {processes.TENSOR}`: start N processes with torchrun "
            "--nproc-per-node N --local-ranks-filter 0 -m proxytune ... (docs/scale.md)"
        )
    if spec.adapter is not None or spec.quantization != "none":
        raise UserError(
            f"'{spec.model}' has `device_map: {processes.TENSOR}`: plain weights can be split, and "
            "neither an adapter nor `quantization`"
        )
    processes.joined()
    return DistributedConfig(tp_size=processes.world())


def _require_all(model: str, report: Any) -> None:
    """UserError for a checkpoint without weights that its architecture has."""
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and makes them up at random
        raise UserError(f"'{model}' lacks {len(missing)} weights of its architecture, {missing[0]} first")


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier, under the rules of all models: safetensors in their folder, and no code of its
    own."""

    config: Any
    tokenizer: Any
    module: Any

    @staticmethod
    def check(model: str) -> Any:
        """The configuration of a classifier whose files are fit; UserError where they are not."""
        spec = ModelSpec(model=model)
        config = load_config(spec)
        check_weights(spec, config)
        return config

    @classmethod
    def load(cls, model: str, device: str) -> Classifier:
        """A classifier in evaluation mode."""
        config, location = cls.check(model), locate(model).location
        with reading(f"the classifier '{model}'"):
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
            module, report = AutoModelForSequenceClassification.from_pretrained(
                location,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        _require_all(model, report)
        return cls(config, tokenizer, module.to(device).eval())


def _quantization(spec: ModelSpec, source: CheckpointSource) -> Any:
    """What transformers is told of the weights; None for plain ones."""
    if source.gguf is not None:
        if spec.quantization != "none":
            raise UserError(
                f"'{spec.model}': the weights of a GGUF file are unpacked, so `quantization: "
                f"{spec.quantization}` needs a checkpoint in safetensors"
            )
        # packed blocks would need a kernel that is downloaded, and are no plain layers
        return GgufConfig(dequantize=True)
    if spec.quantization == "none":
        return None
    if spec.quantization == "int8":
        return WeightOnlyConfig(8)
    if spec.quantization == "int4":
        if (reason := int4.why_not()) is not None:
            raise UserError(f"'{spec.model}' cannot be loaded with quantization int4: {reason}")
        return WeightOnlyConfig(4)
    needs_extra(f"quantization {spec.quantization}", "bitsandbytes", "quantized")
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # a warning per layer and forward
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
