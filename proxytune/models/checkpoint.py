"""What lies in a checkpoint's folder, looked at before any weight is read.

transformers finds most damage late: after minutes of loading, in a traceback, or never, where it makes a
missing value up. Here every damage that the small files and the headers show is one line, at once."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from proxytune import hub
from proxytune.config import DEMO_SCHEME, ModelSpec
from proxytune.errors import UserError, needs_extra
from proxytune.models.adapter_files import BAD_CHECKPOINT, first_line
from proxytune.models.memory import placed_by_us, skeleton_of, weights_needed, weights_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "*.bin", "*.pt", "*.pth"
GGUF = ".gguf"
GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
MOST_LAYERS, MOST_EXPERTS = 1024, 8192
"""No model has more (Llama 3 405B: 126 layers; Switch: 2048 experts), and building more takes minutes."""
_LAYERS = re.compile(r"(^|_)(n|num)_(\w+_)?layers?$|^(encoder|decoder)_layers$")
_EXPERTS = re.compile(r"^(n|num)_(\w+_)?experts?$")
_COUNTS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1),
    "max_position_embeddings": 0,  # 0 stands for no limit
}
"""Fields of a configuration that are numbers of things, and the least of each. Families without one lack it,
or it is None."""


@dataclass(frozen=True)
class CheckpointSource:
    """Where transformers finds a checkpoint."""

    location: str
    """A folder, or a hub id."""
    gguf: str | None = None
    """The file in it that holds everything, if it is one of llama.cpp's."""

    @property
    def folder(self) -> Path | None:
        """The folder, where there is one on this machine."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def tokenizer_gguf(self) -> str | None:
        """The GGUF file if the tokenizer has to be rebuilt from it: one whose files lie beside it is exact,
        and a rebuilt one may split text otherwise."""
        files = "tokenizer.json", "tokenizer_config.json"
        beside = self.folder is not None and all((self.folder / name).is_file() for name in files)
        return None if beside else self.gguf


def resolve(location: str) -> str:
    """demo://NAME -> the folder that ships with proxytune; FOLDER/NAME.gguf -> its folder. UserError for a
    local folder or file that is missing, and for a hub id that is not on disk while the hub cannot be
    reached."""
    if location.startswith(DEMO_SCHEME):
        folder = Path(__file__).parent.parent / "demo" / "weights" / location.removeprefix(DEMO_SCHEME)
        if not folder.is_dir():
            raise UserError(f"no demo model '{location}' at {folder}. Make the demo models: make demo-models")
        return str(folder)
    path = Path(location).expanduser()
    if path.suffix.lower() == GGUF:
        if not path.is_file():
            raise UserError(f"no model file '{location}'")
        return str(path.parent)
    looks_local = location.startswith(("/", "./", "../", "~")) or location.count("/") > 1
    if looks_local and not path.is_dir():
        what = "is a file" if path.is_file() else "is not there"
        raise UserError(f"no model folder '{location}': it {what}")
    if looks_local:
        return str(path)
    if not Path(location).is_dir():
        hub.require(location)
    return location


def locate(model: str) -> CheckpointSource:
    """Where a spec's `model` is. UserError if it is not there, or is a GGUF file that cannot be read."""
    location = resolve(model)
    if Path(model).suffix.lower() != GGUF:
        return CheckpointSource(location)
    name = Path(model).name
    if GGUF_PART.search(name):
        raise UserError(f"'{model}' is one of several parts: join them with llama-gguf-split --merge")
    with (Path(location) / name).open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"cannot load the model '{model}': it does not begin as a GGUF file does")
    needs_extra(f"'{model}', a GGUF file,", "gguf", "gguf")
    return CheckpointSource(location, name)


