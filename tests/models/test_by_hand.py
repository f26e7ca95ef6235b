"""What is worked out of a model beside its weights, by hand: bytes, places, windows, layers, ids."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from proxytune.config import ExpertSpec, ModelSpec, System
from proxytune.engine.attention import Discovery
from proxytune.engine.kernels.int4 import fits
from proxytune.engine.runners import VocabMap
from proxytune.errors import UserError
from proxytune.models import adapter_files, checkpoint, memory, roles, support
from proxytune.models.adapter_files import AdapterFiles, first_line, refuse_to_share, rows_of
from proxytune.models.adapters import Adapters, bytes_of
from proxytune.models.facts import kv_per_token
from proxytune.models.in_force import require_effect, require_untouched
from proxytune.models.memory import check_memory, free_memory, place_of, placed_by_us, weights_of
from proxytune.models.roles import Loaded, Models, WeightSource
from proxytune.models.small_copy import _fewer_layers, _narrower
from proxytune.models.support import Trial, Unfit, _check_layers, context_window, difference
from proxytune.models.vocabulary import Difference, align
from proxytune.models.weight_only import bytes_needed
from tests.support import tiny

M = ModelSpec(model="m")


def config(**fields: Any) -> Any:
    """A configuration of text alone."""
    made = SimpleNamespace(dtype=None, **fields)
    made.get_text_config = lambda: made
    return made


# Memory


class Skeleton(nn.Module):
    """110 numbers: 40 embeddings, 24 + 6 of a layer, 40 of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(10, 4), nn.Linear(4, 6)
        self.head = nn.Linear(4, 10, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize(
    ("quantization", "dtype", "stored", "size"),
    [
        ("none", "auto", None, 110 * 4),
        ("none", "auto", torch.bfloat16, 110 * 2),
        ("none", "float64", torch.bfloat16, 110 * 8),
        ("8bit", "auto", torch.bfloat16, 24 + 86 * 2),
        ("4bit", "float32", torch.bfloat16, 12 + 86 * 4),
    ],
)
def test_bytes_of_weights(quantization: str, dtype: str, stored: Any, size: int) -> None:
    """bitsandbytes packs the weights of linear layers; the head, the embeddings and biases stay."""
    made = SimpleNamespace(dtype=stored)
    spec = M.model_copy(update={"quantization": quantization, "dtype": dtype})
    skeleton: Any = Skeleton()
    assert weights_of(spec, made, skeleton) == size


def test_bytes_of_weights_of_our_own_quantisation() -> None:
    """8 bits: a byte a weight and a float32 a row. 4 bits: half a byte, and four bytes for 32 weights; where
    a layer's sizes are multiples of 32 and 16."""
    assert fits(32, 16) and fits(96, 48) and not fits(48, 16) and not fits(32, 24)
    model = tiny.build("llama", hidden_size=64, intermediate_size=72, num_attention_heads=4)
    skeleton: Any = model
    whole = sum(p.numel() for p in model.parameters())
    layers = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")
    ]
    eight = sum(m.weight.numel() + 4 * m.out_features for m in layers)
    linear = sum(m.weight.numel() for m in layers)
    assert bytes_needed(skeleton, 2, 8) == (whole - linear) * 2 + eight
    sized = [m for m in layers if m.in_features % 32 == 0 and m.out_features % 16 == 0]
    assert 0 < len(sized) < len(layers), "the layers of 72 do not fit"
    packed = sum(m.weight.numel() for m in sized)
    assert bytes_needed(skeleton, 4, 4) == (whole - packed) * 4 + packed // 2 + packed // 8
    for quantization, size in (
        ("int8", bytes_needed(skeleton, 2, 8)),
        ("int4", bytes_needed(skeleton, 2, 4)),
    ):
        spec = M.model_copy(update={"quantization": quantization, "dtype": "bfloat16"})
        assert weights_of(spec, model.config, skeleton) == size


