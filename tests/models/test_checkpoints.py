"""Checkpoints are checked before weights are read: every damage is one line, at once, and costs no memory."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from proxytune.config import ModelSpec, System
from proxytune.decoding.decoder import Decoder
from proxytune.errors import UserError
from proxytune.models.checkpoint import check_weights, load_config, locate, resolve
from proxytune.models.facts import kv_per_token, model_facts
from proxytune.models.roles import Models
from proxytune.models.support import examine
from tests.support import gguf_files, tiny
from tests.support.decoders import tokens
from tests.support.require import require_or_skip

Damage = Callable[[Path], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("sound") / "model", tiny.build("llama", 1))


def refusal(folder: Path) -> str:
    """The line with which a folder is refused. No weight may be read on the way."""
    spec = ModelSpec(model=str(folder), dtype="float64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.models.loading.AutoModelForCausalLM", None)
        with pytest.raises(UserError) as caught:
            Decoder(Models(System(base=spec)), "base")
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 and folder.name in line
    return line


def field(name: str, value: Any, file: str = "config.json") -> Damage:
    """Set one field of a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, name: value}))

    return damage


def whole(file: str, content: str | bytes) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def index(content: Any) -> Damage:
    """Shards in the place of one file of weights."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def header(change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of the weights' file."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return damage


def gone(*files: str) -> Damage:
    """Without these files."""

    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "tiny.gguf")


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def linked(folder: Path) -> None:
    """A shard that is a link to a sound file elsewhere."""
    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(elsewhere)
    (folder / "shard.safetensors").symlink_to(elsewhere)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))


def named_index(folder: Path) -> None:
    """An index by a name of the configuration's own, beside sound weights."""
    name = "other.safetensors.index.json"
    (folder / name).write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    field("transformers_weights", name)(folder)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "vocab_size 0": (field("vocab_size", 0), r"vocab_size in config.json is 0, and must be 1 or more"),
    "a million layers": (field("num_hidden_layers", 10**6), r"layers .* 1000000, and must be 0 to 1024"),
    "a billion layers": (field("num_hidden_layers", 10**9), r"num_hidden_layers .* must be 0 to 1024"),
    "layers deep inside": (field("text_config", {"n_layer": 10**9}), r"n_layer .* must be 0 to 1024"),
    "a million experts": (field("num_local_experts", 10**6), r"num_local_experts .* must be 0 to 8192"),
    "no heads": (field("num_attention_heads", 0), "cannot load the model"),
    "negative window": (field("max_position_embeddings", -1), r"max_position_embeddings .* 0 or more"),
    "layers in words": (field("num_hidden_layers", "two"), "num_hidden_layers"),
    "unknown activation": (field("hidden_act", "x"), "KeyError: 'x'"),
    "dtype is a number": (field("dtype", 7), "dtype in config.json is 7, and torch has no such dtype"),
    "dtype is a word": (field("dtype", "x"), "has no attribute 'x'"),
    "quantisation is a word": (field("quantization_config", "x"), "quantization_config|to_dict"),
    "far too wide": (field("intermediate_size", 10**9), r"files hold [\d,]+ numbers, and config"),
    "only a type": (whole("config.json", '{"model_type": "llama"}'), "config.json describes a model of"),
    "an empty object": (whole("config.json", "{}"), "model_type"),
    "a list": (whole("config.json", "[]"), r"config.json must hold an object, not \[\]"),
    "an empty config": (whole("config.json", ""), "config.json is not a valid JSON file"),
    "no text": (whole("config.json", b"\xff\xfe"), "config.json is not a valid JSON file"),
    "deeply nested": (whole("config.json", "[" * 100_000), "config.json is not a valid JSON file"),
    "generation null": (whole("generation_config.json", "null"), "must hold an object"),
    "no config": (gone("config.json"), "no config.json: is it a checkpoint's folder?"),
    "an adapter": (an_adapter, "it is an adapter: write `adapter: "),
    "cut": (header(lambda data: data[:-100]), "model.safetensors is damaged or cut"),
    "cut in the header": (header(lambda data: data[:50]), "model.safetensors is damaged or cut"),
    "a header longer than the file": (header(lambda data: struct.pack("<Q", 2**62) + data[8:]), "damaged"),
    "empty weights": (header(lambda data: b""), "damaged or cut .it is empty"),
    "shards absent": (index({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}), "2 of the 2"),
    "shards above": (index({"weight_map": {"a": "../../etc/passwd"}}), "'../../etc/passwd', which lies"),
    "shards at a root": (index({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd', which lies"),
    "shards below": (index({"weight_map": {"a": "x/y.safetensors"}}), "'x/y.safetensors', which lies"),
    "shards of nothing": (index({"weight_map": {"a": ""}}), "1 of the 1 files"),
    "a shard with a zero": (index({"weight_map": {"a": "x\0y"}}), "1 of the 1 files"),
    "linked shards": (linked, "'shard.safetensors', which lies outside its folder"),
    "weights named above": (
        field("transformers_weights", "../x.safetensors"), "config.json names '../x.safetensors', which lies"
    ),
    "weights named as a number": (field("transformers_weights", 5), "must be the name of a file"),
    "weights named as an index": (named_index, "other.safetensors.index.json names '/etc/passwd'"),
    "shards without a map": (index({}), "has no weight_map"),
    "shards are numbers": (index({"weight_map": {"a": 5}}), "has no weight_map"),
    "an index that is no object": (index([1]), "must hold an object"),
    "pickled": (pickled, r"only pickled weights \(pytorch_model.bin\).*Convert.*save_pretrained"),
    "only gguf": (only_gguf, r"only GGUF files: name one, `model: .*tiny.gguf`"),
    "no weights": (gone(WEIGHTS), "no file named model.safetensors in its folder"),
    "no tokenizer": (gone("tokenizer.json", "tokenizer_config.json"), "cannot load the tokenizer"),
    "tokenizer of another kind": (field("model", 5, "tokenizer.json"), "cannot load the tokenizer"),
    "tokenizer is a list": (whole("tokenizer.json", "[]"), "cannot load the tokenizer"),
    "tokenizer class is a number": (field("tokenizer_class", 7, "tokenizer_config.json"), "cannot load"),
    "eos is an object": (field("eos_token", {"a": 1}, "tokenizer_config.json"), "cannot load the tokenizer"),
    "tokenizer config is null": (whole("tokenizer_config.json", "null"), "must hold an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_one_line_before_weights_are_read(case: str, sound: Path, tmp_path: Path) -> None:
    damage, says = DAMAGES[case]
    folder = tmp_path / "bad"
    shutil.copytree(sound, folder)
    damage(folder)
    line = refusal(folder)
    assert re.search(says, line), line


def in_hub_cache(root: Path, sound: Path) -> Path:
    """A snapshot as the hub's cache has it: links to the files of its repository."""
    home = root / "hub" / "models--some--model"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123")
    for file in sound.iterdir():
        name = "shard.safetensors" if file.name == WEIGHTS else file.name
        shutil.copy(file, home / "blobs" / name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    with safe_open(snapshot / "shard.safetensors", "pt") as weights:
        content = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), "shard.safetensors")}
    (snapshot / INDEX).write_text(json.dumps(content))
    return snapshot


def test_a_snapshot_in_the_cache_of_the_hub_may_link_to_its_repository(sound: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(tmp_path, sound)
    spec = ModelSpec(model=str(snapshot), dtype="float64")
    plain = ModelSpec(model=str(sound), dtype="float64")
    found, want = (tokens(Decoder(Models(System(base=one)), "base")) for one in (spec, plain))
    assert found == want


def test_an_index_of_the_hub_cannot_point_out_of_its_repository(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(tmp_path, sound)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = ModelSpec(model="some/model")
    check_weights(spec, load_config(ModelSpec(model=str(snapshot))))
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "../../../../../etc/passwd"}}))
    with pytest.raises(UserError, match="which lies outside its folder"):
        check_weights(spec, load_config(ModelSpec(model=str(snapshot))))


