"""Models as transformers has them, without what makes decoding fast: to be trained, or merged with their
adapter and written out as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.models.adapter_files import check_adapter, quiet, read_adapter
from proxytune.models.adapters import attach_for_good
from proxytune.models.checkpoint import check_checkpoint, load_config, locate
from proxytune.models.loading import load_module, load_tokenizer
from proxytune.models.memory import skeleton_of, weights_of
from proxytune.models.vocabulary import align, size_of

__all__ = ["check", "load", "load_tokenizer", "merge", "name_of", "quiet", "require_one_vocabulary"]


def check(spec: ModelSpec, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, float]:
    """The model of a spec without weights, and the bytes that its weights will take. UserError for a
    checkpoint that its small files show to be unfit."""
    remote = spec.trust_remote_code or trust_remote_code
    check_checkpoint(spec, trust_remote_code=remote)
    config = load_config(spec, trust_remote_code=remote)
    skeleton = skeleton_of(config, remote)
    return skeleton, weights_of(spec, config, skeleton)


def load(spec: ModelSpec, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module of a spec as transformers loads it, frozen, in evaluation mode."""
    return load_module(spec, trust_remote_code=trust_remote_code)


def name_of(spec: ModelSpec) -> str:
    """Where the model of a spec is: its folder, or its id on the hub."""
    assert spec.model is not None
    return locate(spec.model).location


def require_one_vocabulary(base: ModelSpec, small: ModelSpec) -> int:
    """How many tokens two models have in common, if they are the same ones; UserError that names the first
    that differ."""
    heads = [int(load_config(spec).get_text_config().vocab_size) for spec in (base, small)]
    first, second = load_tokenizer(base), load_tokenizer(small)
    size = size_of(first, heads[0])
    align(first, size, second, heads[1], "expert", "strict")
    return size


def merge(spec: ModelSpec, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write the model of a spec with its adapter in its weights into the folder `out`, as an ordinary
    checkpoint. UserError for a soft prompt, which is no change of weights, and for an adapter that cannot go
    into them without reaching further than it does."""
    assert spec.adapter is not None
    if spec.quantization != "none":
        raise UserError("an adapter is merged into unquantised weights: leave out `quantization`")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty: choose another folder")
    remote = spec.trust_remote_code or trust_remote_code
    files = read_adapter(spec.adapter)
    if files.soft_prompt:
        raise UserError(
            f"adapter '{spec.adapter}' is a soft prompt: it changes no weights, so there is nothing to "
            "merge. Use it as `expert: {adapter: DIR}`"
        )
    check_adapter(spec.adapter, load_config(spec, trust_remote_code=remote), shared=False, remote=remote)
    module, _ = attach_for_good(load_module(spec, trust_remote_code=remote), files, merge=True)
    if left := _adapter_layers(module):
        raise UserError(
            f"adapter '{spec.adapter}' cannot be merged: '{left[0]}' uses a tensor that another "
            "layer uses too"
        )
    out.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(out)
    load_tokenizer(spec, trust_remote_code=trust_remote_code).save_pretrained(out)


def _adapter_layers(module: Any) -> list[str]:
    """Layers that still carry an adapter beside their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [path for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