@pytest.mark.parametrize(
    ("where", "ours"),
    [
        (None, True),
        ("cpu", True),
        ("auto", True),
        ("cuda", True),
        ("cuda:1", True),
        ("balanced", False),
        ({"": 0}, False),
        ("tensor", False),
    ],
)
def test_whether_an_estimate_counts(where: Any, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user maps the layers, or the weights are stored quantised, it does not."""
    spec = M.model_copy(update={"device_map": where})
    assert placed_by_us(spec, SimpleNamespace()) == ours
    assert not placed_by_us(spec, SimpleNamespace(quantization_config={"bits": 4}))
    assert placed_by_us(spec, SimpleNamespace(quantization_config=None)) == ours
    monkeypatch.setattr(memory, "weights_needed", lambda *_: 3.0 * 2**30)
    for free, fine in ((3 * 2**30, True), (3 * 2**30 - 1, not ours)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        if fine:
            assert check_memory(spec, SimpleNamespace(), False) == 3.0 * 2**30
            continue
        with pytest.raises(UserError, match=r"'m' needs 3\.0 GiB for its weights, and 3\.0 GiB are free"):
            check_memory(spec, SimpleNamespace(), False)


def test_places_and_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(where: Any) -> str:
        return place_of(M.model_copy(update={"device_map": where}))

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert place(None) == "cpu" and free_memory() == free_memory("cuda:1") == free_memory("auto") == 1000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * (index + 1), 99))
    monkeypatch.setattr(memory, "give_back", lambda: None)
    wheres = [None, "cpu", "cuda", "cuda:3", "cuda:x", "auto", {"": "cuda:1"}, "balanced"]
    found = ["cuda:0", "cpu", "cuda:0", "cuda:3", "auto", "auto", "auto", "auto"]
    assert [place(where) for where in wheres] == found
    assert [free_memory(where) for where in (None, "cuda:0", "cuda:1")] == [10, 10, 20]
    assert free_memory("cpu") == 1000 and free_memory("auto") == 1030
    assert free_memory(torch.device("cuda", 1)) == 20
    with pytest.raises(UserError, match="there is no cuda:2 here: `device_map` can be cuda:0 to cuda:1"):
        free_memory("cuda:2")


def test_models_that_go_to_one_place_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is spread over everything makes it a matter of all."""
    places = {"base": "cuda:0", "expert": "cuda:1", "antiexpert": "cuda:1", "tuned": "auto"}
    free = {"cuda:0": 2**30, "cuda:1": 3 * 2**30, "auto": 5 * 2**30}
    models = Models(System(base=M))
    monkeypatch.setattr(Models, "spec", lambda self, name: name)
    monkeypatch.setattr(roles, "place_of", places.__getitem__)
    monkeypatch.setattr(roles, "free_memory", free.__getitem__)
    gib = float(2**30)
    models._check_memory({"base": 9 * gib, "expert": 1 * gib, "antiexpert": 2 * gib})  # one alone: elsewhere
    with pytest.raises(UserError, match=r"of expert 1\.0 \+ antiexpert 2\.5 = 3\.5 GiB .* into the 3\.0 GiB"):
        models._check_memory({"expert": 1 * gib, "antiexpert": 2.5 * gib})
    models._check_memory({"base": 2 * gib, "tuned": 3 * gib})
    with pytest.raises(UserError, match=r"base 2\.0 \+ tuned 3\.5 = 5\.5 GiB .* into the 5\.0 GiB"):
        models._check_memory({"base": 2 * gib, "tuned": 3.5 * gib})


def test_bytes_of_a_module_count_what_is_shared_once() -> None:
    layer = nn.Linear(3, 5)
    both = nn.ModuleList([layer, layer, nn.Linear(2, 2, bias=False)])
    both.register_buffer("steps", torch.zeros(7, dtype=torch.int16))
    assert bytes_of(both) == (15 + 5) * 4 + 4 * 4 + 7 * 2


# Windows and layers

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("fields", "window", "why"),
    [
        ({}, 1 << 20, None),
        ({"max_position_embeddings": None}, 1 << 20, None),
        ({"max_position_embeddings": 64}, 64, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4}}, 64, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn"}}, 64, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic"}}, 64, None),
        ({"max_position_embeddings": 64, "rope_parameters": LONG}, 40, None),
        ({"max_position_embeddings": 30, "rope_parameters": LONG}, 30, None),
        (
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 50,
                "rope_parameters": {"rope_type": "longrope"},
            },
            50,
            None,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear"},
                    "sliding_attention": {**LONG, "original_max_position_embeddings": 32},
                },
            },
            32,
            None,
        ),
        (
            {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "odd"}},
            64,
            "its rotary embedding 'odd' depends on the length of the call",
        ),
    ],
)
def test_context_windows(fields: dict[str, Any], window: int, why: str | None) -> None:
    assert context_window(config(**fields)) == (window, why)


