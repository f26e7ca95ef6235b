"""What is put in the place of a model's modules on CUDA: found out by trying, with the same results, and
without a second copy of a weight. The CPU stands for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from proxytune.engine.fused import DeviceNorm, GatedMLP, joint, modules, use_device_kernels
from proxytune.engine.fused.joined import join
from proxytune.engine.kernels.int8 import Int8Linear
from tests.support import tiny

FOUND = {  # norms and gated layers of two decoder layers
    "llama": (5, 2),
    "qwen2": (5, 2),
    "qwen3": (9, 2),
    "gemma2": (9, 2),
    "gemma3": (13, 2),
    "olmo2": (9, 2),
    "phi3": (5, 0),
    "gpt2": (0, 0),
    "mixtral": (5, 0),
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "DEVICES", {"cpu"})


def counts(model: nn.Module) -> tuple[int, int]:
    kinds = (DeviceNorm, GatedMLP)
    norms, gates = (sum(isinstance(m, kind) for m in model.modules()) for kind in kinds)
    return norms, gates


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_families_compute_the_same(name: str, dtype: torch.dtype) -> None:
    """Products that are one round as their parts do, or by another last place."""
    model: Any = tiny.build(name, 1).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for norm in (
            m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 1
        ):
            norm.weight.add_(torch.randn_like(norm.weight) / 4)  # fresh ones are all alike
    names, ids = set(dict(model.named_parameters())), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        want = model(ids).logits
    use_device_kernels(model)
    with torch.inference_mode():
        got = model(ids).logits
    assert counts(model) == FOUND[name]
    assert set(dict(model.named_parameters())) == names
    limit = {torch.float64: 1e-12, torch.bfloat16: 0.03}[dtype]
    assert (got - want).abs().max() <= limit * want.std()


def test_weights_lie_together_and_once() -> None:
    """Parameters keep their names, shapes and values; only q, k, v and gate, up move."""
    model: Any = tiny.build("qwen2", 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    use_device_kernels(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for layer in model.model.layers:
        own, mlp = layer.self_attn, layer.mlp
        for parts in ((own.q_proj, own.k_proj, own.v_proj), (mlp.gate_proj, mlp.up_proj)):
            storages = {p.weight.untyped_storage().data_ptr() for p in parts}
            assert len(storages) == 1
            assert parts[0].weight.untyped_storage().nbytes() == sum(p.weight.nbytes for p in parts)
        assert own.o_proj.weight.untyped_storage().nbytes() == own.o_proj.weight.nbytes


def linears(bias: bool = False, widths: tuple[int, ...] = (6, 2, 4)) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, width, bias=bias).requires_grad_(False) for width in widths]


def products(layers: Any, x: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """What `joint` gives, and whether it was one product."""
    found = list(joint(layers, x))
    return found, len({part.untyped_storage().data_ptr() for part in found}) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_one_product(bias: bool, int8: bool) -> None:
    layers: list[Any] = list(linears(bias))
    if int8:
        layers = [Int8Linear.of(layer) for layer in layers]
    x = torch.randn(2, 3, 8)
    want = [layer(x) for layer in layers]
    assert not products(layers, x)[1]
    assert join(layers) and join(layers)
    found, one = products(layers, x)
    assert one
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)
    assert not products(layers[::-1], x)[1], "the parts lie in another order"


def test_what_cannot_be_one_product_is_several() -> None:
    x = torch.randn(3, 8)
    layers: list[Any] = list(linears())
    assert join(layers)
    layers[1].weight = nn.Parameter(torch.zeros(2, 8), requires_grad=False)  # put in later
    found, one = products(layers, x)
    assert not one and (found[1] == 0).all()

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    adapted = Adapted(8, 2)
    found, one = products([layers[0], adapted, layers[2]], x)
    assert not one and torch.equal(found[1], adapted(x))
    assert not join([*linears(), adapted])
    hooked = linears()
    hooked[0].register_forward_hook(lambda *_: None)
    assert not join(hooked)
    mixed = [*linears(True, (6,)), *linears(False, (2,))]
    assert not join(mixed)
    assert not join([nn.Linear(8, 2), Int8Linear.of(nn.Linear(8, 2))])


def test_without_memory_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = linears()
    before = [layer.weight.data_ptr() for layer in layers]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "cat", full)
    assert not join(layers)
    assert [layer.weight.data_ptr() for layer in layers] == before


class Centred(nn.Module):
    """Subtracts the mean: no RMS norm, though all looks like one."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.eps = weight, 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


def test_look_alikes_stay() -> None:
    """A norm that centres, a feed-forward layer with another activation or another order, and whatever
    accelerate moves between devices."""
    model: Any = tiny.build("llama", 1)
    first, second = model.model.layers
    first.input_layernorm = Centred(first.input_layernorm.weight)
    second.mlp.act_fn = nn.ReLU()
    first.mlp.forward = lambda x: first.mlp.up_proj(x) @ first.mlp.down_proj.weight.T
    model.model.norm._hf_hook = object()
    use_device_kernels(model)
    assert counts(model) == (3, 0)
    assert join([second.self_attn.q_proj, second.self_attn.k_proj, second.self_attn.v_proj])


def test_the_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = tiny.build("llama", 1)
    use_device_kernels(model)
    assert counts(model) == (0, 0)
