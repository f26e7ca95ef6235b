"""Adapters from PEFT folders: on a model of their own, or on the weights that the antiexpert also runs on.

A LoRA adapter that shares weights acts on a span of the tokens, so that both models go through the weights in
one forward (engine/runners/lora.py). What is no plain LoRA (DoRA, a retrained head) is switched by PEFT per
forward instead. A soft prompt leaves the weights alone: it is a table of embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxytune.engine.attention import Discovery, Forward
from proxytune.engine.kernels import dense, show_weights
from proxytune.engine.runners import SharedLora
from proxytune.engine.runners import lora as span_lora
from proxytune.errors import UserError
from proxytune.models.adapter_files import (
    BAD_ADAPTER,
    PREFIX,
    AdapterFiles,
    check_fit,
    embeddings_of,
    quiet,
    refuse_to_share,
    rows_in,
    rows_of,
    skeleton_of,
)
from proxytune.models.in_force import probe_text, require_effect
from proxytune.models.memory import own_parts
from proxytune.models.support import plain_logits

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
    layers: dict[str, span_lora.SpanLora] = field(default_factory=dict)

    def attach(self, module: PreTrainedModel, files: AdapterFiles, name: str, *, packed: bool) -> Attached:
        """Put an adapter on the module under `name`. `packed`: the module runs through our attention, where
        models can share a forward. UserError if it cannot sit there beside those who do."""
        refuse_to_share(files, module)
        skeleton = check_fit(files, skeleton_of(files, type(module), module.config))
        if files.soft_prompt:
            virtual = _soft_prompt(module, files)
            return Attached(virtual.nbytes, virtual)
        weights = _without_tables(module, files, skeleton)
        pairs = _plain_lora(module, weights, skeleton) if packed and self.peft is None else None
        if pairs is not None and self._place(module, name, pairs):
            return Attached(sum(down.nbytes + up.nbytes for down, up, _ in pairs.values()))
        if self.layers:
            raise UserError(
                f"adapter '{files.location}' is no plain LoRA and cannot stand beside the others on these "
                "weights: give its expert its own `model`"
            )
        before = bytes_of(module)
        show_weights(module)
        self.peft = _by_peft(module, files, name, self.peft, weights)
        self.peft.base_model.disable_adapter_layers()
        return Attached(bytes_of(module) - before)

    def _place(self, module: PreTrainedModel, name: str, pairs: Pairs) -> bool:
        """Put LoRA weights into the module's layers; False, and nothing is left behind, where one of the
        layers does not see all tokens in a row (experts of a mixture)."""
        for path, (down, up, scale) in pairs.items():
            if path not in self.layers:
                parent, _, child = path.rpartition(".")
                owner = module.get_submodule(parent)
                self.layers[path] = span_lora.SpanLora(getattr(owner, child), self.lora)
                setattr(owner, child, self.layers[path])
            self.layers[path].add(name, down, up, scale)
        try:
            with torch.inference_mode():
                ids = torch.zeros(1, 5, dtype=torch.long, device=module.get_input_embeddings().weight.device)
                self.lora.place({name: slice(2, 5)}, 5)
                module(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, packed=Discovery())
        except span_lora.SpanMismatch:
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
    """A forward with one adapter in force: between such forwards none is, so that whoever else runs on the
    weights feels nothing of it."""

    forward: Forward
    peft: Any
    adapter: str

    def __call__(self, **arguments: Any) -> Any:
        """The forward under this role's adapter."""
        tuner = self.peft.base_model
        tuner.set_adapter(self.adapter)
        tuner.enable_adapter_layers()
        try:
            return self.forward(**arguments)
        finally:
            tuner.disable_adapter_layers()


def attach_for_good(
    module: PreTrainedModel, files: AdapterFiles, *, merge: bool
) -> tuple[PreTrainedModel, Tensor | None]:
    """A model of its own with its adapter; and the soft prompt if it is one. With `merge`, the adapter goes
    into the weights where that is exact; elsewhere, and without, it stays beside them. UserError if it
    changes nothing."""
    skeleton = skeleton_of(files, type(module), module.config)
    check_fit(files, skeleton)
    if files.soft_prompt:
        return module, _soft_prompt(module, files)
    ids = probe_text(module, files)
    before = plain_logits(module, ids)
    _resize(module, files)
    peft = _by_peft(module, files, "default", None, files.tensors())
    _one_configuration(module)
    after = plain_logits(module, ids)
    require_effect(files, before, after)
    if merge:
        module = _merged(module, peft)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module, None


