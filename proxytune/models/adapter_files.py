"""What lies in an adapter's folder, checked before any weights are read: its configuration, the names and
shapes of its weights, and whether all of them have a place in the model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from proxytune import hub
from proxytune.config import ModelSpec
from proxytune.errors import UserError

BAD_CHECKPOINT = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers and peft raise for a checkpoint that is absent, damaged or needs a missing package."""
BAD_ADAPTER = (*BAD_CHECKPOINT, KeyError, TypeError, AttributeError)
"""What peft raises where an adapter is not made for the model."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How the names in an adapter's file begin; after it, they are the model's."""
SOFT_PROMPTS = {"PROMPT_TUNING", "P_TUNING"}
SOFT_PROMPT = "prompt_embeddings"
"""The one tensor of a soft prompt."""
FROM_A_SEED = {"base_model.vera_A", "base_model.vera_B"}
"""Matrices that older versions of peft make again in place of reading them."""
REWRITES = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin a LoRA that take something away from the weights below it."""
KINDS = {
    "LORA",
    "ADALORA",
    "BOFT",
    "DELORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "RANDLORA",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "VERA",
}
"""Kinds that are known to act token by token in their layers alone, merged or beside the weights: others need
PEFT's own forward, or look at the whole text."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter that is known, and one of the kinds that we run."""

    location: str
    """As the user wrote it."""
    config: Any
    """PEFT's configuration."""
    weights: Path
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor in its file; one that peft wrote twice (a retrained table of more rows) once."""
    zero: bool
    """Whether its B weights are all zero, as LoRA begins."""

    @property
    def soft_prompt(self) -> bool:
        """Whether it is a table of embeddings and leaves the weights alone."""
        return bool(self.config.is_prompt_learning)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that it trains by name: text without them shows nothing of that."""
        found = getattr(self.config, "trainable_token_indices", None) or []
        found = found or getattr(self.config, "token_indices", None) or []
        lists = found.values() if isinstance(found, Mapping) else [found]
        return sorted({int(token) for ids in lists for token in ids})

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, on the CPU."""
        try:
            found = load_file(self.weights)
        except (OSError, SafetensorError) as error:
            raise self.broken(error) from None
        return {key: found[key] for key in self.shapes}

    def broken(self, error: BaseException) -> UserError:
        """What to say where a library cannot load it."""
        return UserError(f"cannot load the adapter '{self.location}': {first_line(error)}")


def first_line(error: BaseException) -> str:
    """An exception's message in one line of readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def adapter_file(location: str, name: str) -> Path | None:
    """A file of an adapter's folder, or of its repository on the hub; None if it has none of that name."""
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if location.startswith(("/", "./", "../", "~")) or location.count("/") != 1:
        raise UserError(f"cannot load the adapter '{location}': there is no such folder")
    hub.require(location)
    try:
        return Path(hf_hub_download(location, name))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the adapter '{location}': {first_line(error)}") from None


def read_adapter(location: str) -> AdapterFiles:
    """The adapter of a folder. UserError in one line if it is none, or none that we run."""
    written = adapter_file(location, CONFIG)
    if written is None:
        raise UserError(f"no {CONFIG} in '{location}': is it a PEFT folder?")
    weights = adapter_file(location, WEIGHTS)
    if weights is None:
        raise UserError(f"no {WEIGHTS} in '{location}': pickled weights are not loaded")
    config = _config(location, written)
    try:
        with safe_open(weights, framework="pt") as file:
            names = set(file.keys())
            keys = [
                key for key in sorted(names) if key.replace(".modules_to_save.", ".") not in names - {key}
            ]
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            lora_b = [key for key in shapes if ".lora_B" in key or ".lora_embedding_B" in key]
            zero = bool(lora_b) and not any(file.get_tensor(key).any() for key in lora_b)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter '{location}': {first_line(error)}") from None
    if zero and not any(
        ".lora_A" not in key and ".lora_embedding_A" not in key for key in set(shapes) - set(lora_b)
    ):
        raise UserError(
            f"adapter '{location}' changes nothing: its B weights are all zero, as before the first step of "
            "training. Give the folder of a later checkpoint"
        )
    return AdapterFiles(location, config, weights, shapes, zero)