@pytest.mark.parametrize(
    ("fields", "dtype", "size"),
    [
        # layers * KV heads * (key + value) * bytes
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, "auto", 3 * 2 * 16 * 4),
        ({"num_attention_heads": 6, "hidden_size": 48}, "bfloat16", 3 * 6 * 16 * 2),
        ({"num_attention_heads": 6, "num_key_value_heads": None, "hidden_size": 48}, "auto", 3 * 6 * 16 * 4),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 5},
            "float64",
            3 * 2 * 10 * 8,
        ),
        (
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 3,
                "v_head_dim": 5,
            },
            "float16",
            3 * 4 * (8 + 3 + 5) * 2,
        ),
        ({"num_attention_heads": None}, "auto", None),
        ({"num_attention_heads": 4, "num_hidden_layers": None}, "auto", None),
    ],
)
def test_bytes_of_keys_and_values(fields: dict[str, Any], dtype: str, size: int | None) -> None:
    spec = M.model_copy(update={"dtype": dtype})
    assert kv_per_token(spec, config(**{"num_hidden_layers": 3, **fields})) == size


WINDOWS: list[tuple[dict[str, Any], list[int | None], str | None]] = [
    ({"sliding_window": None}, [None, None], None),
    ({"sliding_window": 8}, [8, 8], None),
    ({"sliding_window": 8}, [None, 8], None),  # which layers have it is the family's own
    ({"sliding_window": 8}, [None, None], "its sliding window is only in the mask"),
    ({"sliding_window": 8, "use_sliding_window": False}, [None, None], None),
    ({"layer_types": ["sliding_attention", "full_attention"]}, [8, None], None),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        [8, None],
        "its sliding window is only in the mask",
    ),
    ({"layer_types": ["full_attention", "mamba"]}, [None, None], "it has layers of type 'mamba'"),
    ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, [None, None], None),
    ({"attention_chunk_size": 4}, [None, None], "its attention is chunked"),
    ({}, [None], "1 of its 2 layers call"),
    ({}, [None, None, None], "3 of its 2 layers call"),
]


@pytest.mark.parametrize(("fields", "windows", "why"), WINDOWS)
def test_what_reaches_our_attention_is_what_was_promised(
    fields: dict[str, Any], windows: list[int | None], why: str | None
) -> None:
    seen = Discovery()
    some = torch.zeros(1, 2, 3, 4)
    for layer, window in enumerate(windows):
        seen.see(layer, some, some, None, window, True)
    if why is None:
        _check_layers(config(num_hidden_layers=2, **fields), seen)
        return
    with pytest.raises(Unfit, match=why):
        _check_layers(config(num_hidden_layers=2, **fields), seen)


def test_a_layer_that_calls_twice_is_not_what_was_promised() -> None:
    seen = Discovery()
    for layer in (1, 1):
        seen.see(layer, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), None, None, True)
    with pytest.raises(Unfit, match="2 of its 2 layers"):
        _check_layers(config(num_hidden_layers=2), seen)


def test_how_far_logits_are_apart() -> None:
    """In standard deviations, at the worst of them; or as a share of what neighbours are apart."""
    want = torch.tensor([0.0, 2.0])  # a deviation of the square root of two
    assert difference(torch.tensor([0.5, 5.0]), want) == pytest.approx(3 / math.sqrt(2))
    fine = Trial([], [], coarse=False, limit=2.0)
    near, far = (want + 1, want), (want + torch.tensor([0.0, 3.0]), want)
    assert fine.apart([far, near]) == pytest.approx(3 / math.sqrt(2))
    broken = (torch.tensor([math.nan, 0.0]), want)
    assert math.isnan(fine.apart([near, broken, far])) and not fine.agrees(near, broken)
    assert fine.agrees(near) and not fine.agrees(near, far)
    even, tilted = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    there = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert support._divergence(tilted, even) == pytest.approx(there)
    # neighbours: even to tilted, then no step
    coarse = Trial([], [torch.stack([even, tilted, tilted])], coarse=True, limit=1.0)
    between = (there + 0.0) / 2
    assert coarse.apart([(even, tilted), (even, even)]) == pytest.approx((back / 2) / between)
    assert coarse.apart([(tilted, even)]) == pytest.approx(2.0)


