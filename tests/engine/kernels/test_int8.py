"""Weight-only int8: error bounds, the kernel against its definition, and models loaded with it.

Where there is no GPU, Triton's interpreter runs the kernel on CPU tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from proxytune.config import ModelSpec, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.kernels.int8 import CHUNK, MOST_ROWS, Int8Linear, dequantize, quantize
from proxytune.errors import UserError
from proxytune.models import weight_only
from proxytune.models.checkpoint import load_config
from proxytune.models.loading import load_module
from proxytune.models.memory import weights_needed
from proxytune.models.roles import Models
from proxytune.models.weight_only import random_int8
from proxytune.records import Completion
from tests.support import tiny
from tests.support.decoders import GREEDY, by_id, ragged, tokens
from tests.support.memory import leave_free

SHAPE = {"hidden_size": 64, "intermediate_size": 128}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32."""
    return tiny.save(tmp_path_factory.mktemp("int8") / "llama", tiny.build("llama", 1, **SHAPE).float())


def spec(folder: Path, **more: Any) -> ModelSpec:
    return ModelSpec(**{"model": str(folder), "dtype": "float32", "quantization": "int8", **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, CHUNK + 3])
def test_weights_are_off_by_half_a_step_at_most(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(rows, 40) * torch.rand(rows, 1) * 10).to(dtype)
    weight[0] = 0
    rounded, scale = quantize(weight)
    assert (rounded.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert rounded.abs().amax() <= 127
    error = (weight.double() - rounded.double() * scale[:, None].double()).abs()
    assert (error <= scale[:, None].double() * 0.5 * (1 + 1e-5)).all()
    assert (rounded[1:].abs().amax(1) >= 125).all()  # the largest of every row uses the whole range
    assert torch.equal(scale, scale.bfloat16().float())  # for kernels that take no other
    assert (rounded[0] == 0).all() and torch.isfinite(scale).all()


def test_dequantized_weights_are_rounded_once() -> None:
    rounded, scale = quantize(torch.randn(9, 33))
    exact = rounded.double() * scale[:, None].double()
    assert torch.equal(dequantize(rounded, scale, torch.float64), exact)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(rounded, scale, dtype), (rounded * scale[:, None]).to(dtype))


CALLS = [
    # rows, inputs, outputs, bias, dtype
    (1, 256, 64, False, torch.float32),
    (1, 300, 70, True, torch.float32),  # ends in the middle of a block both ways
    (3, 512, 16, False, torch.bfloat16),
    (5, 256, 33, True, torch.bfloat16),
    (16, 64, 48, False, torch.float16),
    (17, 130, 20, True, torch.float16),
    (64, 128, 32, False, torch.bfloat16),
    (64, 40, 17, True, torch.float32),
]