@pytest.mark.parametrize(
    "template, says",
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[9].content.x }}", "has no element 9"),
        ("{{ 1 // 0 }}", "division"),
        ("", "needs a chat template"),
    ],
)
def test_a_broken_template_is_found_before_weights_are_read(template: str, says: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "bad", tiny.build("llama", 1), tiny.tokenizer(template or None))
    spec = ModelSpec(model=str(folder), dtype="float64", chat="tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.models.loading.AutoModelForCausalLM", None)
        with pytest.raises(UserError, match=says) as caught:
            Decoder(Models(System(base=spec)), "base")
    assert "the base" in str(caught.value) and "\n" not in str(caught.value)
    plain = spec.model_copy(update={"chat": "none"})
    Decoder(Models(System(base=plain)), "base")  # nobody asks for the template


def test_vocabularies_are_compared_before_weights_are_read(tmp_path: Path) -> None:
    system = tiny.trio_of(tmp_path, expert=tiny.tokenizer(swapped=("a", "b")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.models.loading.AutoModelForCausalLM", None)
        with pytest.raises(UserError, match=r"base and the expert differ at 2 of 259 ids"):
            Decoder(Models(system), "proxy")


@pytest.mark.parametrize("family", [*tiny.PACKED, *tiny.REFERENCE])
def test_facts_without_weights_are_those_of_the_loaded_model(family: str) -> None:
    """The path by a small copy, and the KV of a token by the configuration."""
    spec = ModelSpec(model="unused", dtype="float64")
    module = tiny.build(family)
    facts, loaded = model_facts(spec, module.config, None, False), examine(module)  # type: ignore[arg-type]
    assert (facts.path, facts.reason, facts.window) == (
        loaded.path,
        loaded.reason,
        loaded.window % (1 << 20) or None,
    )
    assert (
        facts.parameters == sum(p.numel() for p in module.parameters())
        and facts.weights == 8 * facts.parameters
    )
    if loaded.path == "reference":
        assert facts.kv_per_token is None
    elif family not in (
        "gpt-neox",
        "gpt2",
        "opt",
    ):  # the miniatures name KV heads that these families have not
        assert facts.kv_per_token == sum(layer.numbers for layer in loaded.layers) * 8
        assert facts.kv_per_token == kv_per_token(spec, module.config)


def test_a_model_too_wide_for_a_copy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.models.small_copy.MOST_NUMBERS", 1000)
    facts = model_facts(ModelSpec(model="unused"), tiny.build("llama").config, None, False)
    assert facts.path == "unknown" and "its small copy would still have" in facts.reason


# GGUF


def test_a_gguf_file_decodes_as_the_checkpoint_it_was_made_from(tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        require_or_skip("gguf", "gguf is not installed: pip install 'proxytune[gguf]'")
    model = tiny.build("llama", 1).float()
    folder = tiny.save(tmp_path / "model", model)
    file = gguf_files.write(tmp_path / "packed" / "tiny.gguf", model)
    want = Decoder(Models(System(base=ModelSpec(model=str(folder), dtype="float32"))), "base")
    shutil.copy(folder / "tokenizer.json", file.parent)  # it is exact, the one in the file is rebuilt
    shutil.copy(folder / "tokenizer_config.json", file.parent)
    spec = ModelSpec(model=str(file), dtype="float32")
    got = Decoder(Models(System(base=spec)), "base")
    assert got.loaded["base"].family.path == "packed" and tokens(got) == tokens(want)
    assert got.loaded["base"].module.get_input_embeddings().weight.dtype == torch.float32
    with pytest.raises(UserError, match="needs a checkpoint in safetensors"):
        Models(System(base=spec.model_copy(update={"quantization": "int8"}))).get("base")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot load the model .*take the safetensors checkpoint"):
        load_config(spec)


def test_what_cannot_be_read_as_gguf_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(UserError, match="no model file"):
        locate(str(file))
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match="does not begin as a GGUF file does"):
        locate(str(file))
    part = tmp_path / "tiny-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="llama-gguf-split --merge"):
        locate(str(part))
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package 'gguf'. Install: pip install 'proxytune\[gguf\]'"
    ):
        locate(str(file))
    assert resolve(str(file)) == str(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model folder .*it is a file"):
        resolve(str(tmp_path / "weights.bin"))