def test_rotations_are_those_of_a_short_call() -> None:
    def rotary(kind: Any) -> nn.Module:
        made = nn.Module()
        made.rope_type = kind
        return made

    model: Any = nn.ModuleList(
        [rotary("dynamic"), rotary("yarn"), rotary({"a": "longrope", "b": "llama3"}), rotary(5)]
    )
    support._rotate_as_at_first(model)
    assert [part.rope_type for part in model] == ["default", "yarn", {"a": "default", "b": "llama3"}, 5]


def test_small_copies_keep_one_layer_of_each_kind_and_the_heads_as_they_are() -> None:
    """At least eight layers, and up to the first of the last kind; two KV heads, each for two at most."""
    kinds = [*["a"] * 9, "b", *["a"] * 4]
    text = config(num_hidden_layers=14, kinds=kinds, other=(1,) * 14, short=[1, 2])
    _fewer_layers(text)
    assert (text.num_hidden_layers, text.kinds, text.other, text.short) == (10, kinds[:10], (1,) * 10, [1, 2])
    same = config(num_hidden_layers=14)
    _fewer_layers(same)
    assert same.num_hidden_layers == 8
    few = config(num_hidden_layers=3, kinds=["a", "b", "c"])
    _fewer_layers(few)
    assert (few.num_hidden_layers, few.kinds) == (3, ["a", "b", "c"])
    wide = config(
        num_attention_heads=12,
        num_key_value_heads=3,
        hidden_size=96,
        intermediate_size=500,
        ffn_dim=10,
        word_embed_proj_dim=96,
    )
    _narrower(wide)
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.hidden_size) == (4, 2, 4 * 8)
    assert (wide.intermediate_size, wide.ffn_dim, wide.word_embed_proj_dim) == (64, 10, 32)
    single = config(num_attention_heads=5, hidden_size=50, head_dim=7, num_key_value_heads=1)
    _narrower(single)
    assert (single.num_attention_heads, single.num_key_value_heads, single.hidden_size) == (2, 1, 14)
    odd = config(num_attention_heads=5, num_key_value_heads=2, hidden_size=50)
    _narrower(odd)
    assert odd.num_attention_heads == 5, "heads that are not shared evenly stay"


# Checkpoints


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"num_hidden_layers": 1024, "num_experts": 8192, "n_layer": 0, "hidden_size": 10**9}, None),
        ({"num_hidden_layers": 1025}, "num_hidden_layers in config.json is 1025, and must be 0 to 1024"),
        ({"encoder_layers": -1}, "encoder_layers in config.json is -1, and must be 0 to 1024"),
        ({"num_local_experts": 8193}, "is 8193, and must be 0 to 8192"),
        ({"n_routed_experts": 1e9}, "must be 0 to 8192"),
        ({"num_experts_per_tok": 10**6}, None),
        ({"text_config": {"deeper": {"num_layers": 2000}}}, "num_layers in config.json is 2000"),
    ],
)
def test_more_than_can_be_meant(content: dict[str, Any], why: str | None) -> None:
    if why is None:
        checkpoint._check_sizes(content, "m")
        return
    with pytest.raises(UserError, match=why):
        checkpoint._check_sizes(content, "m")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"vocab_size": 1, "num_attention_heads": 1, "max_position_embeddings": 0}, None),
        ({"vocab_size": None, "dtype": torch.float16, "quantization_config": {}}, None),
        ({"dtype": {"text": torch.float16}}, None),
        ({"hidden_size": 0}, "hidden_size in config.json is 0, and must be 1 or more"),
        ({"num_key_value_heads": -1}, "num_key_value_heads in config.json is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers in config.json is True"),
        ({"max_position_embeddings": -1}, "must be 0 or more"),
        ({"dtype": "float31"}, "torch has no such dtype"),
        ({"quantization_config": 5}, "must be an object"),
    ],
)
def test_what_no_configuration_means(fields: dict[str, Any], why: str | None) -> None:
    made = config()
    vars(made).update(fields)
    if why is None:
        checkpoint._check_config(made, "m")
        return
    with pytest.raises(UserError, match=why):
        checkpoint._check_config(made, "m")