def _gguf_config(path: Path) -> Any:
    """The configuration that a GGUF file holds. transformers reads the file's whole vocabulary for it, which
    takes seconds, so it is kept while the file is the same."""
    stat = path.stat()
    return copy.deepcopy(_read_gguf_config(path, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _read_gguf_config(path: Path, changed: int, size: int) -> Any:
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a parser of binary data: as in `reading`
        raise ValueError(
            f"{first_line(error)}. If transformers cannot read it, take the safetensors checkpoint that the "
            "file was made from"
        ) from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever transformers raises for files that it cannot make sense of, as one line. Around what only
    parses: an exception of ours would be hidden."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        plain = isinstance(error, BAD_CHECKPOINT) or type(error) is Exception  # tokenizers' own are bare
        kind = "" if plain else f"{type(error).__name__}: "
        raise UserError(f"cannot load {what}: {kind}{first_line(error)}") from error


def check_checkpoint(
    spec: ModelSpec, *, trust_remote_code: bool, may_lack_weights: bool = False
) -> float | None:
    """UserError for a checkpoint that its small files and headers show to be unfit. Returns the bytes of its
    weights; None where they say nothing of the memory that is free to us."""
    assert spec.model is not None
    config = load_config(spec, trust_remote_code=trust_remote_code)
    with reading(f"the model '{spec.model}'"):
        skeleton = skeleton_of(config, trust_remote_code)
    source = locate(spec.model)
    if not may_lack_weights or _has_weights(source):
        promised = sum(parameter.numel() for parameter in skeleton.parameters())
        check_weights(spec, config, promised)
    return weights_of(spec, config, skeleton) if placed_by_us(spec, config) else None


def bytes_needed(spec: ModelSpec) -> float:
    """What the weights of a model take in memory, by its configuration."""
    return weights_needed(spec, load_config(spec), spec.trust_remote_code)


def load_config(spec: ModelSpec, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration. UserError if there is none, or none that can be meant."""
    assert spec.model is not None
    source = locate(spec.model)
    _check_config_files(source, spec.model)
    with reading(f"the model '{spec.model}'"):
        if source.folder is None:  # of the hub: only transformers knows where its files are
            content, _ = PreTrainedConfig.get_config_dict(source.location, revision=spec.revision)
            _check_sizes(content, spec.model)
        if source.gguf is not None:
            config = _gguf_config(Path(source.location) / source.gguf)
        else:
            config = AutoConfig.from_pretrained(
                source.location,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code or trust_remote_code,
            )
    _check_config(config, spec.model)
    return config


def _check_config_files(source: CheckpointSource, model: str) -> None:
    """UserError for a folder without a configuration, and for small files that are no JSON objects."""
    folder = source.folder
    if folder is None or source.gguf is not None:
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"cannot load the model '{model}': {_why_no_config(folder, model)}")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", INDEX):
        if (folder / name).exists():
            _object(folder / name, model)
    _check_sizes(_object(folder / "config.json", model), model)


def _why_no_config(folder: Path, model: str) -> str:
    """What the folder is instead, and what to name."""
    if (folder / "adapter_config.json").is_file():
        return f"it is an adapter: write `adapter: {model}` (on the antiexpert, or beside its `model`)"
    files = sorted(folder.glob(f"*{GGUF}"))
    if files:
        return f"it holds GGUF files: name one, `model: {folder / files[0].name}`"
    return "it has no config.json: is it a checkpoint's folder?"


def _object(path: Path, model: str) -> Mapping[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot load the model '{model}': {path.name} is not a valid JSON file ({first_line(error)})"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"cannot load the model '{model}': {path.name} must hold an object, not {content!r:.40}"
        )
    return content


def _check_sizes(content: Mapping[str, Any], model: str) -> None:
    """UserError for more layers or experts than can be meant, before transformers makes lists of them."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            _check_sizes(value, model)
        if not isinstance(value, int | float):
            continue
        most = MOST_LAYERS if _LAYERS.search(key) else MOST_EXPERTS if _EXPERTS.search(key) else None
        if most is not None and not 0 <= value <= most:
            raise _field(model, key, value, f"must be 0 to {most}")


def _check_config(config: Any, model: str) -> None:
    """UserError for a configuration whose fields cannot be meant."""
    text = config.get_text_config()
    for key, least in _COUNTS.items():
        value = getattr(text, key, None)
        if isinstance(value, int | float) and (value < least or isinstance(value, bool)):
            raise _field(model, key, value, f"must be {least} or more")
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype | Mapping):
        raise _field(model, "dtype", dtype, "torch has no such dtype")
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not isinstance(stored, Mapping) and not hasattr(stored, "to_dict"):
        raise _field(model, "quantization_config", stored, "must be an object")


def _field(model: str, key: str, value: object, why: str) -> UserError:
    """The error for one field of config.json."""
    return UserError(f"cannot load the model '{model}': {key} in config.json is {value!r:.60}, and {why}")


def check_weights(spec: ModelSpec, config: Any, promised: int = 0) -> None:
    """UserError for weights that are absent, pickled, cut, damaged or outside their folder, or far fewer than
    the configuration promises (in numbers). Reads headers only; of the hub, which files are named."""
    assert spec.model is not None
    source, model = locate(spec.model), spec.model
    folder, named = source.folder, getattr(config, "transformers_weights", None)
    if source.gguf is not None:
        return
    if named is not None and not isinstance(named, str):
        raise _field(model, "transformers_weights", named, "must be the name of a file")
    if folder is None:
        _check_hub_shards(spec, named)
        return
    found = sum(_numbers(path, model) for path in _weight_files(folder, named, model))
    if getattr(config, "quantization_config", None) is None and 2 * found < promised:
        raise UserError(
            f"cannot load the model '{model}': its files hold {found:,} numbers, and config.json describes a "
            f"model of {promised:,}"
        )


def _has_weights(source: CheckpointSource) -> bool:
    """Whether files of weights lie in the folder, of whatever kind."""
    kinds = "*.safetensors", INDEX, f"*{GGUF}", *PICKLED
    return source.folder is not None and any(path for kind in kinds for path in source.folder.glob(kind))


def _weight_files(folder: Path, named: str | None, model: str) -> list[Path]:
    """The safetensors files that transformers would read: one or the shards of an index, as found, or as the
    configuration names it."""
    name = named or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    if named is not None:
        _require_beside("config.json", name, folder, model)
    if not (folder / name).is_file():
        raise UserError(f"cannot load the model '{model}': {_why_no_weights(folder)}")
    if not name.endswith(".json"):
        return [folder / name]
    names = _shards(folder / name, model)
    for shard in names:
        _require_beside(name, shard, folder, model)
    absent = [shard for shard in names if not (folder / shard).is_file()]
    if absent:
        raise UserError(
            f"cannot load the model '{model}': {len(absent)} of the {len(names)} files that {name} names "
            f"are not there, {absent[0]} first"
        )
    return [folder / shard for shard in names]


def _shards(index: Path, model: str) -> list[str]:
    """The files that an index names."""
    shards = _object(index, model).get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise UserError(
            f"cannot load the model '{model}': {index.name} has no weight_map from names to files"
        )
    return sorted(set(shards.values()))


def _check_hub_shards(spec: ModelSpec, named: str | None) -> None:
    """The same names for a model of the hub, which are joined with the path of the hub's cache."""
    assert spec.model is not None
    with reading(f"the model '{spec.model}'"):
        try:
            index = Path(hf_hub_download(spec.model, named or INDEX, revision=spec.revision))
        except EntryNotFoundError:
            return
    for shard in _shards(index, spec.model) if index.suffix == ".json" else ():
        _require_beside(index.name, shard, None, spec.model)


def _require_beside(by: str, name: str, folder: Path | None, model: str) -> None:
    """UserError unless a file that `by` names lies in the checkpoint's folder, links followed. In the hub's
    cache files are links into the folder of their repository."""
    inside = Path(name).name == name
    if inside and folder is not None and (folder / name).is_file():
        home = folder.resolve()
        if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
            home = home.parent.parent
        inside = (folder / name).resolve().is_relative_to(home)
    if not inside:
        raise UserError(
            f"cannot load the model '{model}': {by} names {name!r:.100}, which lies outside its folder: "
            "copy the file there, if you trust it"
        )


def _why_no_weights(folder: Path) -> str:
    """What there is in place of safetensors, and how to convert it."""
    pickled = sorted(path.name for kind in PICKLED for path in folder.glob(kind))
    if pickled:
        return (
            f"no file named {WEIGHTS}, only pickled weights ({pickled[0]}), which can run code when they are "
            "read. Convert a checkpoint that you trust: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`"
        )
    files = sorted(folder.glob(f"*{GGUF}"))
    return (
        f"no file named {WEIGHTS}, only GGUF files: name one, `model: {folder / files[0].name}`"
        if files
        else f"no file named {WEIGHTS} in its folder"
    )


def _numbers(path: Path, model: str) -> int:
    """How many numbers the tensors of a safetensors file hold, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        cut = "it is empty" if path.stat().st_size == 0 else first_line(error)
        raise UserError(f"cannot load the model '{model}': {path.name} is damaged or cut ({cut})") from None