def _merged(module: PreTrainedModel, peft: Any) -> PreTrainedModel:
    """The module with the adapter in its weights, but for layers where that would reach further than the
    adapter: a tensor that another module uses too (a tied head, a layer that is there twice). These keep it
    beside their weights, as PEFT's own forward has it."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    shared = _shared_places(module)
    beside = {path for path, layer in layers.items() if _place_of(path, shared) or _adds_a_bias(layer)}
    rows = {path: layers[path] for path in beside if isinstance(layers[path], TrainableTokensLayer)}
    if len(rows) == len(shared) and len({id(layer.token_indices) for layer in rows.values()}) == 1:
        beside -= set(rows)  # tied tables that get the same rows: once or twice is the same
    with quiet():
        if not beside:
            merged: PreTrainedModel = peft.merge_and_unload()
            return merged
        for path, layer in layers.items():
            if path not in beside:
                layer.merge()
    return module


def _shared_places(module: nn.Module) -> set[str]:
    """Paths of modules, of the outermost of PEFT's where there are some, that use a tensor which a module at
    another path uses too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    places: dict[str, str] = {}
    users: defaultdict[int, set[str]] = defaultdict(set)
    for path, part in module.named_modules(remove_duplicate=False):
        place = places.get(path.rpartition(".")[0])
        if place is None and isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            place = path
        if place is not None:
            places[path] = place
        for parameter in part.parameters(recurse=False):
            if parameter.data_ptr():
                users[parameter.data_ptr()].add(place or path)
    return {place for found in users.values() if len(found) > 1 for place in found}


def _place_of(path: str, places: set[str]) -> bool:
    """Whether a path is one of these places or lies in it."""
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _adds_a_bias(layer: Any) -> bool:
    """Whether a LoRA has a bias (lora_bias) and the layer below it has none that could take it up."""
    own = getattr(layer, "lora_bias", None) or {}
    return any(own.values()) and getattr(layer.get_base_layer(), "bias", None) is None


def _one_configuration(module: PreTrainedModel) -> None:
    """Give repeated layers the model's configuration in place of copies, which would not hear of the
    attention that is chosen later."""
    text = module.config.get_text_config()
    for part in module.modules():
        if type(getattr(part, "config", None)) is type(text):
            part.config = text


def _resize(module: PreTrainedModel, files: AdapterFiles) -> None:
    """Make the embeddings and the head as large as the adapter's are, which brings their rows."""
    rows = rows_of(files, module)
    if rows is not None and rows != rows_in(module):
        module.resize_token_embeddings(rows, mean_resizing=False)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers in this process, shared ones once."""
    parameters = [tensor for _, tensor in own_parts(module)]
    unique = {t.data_ptr(): t.nbytes for t in (*parameters, *module.buffers())}
    return sum(unique.values())


def _by_peft(
    module: nn.Module, files: AdapterFiles, name: str, peft: Any | None, weights: dict[str, Tensor]
) -> Any:
    """PEFT's model around the module, with one adapter more."""
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    files.config.inference_mode = True
    try:
        with quiet():
            if peft is None:
                peft = PeftModel(module, files.config, adapter_name=name)
            else:
                peft.add_adapter(name, files.config)
            set_peft_model_state_dict(peft, weights, adapter_name=name)
    except BAD_ADAPTER as error:
        raise files.broken(error) from None
    return peft.eval()


def _without_tables(module: PreTrainedModel, files: AdapterFiles, skeleton: Any) -> dict[str, Tensor]:
    """The weights of an adapter without the model's own embeddings, which PEFT saves beside them where they
    are trained or a token was added. UserError if these are not what the antiexpert has."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    weights = files.tensors()
    for path in embeddings_of(module):
        own = _below(module.get_submodule(path))
        trained = isinstance(skeleton.get_base_model().get_submodule(path), AuxiliaryTrainingWrapper)
        inner = ["base_layer.weight", "original_module.weight", "token_adapter.base_layer.weight"]
        for table in inner if trained else [*inner, "weight"]:
            found = weights.pop(f"{PREFIX}{path}.{table}", None)
            if found is not None and not torch.equal(found.to(dense(own)), dense(own)):
                raise UserError(
                    f"adapter '{files.location}' has other embeddings ({path}) than the antiexpert: give the "
                    "expert its own `model`"
                )
    return weights


def _below(layer: Any) -> Any:
    """The model's own layer below what PEFT has put around it."""
    while (
        inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)
    ) is not None:
        layer = inner
    return layer


def _soft_prompt(module: PreTrainedModel, files: AdapterFiles) -> Tensor:
    """The embeddings [n, d] of a soft prompt, as the module's own are kept; the module itself is left
    alone."""
    prompt: Tensor = _by_peft(module, files, "default", None, files.tensors()).get_prompt(batch_size=1)
    return prompt[0].detach().to(module.get_input_embeddings().weight)


def _plain_lora(module: PreTrainedModel, weights: Mapping[str, Tensor], skeleton: Any) -> Pairs | None:
    """The weights of a LoRA adapter by the layers of PEFT's skeleton, which says what the configuration
    means; None if it is more than plain LoRA on linear layers."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    unused, pairs = dict(weights), Pairs()
    for path, layer in skeleton.get_base_model().named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            return None
        if not isinstance(layer, BaseTunerLayer):
            continue
        plain = type(layer) is Linear and not layer.lora_variant and not layer.lora_bias.get("default")
        keys = [f"{PREFIX}{path}.lora_{side}.weight" for side in "AB"]
        if not plain or not all(key in unused for key in keys):
            return None
        weights_in = module.get_submodule(path).parameters()
        where = next((parameter.device for parameter in weights_in), torch.device("cpu"))  # none: packed
        down, up = (unused.pop(key).to(where, module.dtype) for key in keys)
        pairs[path] = down, up, float(layer.scaling["default"])
    return None if unused else pairs