def test_where_a_model_is(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUFxxxx")
    (tmp_path / "file").write_text("")
    for name in (f"{tmp_path}/none", "~/none-at-all", "./none", "a/b/c"):
        with pytest.raises(UserError, match=f"no model folder '{name}': it is not there"):
            checkpoint.resolve(name)
    with pytest.raises(UserError, match="it is a file"):
        checkpoint.resolve(f"{tmp_path}/file")
    with pytest.raises(UserError, match="no model file"):
        checkpoint.resolve(f"{tmp_path}/b.GGUF")
    assert checkpoint.resolve(str(tmp_path)) == checkpoint.resolve(f"{tmp_path}/a.gguf") == str(tmp_path)
    with pytest.raises(UserError, match="no demo model 'demo://none'"):
        checkpoint.resolve("demo://none")
    for part in ("x-00001-of-00002.gguf", "x-1-of-2.gguf"):
        (tmp_path / part).write_bytes(b"GGUF")
    with pytest.raises(UserError, match="one of several parts"):
        checkpoint.locate(f"{tmp_path}/x-00001-of-00002.gguf")
    assert checkpoint.locate(f"{tmp_path}/x-1-of-2.gguf").gguf == "x-1-of-2.gguf"
    source = checkpoint.locate(f"{tmp_path}/a.gguf")
    assert (source.location, source.gguf, source.folder) == (str(tmp_path), "a.gguf", tmp_path)
    for name, rebuilt in (("tokenizer.json", "a.gguf"), ("tokenizer_config.json", None)):
        (tmp_path / name).write_text("{}")
        assert source.tokenizer_gguf == rebuilt, "both files have to lie there"


def test_half_of_the_promised_numbers_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied heads and the like are not stored."""
    spec, made = ModelSpec(model=str(tmp_path)), config()
    monkeypatch.setattr(checkpoint, "_weight_files", lambda *_: [Path("a"), Path("b")])
    monkeypatch.setattr(checkpoint, "_numbers", lambda path, _: {"a": 20, "b": 30}[path.name])
    checkpoint.check_weights(spec, made, 100)
    with pytest.raises(
        UserError, match=r"its files hold 50 numbers, and config\.json describes a model of 101"
    ):
        checkpoint.check_weights(spec, made, 101)
    made.quantization_config = {}
    checkpoint.check_weights(spec, made, 10**9)


# Ids


def test_a_map_of_ids() -> None:
    """Two tokens of the base, 0 and 3, are one id there; 1 is not shared and takes two."""
    mapped = VocabMap(
        4,
        torch.tensor([5, 0, 2, 5]),
        torch.tensor([True, False, True, True]),
        ((5,), (7, 8), (2,), (5,)),
    )
    assert mapped.spelt_by(5) == [0, 3] and mapped.spelt_by(2) == [2]
    assert mapped.spelt_by(0) == [], "0 stands there for what is not shared"
    assert mapped.spell(1) == (7, 8) and mapped.longest == 2
    logits = torch.arange(12.0).view(2, 6)
    assert mapped.align(logits).tolist() == [[5, 0, 2, 5], [11, 6, 8, 11]]
    plain = VocabMap(4)
    assert plain.spelt_by(3) == [3] and plain.spell(3) == (3,) and plain.longest == 1
    assert torch.equal(plain.align(logits), logits[:, :4])
    on = mapped.on(torch.device("meta"))
    assert on.columns is not None and on.shared is not None and on.spelled == mapped.spelled
    assert on.columns.device.type == on.shared.device.type == "meta"


def words(*tokens: str, start: int = 0) -> Any:
    """A vocabulary, in which a token's text is itself and letters are tokens."""
    ids = {token: start + index for index, token in enumerate(tokens)}
    return SimpleNamespace(
        get_vocab=lambda: ids,
        eos_token=None,
        convert_tokens_to_string=lambda parts: "".join(parts).strip("<>"),
        decode=lambda found: "",
        encode=lambda text, add_special_tokens: [ids[letter] for letter in text],
    )


def test_vocabularies_that_differ() -> None:
    base = words("a", "b", "ab", "<>", "c")
    other = words("b", "a", "x", "c")
    found = align(base, 5, other, 4, "expert", "intersect")
    assert found.columns is not None and found.shared is not None
    assert found.columns.tolist() == [1, 0, 0, 0, 3]
    assert found.shared.tolist() == [True, True, False, False, True]
    assert found.spelled == ((1,), (0,), (1, 0), (0,), (3,)), "what has no text is id 0"
    with pytest.raises(UserError) as raised:
        align(base, 5, other, 4, "expert", "strict")
    assert "the base and the expert differ at 5 of 5 ids (0: 'a' is 'b' there, 1: 'b' is 'a' there, " in str(
        raised.value
    )
    assert "2: 'ab' is 'x' there)" in str(raised.value)
    cut = align(base, 2, words("a", "b", "y"), 2, "expert", "strict")
    assert cut == VocabMap(2), "ids beyond the heads do not count"
    beyond = Difference("e", (3,), 4, ((3, "d", None),))
    assert "(3: 'd' is 'nothing' there)" in str(beyond)
    with pytest.raises(UserError, match="no token in common"):
        align(words("a"), 1, words("b"), 1, "expert", "intersect")


def loaded(virtual: Tensor | None = None) -> Loaded:
    """A model of five tokens, with a soft prompt."""
    table = nn.Embedding(5, 2)
    with torch.no_grad():
        table.weight.copy_(torch.arange(10.0).view(5, 2))
    module: Any = SimpleNamespace(
        get_input_embeddings=lambda: table, config=config(vocab_size=7), generation_config=None
    )
    tokenizer: Any = SimpleNamespace(
        convert_ids_to_tokens=lambda index: f"<{index}>", get_vocab=lambda: {"a": 0, "b": 5}
    )
    family = support.Family("packed", 9)
    source = WeightSource("m", None, None, "float32", "none", "None", False)
    return Loaded("expert", M, module, tokenizer, family, Adapters(), None, 0, 0, source, virtual)


def test_ids_of_a_soft_prompt() -> None:
    soft = loaded(torch.tensor([[50.0, 51.0], [60.0, 61.0], [70.0, 71.0]]))
    assert soft.virtual_ids == (5, 6, 7) and loaded().virtual_ids == ()
    got = soft.embed(torch.tensor([[5, 7, 4, 0]]))
    assert got.tolist() == [[[50, 51], [70, 71], [8, 9], [0, 1]]]
    assert loaded().embed(torch.tensor([[4]])).tolist() == [[[8, 9]]]
    assert (soft.vocabulary, soft.size) == (7, 6) and soft.aligned_with(soft, "strict") == VocabMap(6)


def test_a_token_beyond_the_model() -> None:
    one = loaded()
    one.require_rows(()), one.require_rows((4, 0))
    with pytest.raises(UserError, match=r"a prompt of the expert has token 5 \('<5>'\), and the model has 5"):
        one.require_rows((0, 5, 2))


def test_the_names_of_several_experts() -> None:
    """Each with its own antiexpert, or the system's; the first has no number, its antiexpert has 1."""
    own = ModelSpec(model="own")
    experts = (
        ExpertSpec(model="a", weight=0.5, antiexpert=own),
        ExpertSpec(model="b", weight=-1.0),
        ExpertSpec(model="c", antiexpert=own.model_copy(update={"model": "other"})),
    )
    system = System(name="s", base=M, antiexpert=M.model_copy(update={"model": "anti"}), experts=experts)
    models = Models(system)
    assert models.terms() == [
        ("expert", "antiexpert1", 0.5),
        ("expert2", "antiexpert", -1.0),
        ("expert3", "antiexpert3", 1.0),
    ]
    names = ["base", "expert", "expert2", "expert3", "antiexpert", "antiexpert1", "antiexpert3"]
    assert [models.spec(name).model for name in names] == ["m", "a", "b", "c", "anti", "own", "other"]
    for absent in ("tuned", "antiexpert2", "expert4"):
        with pytest.raises(UserError, match=f"system 's' has no {absent}"):
            models.spec(absent)


# Adapters


def files(shapes: dict[str, tuple[int, ...]] | None = None, **fields: Any) -> AdapterFiles:
    return AdapterFiles("it", SimpleNamespace(**fields), Path(), shapes or {}, False)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({}, []),
        ({"trainable_token_indices": [7, 3, 7]}, [3, 7]),
        ({"trainable_token_indices": {"a": [9, 2], "b": [5]}}, [2, 5, 9]),
        ({"trainable_token_indices": None, "token_indices": [8, 1]}, [1, 8]),
        ({"trainable_token_indices": [4], "token_indices": [8]}, [4]),
    ],
)
def test_tokens_that_an_adapter_trains_by_name(fields: dict[str, Any], ids: list[int]) -> None:
    assert files(**fields).special_ids == ids