def _config(location: str, written: Path) -> Any:
    """The adapter's configuration; UserError if it asks for what we do not run."""
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    version = importlib.metadata.version("peft")
    try:
        content = json.loads(written.read_text(encoding="utf-8"))
        kind = content.get("peft_type") if isinstance(content, dict) else None
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise UserError(
                f"adapter '{location}' is of kind '{kind}', which peft {version} does not know: "
                "pip install -U peft, if a newer one does"
            )
        known = {option.name for option in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        unknown = sorted(
            key for key, value in content.items() if key not in known | {"runtime_config"} and value
        )
        if unknown:
            raise UserError(
                f"adapter '{location}' asks for {', '.join(unknown)}, which peft {version} would ignore: "
                "pip install -U peft"
            )
        config = PeftConfig.from_pretrained(str(written.parent))
    except BAD_ADAPTER as error:
        raise UserError(f"cannot load the adapter '{location}': {first_line(error)}") from None
    _refuse_kind(location, config)
    return config


def _refuse_kind(location: str, config: Any) -> None:
    """UserError for an adapter that acts through PEFT's own forward, which is not ours."""
    kind = config.peft_type.value
    if config.is_prompt_learning:
        if kind not in SOFT_PROMPTS:
            raise UserError(f"adapter '{location}' is {kind}: LoRA and prompt tuning are supported")
        return
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(
            f"adapter '{location}' is an activated LoRA (alora_invocation_tokens), which acts in PEFT's own "
            "forward only, behind its invocation tokens: train it without them"
        )
    if kind not in KINDS:
        raise UserError(
            f"adapter '{location}' is {kind}, which is not run here: LoRA and prompt tuning are supported. "
            "Merge it into its model with peft (merge_and_unload), and give that folder as `model`"
        )


def brings_tokenizer(location: str) -> bool:
    """Whether a tokenizer lies beside an adapter."""
    return adapter_file(location, "tokenizer_config.json") is not None


def own_template(location: str) -> str | None:
    """The chat template beside an adapter, in a file of its own."""
    found = adapter_file(location, "chat_template.jinja")
    try:
        return None if found is None else found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read '{found}': {error.reason} at byte {error.start}") from None


def refuse_to_share(files: AdapterFiles, model: PreTrainedModel) -> None:
    """UserError for an adapter that would change weights below it, which the antiexpert runs on too. `model`
    is the antiexpert, or its skeleton."""
    config = files.config
    why = None
    if getattr(config, "bias", "none") != "none":
        why = f"changes biases (bias: {config.bias}), which the antiexpert shares"
    elif getattr(config, "layer_replication", None):
        why = "repeats layers (layer_replication), which the antiexpert has once"
    elif str(getattr(config, "init_lora_weights", "")).startswith(REWRITES):
        why = f"changes the weights below it (init_lora_weights: {config.init_lora_weights})"
    elif (rows := rows_of(files, model)) is not None and rows != rows_in(model):
        why = f"has embeddings of {rows} tokens, and the antiexpert's are of {rows_in(model)}"
    if why is not None:
        raise UserError(f"adapter '{files.location}' {why}: give the expert its own `model`")


def rows_in(model: PreTrainedModel) -> int:
    """Rows of a model's embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def embeddings_of(model: PreTrainedModel) -> list[str]:
    """Where in a model its embeddings and its head are."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path for path, module in model.named_modules() if any(module is table for table in tables)]


def rows_of(files: AdapterFiles, model: PreTrainedModel) -> int | None:
    """Rows of the embeddings that an adapter's file holds; None if it holds none, of no table."""
    found = None
    for path in embeddings_of(model):
        for key, shape in files.shapes.items():
            inner = key.removeprefix(f"{PREFIX}{path}.")
            if inner != key and inner.endswith("weight") and "lora_" not in inner and len(shape) == 2:
                found = max(found or 0, shape[0])
    return found


def check_adapter(location: str, config: Any, *, shared: bool, remote: bool = False) -> AdapterFiles:
    """The adapter of a folder, checked against the configuration of its model, before either's weights are
    read. `shared`: the antiexpert runs on that model too. UserError in one line."""
    files = read_adapter(location)
    make = partial(AutoModelForCausalLM.from_config, trust_remote_code=remote)
    if shared:
        with torch.device("meta"):
            refuse_to_share(files, make(copy.deepcopy(config)))
    check_fit(files, skeleton_of(files, make, config))
    return files


def skeleton_of(files: AdapterFiles, make: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without weights, with embeddings as large as the adapter's are. UserError if the adapter does
    not bring all rows of them."""
    own = copy.deepcopy(config)  # peft writes the number of replicated layers into it
    with torch.device("meta"):
        skeleton = make(own)
        rows = rows_of(files, skeleton)
        if rows is None or rows == rows_in(skeleton):
            return skeleton
        _require_tables(files, skeleton, rows)
        own.get_text_config().vocab_size = rows
        return make(own)


def _require_tables(files: AdapterFiles, model: PreTrainedModel, rows: int) -> None:
    """UserError unless the embeddings and the head (one of them, where they are one tensor) are in the
    adapter's file with so many rows."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    lacking = [
        path
        for path in embeddings_of(model)
        if not any(
            key.startswith(f"{PREFIX}{path}.") and shape[0] == rows for key, shape in files.shapes.items()
        )
    ]
    if len(lacking) > int(tied):
        raise UserError(
            f"adapter '{files.location}' was trained on {rows} tokens, and the model has {rows_in(model)}; "
            f"its file has no rows for {lacking[0]}: save the adapter with save_embedding_layers=True"
        )


def check_fit(files: AdapterFiles, skeleton: PreTrainedModel, name: str = "default") -> Any:
    """PEFT's model around the skeleton. UserError unless every tensor of the adapter's file has a place of
    its shape in it, and every place gets one."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(files.config)
    if str(getattr(config, "init_lora_weights", "")).startswith(REWRITES):
        config.init_lora_weights = True  # there are no weights to begin from
    ids = files.special_ids
    if ids and ids[-1] >= rows_in(skeleton):
        raise UserError(
            f"adapter '{files.location}' trains token {ids[-1]}, and the model has {rows_in(skeleton)}: save "
            "the adapter with the embeddings that it was trained on (save_embedding_layers=True)"
        )
    _require_width(files, skeleton)
    tables = embeddings_of(skeleton)
    shapes = {key: torch.empty(shape, device="meta") for key, shape in files.shapes.items()}
    try:
        with quiet():
            peft = PeftModel(skeleton, config, adapter_name=name, low_cpu_mem_usage=True)
            wanted = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
            report = set_peft_model_state_dict(peft, shapes, adapter_name=name, low_cpu_mem_usage=True)
    except KeyError as error:
        raise _lacking(files, str(error.args[0])) from None
    except BAD_ADAPTER as error:
        raise files.broken(error) from None
    known = {SOFT_PROMPT} if files.soft_prompt else _twins(files, tables)
    if unused := sorted(set(report.unexpected_keys) - known - FROM_A_SEED):
        raise UserError(
            f"adapter '{files.location}' does not fit the model: {len(unused)} of its {len(files.shapes)} "
            f"weights have no place in it, '{unused[0]}' first. Give the model that it was made for; if "
            "names have the prefix of a wrapper (_orig_mod, module), save it from the model inside"
        )
    missing = sorted(set(wanted) - set(files.shapes))
    if missing and (files.soft_prompt or any(f".{name}" in key for key in report.missing_keys)):
        raise _lacking(files, missing[0])
    return peft


def _require_width(files: AdapterFiles, model: PreTrainedModel) -> None:
    """UserError for a soft prompt of another width than the model's embeddings: PEFT takes the width from the
    adapter's configuration and never looks at the model's."""
    if files.soft_prompt and SOFT_PROMPT in files.shapes:
        own, width = model.get_input_embeddings().weight.shape[1], files.shapes[SOFT_PROMPT][-1]
        if width != own:
            raise UserError(
                f"adapter '{files.location}' does not fit the model: its soft prompt has embeddings of "
                f"{width}, and the model's are of {own}. Give the model that it was made for"
            )


def _twins(files: AdapterFiles, tables: Sequence[str]) -> set[str]:
    """Rows of tokens that peft wrote once for the embeddings and once for the head tied to them, and
    reads once."""
    rows = [f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" for path in tables]
    return set(rows) if all(key in files.shapes for key in rows) else set()


def _lacking(files: AdapterFiles, key: str) -> UserError:
    return UserError(
        f"adapter '{files.location}' lacks weights that its configuration promises, '{key}' first: its file "
        "is damaged, or its layers have other names than the model's"
    )


def quiet() -> warnings.catch_warnings:
    """PEFT warns of missing weights and tied tables; we check these ourselves."""
    return warnings.catch_warnings(action="ignore")


def tokenizer_source(spec: ModelSpec) -> str | None:
    """The adapter's folder, where the tokenizer or its chat template comes from there."""
    if spec.adapter is None:
        return None
    own = brings_tokenizer(spec.adapter) or own_template(spec.adapter) is not None
    return spec.adapter if own else None


def adapter_notes(name: str, spec: ModelSpec, files: AdapterFiles, model: str | None) -> list[str]:
    """What a user should know about an adapter, which the model called `name` has on `model`: whether the
    tokenizer is its own, and whether it was made for a model of another name. Only names on the hub are
    compared: folders move."""
    notes = []
    if tokenizer_source(spec) is not None:
        what = "tokenizer" if brings_tokenizer(files.location) else "chat template"
        what += " and chat template" if what == "tokenizer" and spec.chat == "tokenizer" else ""
        notes.append(f"the {name} uses the {what} that lies beside its adapter '{files.location}'")
    made_for = getattr(files.config, "base_model_name_or_path", None)
    if _is_name(made_for) and _is_name(model) and _last(made_for) != _last(model):
        notes.append(f"the adapter '{files.location}' was made for {made_for}, and sits on {model}")
    return notes


def _last(name: Any) -> str:
    return str(name).rpartition("/")[2].lower()


def _is_name(location: str | None) -> bool:
    """Whether it is a name on the hub: owner/model, and no folder here."""
    if not location or location.count("/") != 1 or location.startswith((".", "/", "~")):
        return False
    return not Path(location).exists()
