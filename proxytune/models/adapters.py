"""Adapters from PEFT folders: on a model of their own, or on the weights that the antiexpert also runs on.

A LoRA adapter that shares weights acts on a span of the tokens, so that both models go through the weights in
one forward (engine/runners/lora.py). What is no plain LoRA (DoRA, a retrained head) is switched by PEFT per
forward instead. A soft prompt leaves the weights alone: it is a table of embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxytune.config import ModelSpec
from proxytune.engine.attention import Discovery
from proxytune.engine.runners import SharedLora, SpanLora, SpanMismatch
from proxytune.errors import UserError

BAD_CHECKPOINT = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers and peft raise for a checkpoint that is absent, damaged or needs a missing package."""

Pairs = dict[str, tuple[Tensor, Tensor, float]]
"""LoRA weights by the path of the layer: A [r, in], B [out, r], scale."""


@dataclass(frozen=True)
class Attached:
    """What an adapter added to a module."""

    bytes: int
    virtual: Tensor | None = None
    """Embeddings [n, d] if the adapter is a soft prompt."""


@dataclass(eq=False)
class Adapters:
    """The adapters that sit on one module."""

    peft: Any | None = None
    """PEFT's model around the module, where it switches adapters."""
    lora: SharedLora = field(default_factory=SharedLora)
    layers: dict[str, SpanLora] = field(default_factory=dict)

    def attach(self, module: PreTrainedModel, spec: ModelSpec, name: str, *, packed: bool) -> Attached:
        """Put the adapter of `spec` on the module under `name`. `packed`: the module runs through our
        attention, where models can share a forward. UserError if the folder is no adapter for it."""
        folder = spec.adapter or ""
        config = _config(folder)
        if config.is_prompt_learning:
            virtual = _soft_prompt(module, folder, name)
            return Attached(virtual.nbytes, virtual)
        if getattr(config, "bias", "none") != "none":
            raise UserError(
                f"adapter '{folder}' changes biases (bias: {config.bias}), which the antiexpert shares: "
                "give the expert its own `model`"
            )
        pairs = _plain_lora(module, folder, name) if packed and self.peft is None else None
        if pairs is not None and self._place(module, name, pairs):
            return Attached(sum(down.nbytes + up.nbytes for down, up, _ in pairs.values()))
        if self.layers:
            raise UserError(
                f"adapter '{folder}' is no plain LoRA and cannot stand beside the others on these weights: "
                "give its expert its own `model`"
            )
        before = bytes_of(module)
        self.peft = _by_peft(module, folder, name, self.peft)
        return Attached(bytes_of(module) - before)

    def _place(self, module: PreTrainedModel, name: str, pairs: Pairs) -> bool:
        """Put LoRA weights into the module's layers; False, and nothing is left behind, where one of the
        layers does not see all tokens in a row (experts of a mixture)."""
        for path, (down, up, scale) in pairs.items():
            if path not in self.layers:
                parent, _, child = path.rpartition(".")
                owner = module.get_submodule(parent)
                self.layers[path] = SpanLora(getattr(owner, child), self.lora)
                setattr(owner, child, self.layers[path])
            self.layers[path].add(name, down, up, scale)
        try:
            with torch.inference_mode():
                ids = torch.zeros(1, 5, dtype=torch.long, device=module.get_input_embeddings().weight.device)
                self.lora.place({name: slice(2, 5)}, 5)
                module(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, packed=Discovery())
        except SpanMismatch:
            self.remove(name)
            self._restore(module)
            return False
        finally:
            self.lora.place({}, 0)
        return True

    def _restore(self, module: PreTrainedModel) -> None:
        """Take the layers out again that carry no adapter."""
        for path, layer in list(self.layers.items()):
            if not layer.adapters:
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, layer.linear)
                del self.layers[path]

    def weights(self, module: PreTrainedModel, name: str) -> Iterator[tuple[str, Tensor]]:
        """The weights of one adapter by their names."""
        yield from ((key, tensor) for key, tensor in module.named_parameters() if f".{name}." in key)
        for path, layer in self.layers.items():
            if name in layer.adapters:
                down, up, _ = layer.adapters[name]
                yield from ((f"{path}.lora_A", down), (f"{path}.lora_B", up))

    def remove(self, name: str) -> None:
        """Forget one adapter."""
        if self.peft is not None:
            self.peft.delete_adapter(name)
        for layer in self.layers.values():
            layer.adapters.pop(name, None)