def test_a_message_in_one_line() -> None:
    assert first_line(ValueError("a\n  b\t c")) == "a b c"
    assert first_line(ValueError("x" * 300)) == "x" * 300
    assert first_line(ValueError("x" * 301)) == "x" * 297 + "..."


class Host(nn.Module):
    """A model with ten tokens and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_rows_that_an_adapter_brings() -> None:
    host: Any = Host()
    prefix = adapter_files.PREFIX
    table = {f"{prefix}words.weight": (12, 4), f"{prefix}head.modules_to_save.weight": (11, 4)}
    assert rows_of(files(table), host) == 12
    assert rows_of(files({f"{prefix}head.weight": (11, 4)}), host) == 11
    for name, shape in [
        ("other.weight", (12, 4)),
        ("words.lora_A.weight", (12, 4)),
        ("words.bias", (12, 4)),
        ("words.weight", (12,)),
    ]:
        assert rows_of(files({f"{prefix}{name}": shape}), host) is None, name


@pytest.mark.parametrize(
    ("fields", "rows", "why"),
    [
        ({}, None, None),
        ({"bias": "none", "layer_replication": None, "init_lora_weights": True}, 10, None),
        ({"init_lora_weights": "gaussian"}, None, None),
        ({"bias": "lora_only"}, None, r"changes biases \(bias: lora_only\)"),
        ({"layer_replication": [[0, 1]]}, None, "repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, None, r"\(init_lora_weights: pissa_niter_4\)"),
        ({}, 12, "has embeddings of 12 tokens, and the antiexpert's are of 10"),
        ({}, 9, "has embeddings of 9 tokens"),
    ],
)
def test_what_cannot_share_weights(fields: dict[str, Any], rows: int | None, why: str | None) -> None:
    host: Any = Host()
    given = files({} if rows is None else {f"{adapter_files.PREFIX}words.weight": (rows, 4)}, **fields)
    if why is None:
        refuse_to_share(given, host)
        return
    with pytest.raises(UserError, match=f"adapter 'it' .*{why}.*: give the expert its own `model`"):
        refuse_to_share(given, host)


def test_whether_an_adapter_is_in_force() -> None:
    """A fiftieth of a standard deviation is rounding for its host; of its own logits one has to change, in
    the columns that both have."""
    before = torch.tensor([0.0, 2.0], dtype=torch.float64)
    step = 0.02 * math.sqrt(2)
    require_untouched(files(), "antiexpert", before, before + 0.99 * step)
    with pytest.raises(UserError, match="adapter 'it' changes the antiexpert"):
        require_untouched(files(), "antiexpert", before, before - 1.01 * step)
    require_effect(files(), before, torch.tensor([0.0, 2.1, 5.0], dtype=torch.float64))
    with pytest.raises(UserError, match=r"changes no logit of the model$"):
        require_effect(files(), before, torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64))
    with pytest.raises(UserError, match="logits that are no numbers"):
        require_effect(files(), before, torch.tensor([0.0, math.inf], dtype=torch.float64))


def test_models_share_a_tokenizer_only_where_all_that_decides_it_agrees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Field by field: the checkpoint, the adapter's own one, the revision, code of its own."""
    made = list[ModelSpec]()

    def load(spec: ModelSpec, trust_remote_code: bool) -> object:
        made.append(spec)
        return object()

    monkeypatch.setattr(roles, "load_tokenizer", load)
    monkeypatch.setattr(
        roles, "tokenizer_source", lambda spec: spec.adapter if spec.adapter == "own" else None
    )
    specs = {
        "base": M,
        "same": M.model_copy(update={"dtype": "float64", "chat": "llama2", "adapter": "without"}),
        "model": M.model_copy(update={"model": "n"}),
        "adapter": M.model_copy(update={"adapter": "own"}),
        "revision": M.model_copy(update={"revision": "r"}),
        "code": M.model_copy(update={"trust_remote_code": True}),
    }
    models = Models(System(base=M))
    monkeypatch.setattr(Models, "_own", lambda self, name: specs[name])
    found = {name: models.tokenizer(name) for name in specs}
    assert found["same"] is found["base"] is models.tokenizer("base")
    assert len({id(one) for one in found.values()}) == len(made) == 5
