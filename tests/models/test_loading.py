"""What transformers is told when a checkpoint is loaded, without loading one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, GgufConfig

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.models import loading
from proxytune.models.checkpoint import CheckpointSource
from proxytune.models.loading import _place, _quantization, _require_all, _split, load_tokenizer
from proxytune.models.support import UNBOUNDED
from proxytune.models.weight_only import WeightOnlyConfig

M = ModelSpec(model="owner/m")
HUB, FILE = CheckpointSource("owner/m"), CheckpointSource("folder", "m.gguf")


def spec(**fields: Any) -> ModelSpec:
    return M.model_copy(update=fields)


def test_how_weights_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "needs_extra", lambda *_: None)
    assert _quantization(M, HUB) is None
    packed = _quantization(M, FILE)
    assert isinstance(packed, GgufConfig) and packed.dequantize
    with pytest.raises(
        UserError, match="'owner/m': the weights of a GGUF file are unpacked, so `quantization: int8`"
    ):
        _quantization(spec(quantization="int8"), FILE)
    eight = _quantization(spec(quantization="int8"), HUB)
    assert isinstance(eight, WeightOnlyConfig) and eight.bits == 8
    monkeypatch.setattr(loading.int4, "why_not", lambda: None)
    assert _quantization(spec(quantization="int4"), HUB).bits == 4
    monkeypatch.setattr(loading.int4, "why_not", lambda: "no kernel")
    with pytest.raises(UserError, match="'owner/m' cannot be loaded with quantization int4: no kernel"):
        _quantization(spec(quantization="int4"), HUB)
    theirs = _quantization(spec(quantization="8bit"), HUB)
    assert isinstance(theirs, BitsAndBytesConfig) and theirs.load_in_8bit and not theirs.load_in_4bit
    for dtype, compute in (("auto", torch.bfloat16), ("float32", torch.float32)):
        four = _quantization(spec(quantization="4bit", dtype=dtype), HUB)
        assert four.load_in_4bit and not four.load_in_8bit and four.bnb_4bit_use_double_quant
        assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", compute)


def test_where_layers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers splits them where the system says `tensor`, over the processes of torchrun."""
    monkeypatch.setattr(loading, "place_of", lambda _: "here")
    joined = list[int]()
    monkeypatch.setattr(loading.processes, "joined", lambda: joined.append(1))
    assert _place(M) == {"": "here"} and _place(spec(device_map="auto")) == "auto"
    tensor = spec(device_map=loading.processes.TENSOR)
    assert _place(tensor) is None and _split(M) is None and _split(spec(device_map="auto")) is None
    monkeypatch.setattr(loading.processes, "world", lambda: 1)
    with pytest.raises(UserError, match="start N processes with torchrun"):
        _split(tensor)
    monkeypatch.setattr(loading.processes, "world", lambda: 3)
    for wrong in ({"adapter": "a"}, {"quantization": "int8"}):
        with pytest.raises(UserError, match="plain weights can be split, and neither an adapter nor"):
            _split(tensor.model_copy(update=wrong))
    assert not joined
    made = _split(tensor)
    assert made is not None and made.tp_size == 3 and joined == [1]


def test_weights_that_are_absent_are_counted() -> None:
    _require_all("m", {"missing_keys": set()})
    with pytest.raises(UserError, match=r"^'m' lacks 2 weights of its architecture, a\.x first$"):
        _require_all("m", {"missing_keys": {"b.y", "a.x"}})


@pytest.mark.parametrize(
    ("fields", "beside", "asked"),
    [
        ({}, False, ("owner/m", None, False)),
        ({"revision": "r", "trust_remote_code": True}, False, ("owner/m", "r", True)),
        ({"revision": "r", "adapter": "there"}, False, ("owner/m", "r", False)),
        ({"revision": "r", "adapter": "there"}, True, ("there", None, False)),
    ],
)
def test_where_a_tokenizer_is_read(
    fields: dict[str, Any], beside: bool, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapter, if one lies there: the model's revision is not the adapter's. Its template counts
    in any case."""
    seen = list[tuple[Any, ...]]()
    words = SimpleNamespace(get_vocab=lambda: {"a": 0}, chat_template="old", model_max_length=5)

    def read(location: str, *, revision: Any, trust_remote_code: bool, gguf_file: Any) -> Any:
        seen.append((location, revision, trust_remote_code))
        assert gguf_file is None
        return words

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr(loading, "brings_tokenizer", lambda _: beside)
    monkeypatch.setattr(loading, "own_template", lambda _: "new")
    monkeypatch.setattr(loading, "locate", lambda model: CheckpointSource(model))
    assert load_tokenizer(spec(**fields)) is words and seen == [asked]
    assert words.model_max_length == UNBOUNDED
    assert words.chat_template == ("new" if "adapter" in fields else "old")
    load_tokenizer(spec(**fields), trust_remote_code=True)
    assert seen[1][2], "allowed for every role"
    words.get_vocab = dict
    with pytest.raises(UserError, match=f"cannot load the tokenizer of '{asked[0]}': it has no tokens"):
        load_tokenizer(spec(**fields))
