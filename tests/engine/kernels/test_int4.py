"""Weight-only int4 on the CPU: error bounds, the product against its definition, and models with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from proxytune.config import ModelSpec, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.kernels import int4
from proxytune.engine.kernels.int4 import GROUP, Int4Linear, in_groups
from proxytune.errors import UserError
from proxytune.models.checkpoint import load_config
from proxytune.models.loading import load_module
from proxytune.models.memory import weights_needed
from proxytune.models.roles import Models
from tests.support import tiny
from tests.support.decoders import GREEDY, ragged

pytestmark = pytest.mark.skipif(int4.why_not() is not None, reason=f"{int4.why_not()}")


def meant(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [N, K] that the 4-bit values stand for, in float64, and the scale of each."""
    values, scales = in_groups(weight)
    scale, middle = (part.repeat_interleave(GROUP, 0).T for part in scales.double().unbind(-1))  # [N, K]
    return (values.double() - 8) * scale + middle, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_near(dtype: torch.dtype) -> None:
    """Within half a step, and what rounding scale and middle to eight bits adds to it."""
    torch.manual_seed(0)
    weight = (torch.randn(48, 96) * torch.rand(48, 1) * 10 + torch.randn(48, 1)).to(dtype)
    weight[0], weight[1] = 0, 3.0
    near, scale = meant(weight)
    ends = weight.double().abs().unflatten(1, (-1, GROUP)).amax(-1).repeat_interleave(GROUP, 1)
    assert ((near - weight.double()).abs() <= 0.5 * scale + (ends + 8 * scale) * 2**-7).all()
    assert (near[0] == 0).all() and ((near[1] - 3).abs() < 0.03).all()


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("inputs, outputs, bias", [(32, 16, False), (96, 80, True), (576, 192, False)])
def test_the_product_is_that_of_the_weights_that_are_meant(
    rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(rows)
    plain = nn.Linear(inputs, outputs, bias=bias)
    layer = Int4Linear.of(plain)
    x = torch.randn(2, rows, inputs).bfloat16()
    weights, _ = meant(plain.weight.detach())
    with torch.inference_mode():
        want = x.double() @ weights.T + (plain.bias.double() if bias else 0)
        for dtype in (torch.bfloat16, torch.float32):
            got = layer(x.to(dtype))
            assert got.dtype == dtype and got.shape == (2, rows, outputs)
            torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=2e-2)


def test_sizes_that_the_kernel_does_not_take() -> None:
    assert int4.fits(32, 16) and int4.fits(576, 1536)
    assert not int4.fits(48, 16) and not int4.fits(32, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, whose output head has 259 rows."""
    model = tiny.build("llama", 1, hidden_size=64, intermediate_size=128).bfloat16()
    return tiny.save(tmp_path_factory.mktemp("int4") / "llama", model)


def test_a_model_takes_the_fast_path_in_an_eighth_of_the_memory(folder: Path) -> None:
    spec = ModelSpec(model=str(folder), quantization="int4")
    d = Decoder(Models(System(base=spec)), "base")
    loaded = d.loaded["base"]
    layers = [m for m in loaded.module.modules() if isinstance(m, Int4Linear)]
    assert loaded.family.path == "packed" and len(layers) == 7 * 2
    assert isinstance(loaded.module.lm_head, nn.Linear), "the head keeps its own weights"
    buffers = sum(b.nbytes for b in loaded.module.buffers())
    assert d.memory["base"].weights == weights_needed(spec, load_config(spec), False) + buffers
    numbers = sum(m.in_features * m.out_features for m in layers)
    assert sum(m.weight.nbytes + m.weight_scale.nbytes for m in layers) == numbers * (4 + 1) / 8
    assert all(c.token_ids for c in d.stream(ragged(3, 3), GREEDY))


def test_logits_are_near_the_plain_ones(folder: Path) -> None:
    plain = load_module(ModelSpec(model=str(folder)))
    module = load_module(ModelSpec(model=str(folder), quantization="int4"))
    ids = torch.arange(3, 203)[None]
    with torch.inference_mode():
        got, want = module(ids).logits.float(), plain(ids).logits.float()
    assert 0 < (got - want).std() < 0.3 * want.std()


def test_adapters_lie_beside_the_packed_weights(folder: Path) -> None:
    module = load_module(ModelSpec(model=str(folder), quantization="int4"))
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        before = module(ids).logits
        model = get_peft_model(module, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        assert torch.equal(model(ids).logits, before)  # B is zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert not torch.equal(model(ids).logits, before)


def test_a_gpu_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"int4: it runs on the CPU only.*use `4bit`"):
        load_module(ModelSpec(model=str(folder), quantization="int4"))