@dataclass(frozen=True)
class AdapterSwitch:
    """A forward that first puts one adapter, or none, in force: several roles on one set of weights."""

    module: PreTrainedModel
    peft: Any
    adapter: str | None

    def __call__(self, **arguments: Any) -> Any:
        """The module's forward under this role's adapter."""
        tuner = self.peft.base_model
        if self.adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.set_adapter(self.adapter)
            tuner.enable_adapter_layers()
        return self.module(**arguments)


def attach_for_good(module: PreTrainedModel, spec: ModelSpec) -> tuple[PreTrainedModel, Tensor | None]:
    """A model of its own with its adapter, merged into the weights except into quantised ones; and the soft
    prompt if it is one."""
    folder = spec.adapter or ""
    if _config(folder).is_prompt_learning:
        return module, _soft_prompt(module, folder, "default")
    peft = _by_peft(module, folder, "default", None)
    if spec.quantization == "none":
        merged: PreTrainedModel = peft.merge_and_unload()
        return merged, None
    return module, None


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    unique = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(unique.values())


def first_line(error: BaseException) -> str:
    """An exception's message in one line of readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _config(folder: str) -> Any:
    """The adapter's configuration; UserError if it is none that we run."""
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file() and Path(folder).exists():
        raise UserError(f"no adapter_config.json in '{folder}': is it a PEFT folder?")
    if Path(folder).exists() and not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"no adapter_model.safetensors in '{folder}': pickled weights are not loaded")
    try:
        config = PeftConfig.from_pretrained(folder)
    except BAD_CHECKPOINT as error:
        raise UserError(f"cannot load the adapter '{folder}': {first_line(error)}") from None
    if config.is_prompt_learning and config.peft_type not in {"PROMPT_TUNING", "P_TUNING"}:
        raise UserError(
            f"adapter '{folder}' is {config.peft_type.value}: LoRA and prompt tuning are supported"
        )
    return config


def _by_peft(module: nn.Module, folder: str, name: str, peft: Any | None) -> Any:
    """PEFT's model around the module, with one adapter more."""
    from peft import PeftModel

    try:
        if peft is not None:
            peft.load_adapter(folder, adapter_name=name)
            return peft
        return PeftModel.from_pretrained(module, folder, adapter_name=name).eval()
    except BAD_CHECKPOINT as error:
        raise UserError(f"cannot load the adapter '{folder}': {first_line(error)}") from None


def _soft_prompt(module: PreTrainedModel, folder: str, name: str) -> Tensor:
    """The embeddings [n, d] of a soft prompt, as the module's own are kept; the module itself is left
    alone."""
    prompt: Tensor = _by_peft(module, folder, name, None).get_prompt(batch_size=1)
    return prompt[0].detach().to(module.get_input_embeddings().weight)


def _plain_lora(module: PreTrainedModel, folder: str, name: str) -> Pairs | None:
    """The weights of a LoRA adapter, read by PEFT into a skeleton of the model; None if it is more than
    plain LoRA on linear layers."""
    from peft import PeftModel, load_peft_weights
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    with torch.device("meta"):
        skeleton = type(module)(module.config)
    try:
        # PEFT says which layers and scales the configuration means; nothing is computed in the skeleton
        PeftModel(skeleton, _config(folder), adapter_name=name, low_cpu_mem_usage=True)
        weights = load_peft_weights(folder, device="cpu")
    except BAD_CHECKPOINT as error:
        raise UserError(f"cannot load the adapter '{folder}': {first_line(error)}") from None
    pairs: Pairs = {}
    for path, layer in skeleton.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            return None
        if not isinstance(layer, BaseTunerLayer):
            continue
        plain = type(layer) is Linear and not layer.lora_variant and not layer.lora_bias.get(name)
        if not plain:
            return None
        where = next(module.get_submodule(path).parameters()).device
        keys = [f"base_model.model.{path}.lora_{side}.weight" for side in "AB"]
        shapes = [layer.lora_A[name].weight.shape, layer.lora_B[name].weight.shape]
        for key, shape in zip(keys, shapes, strict=True):
            if key not in weights or weights[key].shape != shape:
                raise UserError(
                    f"cannot load the adapter '{folder}': size mismatch or no weights for {path} "
                    f"(wanted {tuple(shape)})"
                )
        down, up = (weights[key].to(where, module.dtype) for key in keys)
        pairs[path] = down, up, float(layer.scaling[name])
    return pairs
