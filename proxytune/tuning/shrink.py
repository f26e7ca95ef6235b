"""A small model from a large one whose family has none: the large one with layers left out.

It is to be healed afterwards by learning the large one's distribution: `proxytune tune full --teacher LARGE`.
Both have one vocabulary, so that the small one can be antiexpert and, tuned, expert of the large one (layers:
ShortGPT, Men et al. 2024; healing: Gromov et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.models import plain


def kept_layers(layers: int, keep: int) -> list[int]:
    """`keep` of `layers` layers, evenly spread: the first and the last are among them."""
    if keep == 1:
        return [0]
    return [round(place * (layers - 1) / (keep - 1)) for place in range(keep)]


def without_layers(model: str, keep: int, out: Path) -> int:
    """Write the model with `keep` of its layers into `out`; -> its parameters. UserError if it has fewer, or
    keeps them in no plain list."""
    spec = ModelSpec(model=model)
    skeleton, _ = plain.check(spec)
    layers = int(skeleton.config.get_text_config().num_hidden_layers)
    if not 1 <= keep < layers:
        raise UserError(f"--layers {keep}: '{model}' has {layers}, of which 1 to {layers - 1} can be kept")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"'{out}' is not empty: choose another folder")
    module = plain.load(spec)
    path = _list_of_layers(module, layers, model)
    chosen = kept_layers(layers, keep)
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    stack: Any = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(stack[place] for place in chosen))
    _tell(module.config.get_text_config(), layers, chosen)
    out.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(out)
    plain.load_tokenizer(spec).save_pretrained(out)
    plain.check(ModelSpec(model=str(out)))  # what is written is a whole checkpoint
    return sum(parameter.numel() for parameter in module.parameters())


def _list_of_layers(module: nn.Module, layers: int, model: str) -> str:
    """Where the layers of a model are."""
    found = [path for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(found) != 1:
        raise UserError(f"'{model}' does not keep its {layers} layers in one list: they cannot be left out")
    return str(found[0])


def _tell(config: Any, layers: int, chosen: list[int]) -> None:
    """Write into a configuration which layers there are now."""
    config.num_hidden_layers = len(chosen)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:  # layer_types
            setattr(config, key, [value[place] for place in chosen])