@pytest.mark.parametrize("rows, inputs, outputs, bias, dtype", CALLS)
def test_kernel_is_dequantised_matmul(
    rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, kernels: torch.device
) -> None:
    torch.manual_seed(rows)
    layer = Int8Linear.of(nn.Linear(inputs, outputs, bias=bias)).to(kernels)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(rows, inputs).to(kernels, dtype)
    with torch.inference_mode():
        got = layer(x)
    want = x.double() @ (layer.weight.double() * layer.weight_scale[:, None].double()).T
    if layer.bias is not None:
        want += layer.bias.double()
    assert got.dtype == dtype and got.shape == (rows, outputs)
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_kernel_takes_any_cut(kernels: torch.device) -> None:
    """Whatever the block sizes, and for more rows than one tile, the same product."""
    from proxytune.engine.kernels.triton_linear import Blocks, launch

    layer = Int8Linear.of(nn.Linear(96, 80, bias=False)).to(kernels)
    x = torch.randn(40, 192, device=kernels)[:, ::2]  # not in one piece either
    want = x @ dequantize(layer.weight, layer.weight_scale, torch.float32).T
    cuts = (Blocks(16, 16, 32, 4, 2), Blocks(32, 64, 128, 4, 2), Blocks(64, 16, 96 // 3, 4, 3))
    for cut in (*cuts, cuts[0]._replace(splits=3), cuts[0]._replace(splits=2), cuts[2]._replace(splits=9)):
        got = launch(x, layer.weight, layer.weight_scale, None, cut)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_narrow_layers_are_shared_out(dtype: torch.dtype, kernels: torch.device) -> None:
    """Parts are added up in their order, before scale and bias; where inputs end within a block too."""
    from proxytune.engine.kernels.triton_linear import blocks

    assert blocks(1, 1024, 8192, torch.bfloat16).splits == 4
    assert blocks(1, 256, 2048, torch.bfloat16).splits == 2
    assert {blocks(1, n, 8192, torch.bfloat16).splits for n in (4096, 8192, 28672)} == {1}
    assert blocks(64, 1024, 1024, torch.bfloat16).splits == 1
    layer = Int8Linear.of(nn.Linear(2100, 20)).to(kernels)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(3, 2100).to(kernels, dtype)
    with torch.inference_mode():
        got = layer(x)
        assert torch.equal(layer(x), got)
    want = x.double() @ (layer.weight.double() * layer.weight_scale[:, None].double()).T + layer.bias.double()
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_layer_takes_any_leading_shape_and_picks_by_rows(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxytune.engine.kernels import triton_linear

    calls: list[int] = []
    launch = triton_linear.launch

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(x.shape[0])
        return launch(x, *rest)

    monkeypatch.setattr(triton_linear, "launch", counted)
    layer = Int8Linear.of(nn.Linear(32, 24)).to(kernels)
    plain = nn.Linear(32, 24).to(kernels)
    plain.weight.data = dequantize(layer.weight, layer.weight_scale, torch.float32)
    assert layer.bias is not None
    plain.bias.data = layer.bias.data
    for shape in ((2, 3, 32), (32,), (1, MOST_ROWS, 32), (MOST_ROWS + 1, 32), (0, 32)):
        x = torch.randn(shape, device=kernels)
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    assert calls == [6, 1, MOST_ROWS]
    x = torch.randn(2, 32, device=kernels, dtype=torch.float64)
    assert layer(x).dtype == torch.float64 and len(calls) == 3


def test_model_is_close_to_the_plain_one(folder: Path) -> None:
    """Logits within a fraction of their spread, most first choices the same, everything but the head int8."""
    module, plain = load_module(spec(folder)), load_module(spec(folder, quantization="none"))
    layers = [n for n, m in module.named_modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 7 * 2 and type(module.lm_head) is nn.Linear
    assert torch.equal(module.lm_head.weight, plain.lm_head.weight)
    for name in layers:
        weight, scale = quantize(plain.get_submodule(name).weight)
        assert torch.equal(module.get_submodule(name).weight, weight)
        assert torch.equal(module.get_submodule(name).weight_scale, scale)
    ids = torch.arange(3, 203)[None]
    with torch.inference_mode():
        got, want = module(ids).logits, plain(ids).logits
    assert (got - want).std() < 0.05 * want.std()
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.9
    assert not torch.equal(got, want)


def test_decoding_end_to_end(folder: Path) -> None:
    """An int8 base with plain experts: batch and single rows agree, and the tokens are the plain base's."""
    small = spec(folder, quantization="none")
    d = Decoder(Models(System(base=spec(folder), expert=small, antiexpert=small)), "proxy")  # they cancel
    assert d.loaded["base"].family.path == "packed"
    together = tokens(d)
    for e in ragged(2, 3):
        assert next(iter(d.stream([e], GREEDY))).token_ids == together[e.id, 0]
    assert together == tokens(Decoder(Models(System(base=small)), "base")), (
        "rounding is far from any tie here"
    )


def test_tokens_are_those_of_the_rounded_weights(folder: Path, tmp_path: Path) -> None:
    """In float64, where nothing else rounds, an int8 model is the plain model of its own weights, token for
    token."""
    rounded = load_module(spec(folder, dtype="float64"))
    plain = load_module(spec(folder, dtype="float64", quantization="none"))
    for name, layer in rounded.named_modules():
        if isinstance(layer, Int8Linear):
            weight = dequantize(layer.weight, layer.weight_scale, torch.float64)
            plain.get_submodule(name).weight.data.copy_(weight)
    same = spec(tiny.save(tmp_path / "rounded", plain), dtype="float64", quantization="none")
    whole = spec(folder, dtype="float64", quantization="none")
    made = [by_id(decoded(one)) for one in (spec(folder, dtype="float64"), same, whole)]
    for where, found in made[0].items():
        assert found.token_ids == made[1][where].token_ids
        assert found.logprob == pytest.approx(made[1][where].logprob, abs=1e-9)
        assert abs(found.logprob - made[2][where].logprob) > 1e-6, "the weights are rounded"


def decoded(one: ModelSpec) -> list[Completion]:
    """Some responses of a model."""
    return list(Decoder(Models(System(base=one)), "base").stream(ragged(6, 3), GREEDY))


@pytest.mark.slow
def test_decoding_through_the_kernel(folder: Path, kernels: torch.device) -> None:
    """The same tokens whichever way the int8 layers multiply."""
    d = Decoder(Models(System(base=spec(folder))), "base")
    found = next(iter(d.stream(ragged(1, 3), GREEDY))).token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.engine.kernels.int8.runs_triton", lambda tensor: False)
        assert next(iter(d.stream(ragged(1, 3), GREEDY))).token_ids == found


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2), ("auto", 4)])
def test_memory_is_known_before_and_counted_after(folder: Path, dtype: str, size: int) -> None:
    one = spec(folder, dtype=dtype)
    d = Decoder(Models(System(base=one)), "base")
    buffers = sum(b.nbytes for b in d.loaded["base"].module.buffers())
    need = weights_needed(one, load_config(one), False)
    assert d.memory["base"].weights == need + buffers
    # by hand: 259 tokens in and out, two layers of 64 wide with two KV heads, five norms
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    outputs = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    assert need == linear + 4 * outputs + size * (2 * 259 * 64 + 5 * 64)


def test_memory_check_counts_int8(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = weights_needed(spec(folder), load_config(spec(folder)), False)
    leave_free(monkeypatch, need)
    load_module(spec(folder))
    leave_free(monkeypatch, need - 1)
    with pytest.raises(UserError, match="are free"):
        load_module(spec(folder))


def test_one_matrix_at_a_time_is_wide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a weight is quantised, the ones before it are int8 already and none behind it is loaded."""
    seen: list[tuple[int, int]] = []
    convert = weight_only._Quantize.convert
    replace = weight_only._replace
    models: list[Any] = []

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        linear = [m for m in models[0].modules() if isinstance(m, Int8Linear)]
        wide = [m for m in linear if m.weight.dtype != torch.int8 and not m.weight.is_meta]
        seen.append((sum(m.weight.dtype == torch.int8 for m in linear), len(wide)))
        return convert(self, *arguments, **named)

    def noted(model: Any, bits: Literal[4, 8]) -> None:
        models.append(model)
        replace(model, bits)

    monkeypatch.setattr(weight_only, "_replace", noted)
    monkeypatch.setattr(weight_only._Quantize, "convert", watched)
    load_module(spec(folder))
    assert seen == [(number, 0) for number in range(14)]


def test_biases_and_tied_heads_stay(tmp_path: Path) -> None:
    model = tiny.build("qwen2", 5, tie_word_embeddings=True).float()
    folder = tiny.save(tmp_path / "qwen", model)
    module = load_module(spec(folder))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    attention = module.model.layers[0].self_attn
    assert isinstance(attention.q_proj, Int8Linear)
    assert torch.equal(attention.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        got, want = module(ids).logits, model(ids).logits
    assert (got - want).std() < 0.1 * want.std()


def test_adapters_sit_on_int8_layers(folder: Path, tmp_path: Path) -> None:
    """A LoRA expert on an int8 antiexpert, shared and on its own weights: the same tokens."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = get_peft_model(
        plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.4)
    adapter.save_pretrained(tmp_path / "lora")
    anti, lora = spec(folder), ModelSpec(adapter=str(tmp_path / "lora"))
    shared = Models(System(base=spec(folder, quantization="none"), antiexpert=anti, expert=lora))
    found = tokens(Decoder(shared, "expert"))
    assert found != tokens(Decoder(shared, "antiexpert"))
    own = anti.model_copy(update={"adapter": str(tmp_path / "lora")})
    assert tokens(Decoder(Models(System(base=own)), "base")) == found


def test_models_without_linear_layers_are_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "gpt2", tiny.build("gpt2", 1).float())
    with pytest.raises(
        UserError, match="no linear layers that `quantization: int8` could quantise"
    ) as caught:
        load_module(spec(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_weight_is_named(folder: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from safetensors.torch import save_file

    copytree(folder, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "q_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 4 weights .*layers\.0\.self_attn\.q_proj\.weight first"):
        load_module(spec(tmp_path / "bad"))


def test_integer_weights_are_not_quantised_again() -> None:
    with pytest.raises(ValueError, match=r"q_proj.weight is torch.int8"):
        weight_only.WeightOnlyQuantizer(weight_only.WeightOnlyConfig(8)).get_quantize_ops().convert(
            {"q_proj.weight": [torch.zeros(2, 2, dtype=torch.int8)]}, full_layer_name="q_proj.weight"
        )


@pytest.mark.parametrize("tied", [False, True])
def test_random_int8_model(tied: bool) -> None:
    """The shape and the spread of a new model, real rotation, and repeatable; no float weight in a layer."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = random_int8(config, "cpu", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_config(config)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 14 and all(m.weight.dtype == torch.int8 for m in layers)
    for layer in layers:
        spread = dequantize(layer.weight, layer.weight_scale, torch.float32).std()
        assert spread == pytest.approx(config.initializer_range, rel=0.05)
    logits = model(torch.arange(50)[None]).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all() and logits.std() > 0
    again = random_int8(config, "cpu", dtype=torch.bfloat16)
    assert torch.equal(again(torch.arange(50)[None]).logits, logits)
    other = random_int8(config, "cpu", dtype=torch.bfloat16, seed=1)
    assert not torch.equal(other(torch.arange(50)[None]).logits, logits)


def test_int8_is_written_in_a_system_file(folder: Path, tmp_path: Path) -> None:
    from proxytune.config import load_system

    file = tmp_path / "system.yaml"
    file.write_text(json.dumps({"base": {"model": str(folder), "quantization": "int8"}}))
    assert load_system(file).base.quantization == "int8"
    file.write_text(json.dumps({"base": {"model": str(folder), "quantization": "int2"}}))
    with pytest.raises(
        UserError, match=r"base\.quantization: Input should be 'none', 'int8', 'int4', '8bit' or '4bit'"
    ):
        load_system(file)
