"""Norms, rotary embeddings with the cache's write, and gated activations: each as one kernel on CUDA, and
written out as transformers has it wherever the kernel does not go or is not right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from proxytune.engine.kernels.cpu_rows import rotate
from proxytune.engine.kernels.paged_attention import KERNEL_DTYPES, runs_triton
from proxytune.engine.kernels.trial import trusted

DTYPES = (*KERNEL_DTYPES, torch.float64)
"""Of the kernels that sum nothing; a norm is a sum, and transformers has it in float32 for float64 too."""
WIDEST = 16384
"""Largest norm for one program."""
APART = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""How far a kernel may be from what is written out, beside numbers of about 1: a few last places."""
TRIED = 5
"""Tokens on which a kernel is tried."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
"""In the order of the kernel's numbers for them."""


class NormKind(NamedTuple):
    """Where an RMS norm rounds, and what it adds to its weight."""

    late: bool
    """It is rounded once, after the weight; otherwise before it as well."""
    shift: float


NORM_KINDS = (NormKind(False, 0.0), NormKind(True, 1.0), NormKind(True, 0.0))
"""Llama's, Gemma's and OLMo 2's."""


class Rotation(NamedTuple):
    """Rotary embeddings of T tokens, in the models' dtype."""

    cos: Tensor  # [T, R]
    sin: Tensor  # [T, R]

    def of(self, tokens: slice) -> Rotation:
        """Those of some of the tokens."""
        return Rotation(self.cos[tokens], self.sin[tokens])


def written_out_norm(x: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
    """x [..., d] and a weight [d], operation by operation as transformers has it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not kind.late:
        return weight * wide.to(x.dtype)
    return (wide * (kind.shift + weight.float() if kind.shift else weight)).to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float, kind: NormKind) -> Tensor:
    """An RMS norm of [..., d]."""
    if not _norms(x, weight, eps, kind):
        return written_out_norm(x, weight, eps, kind)
    from proxytune.engine.fused.triton_rows import norm as launch

    return launch(_rows(x), weight, eps, *kind)[0].view(x.shape)


def norm_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: NormKind
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, both [..., d], and the sum."""
    if not _norms(x, weight, eps, kind) or residual.dtype != x.dtype:
        total = x + residual
        return norm(total, weight, eps, kind), total
    from proxytune.engine.fused.triton_rows import norm as launch

    out, total = launch(_rows(x), weight, eps, *kind, residual=residual.contiguous())
    return out.view(x.shape), total.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    """[..., d] as [M, N, d], which heads within a wider row are as they lie."""
    if x.dim() == 3 and x.stride(-1) == 1:
        return x
    return x.reshape(1, -1, x.shape[-1]).contiguous()


def _norms(x: Tensor, weight: Tensor, eps: float, kind: NormKind) -> bool:
    """Whether the kernel takes such a norm, and was found to be right."""
    size, dtype = weight.shape[0], x.dtype
    if not runs_triton(x) or dtype not in KERNEL_DTYPES or weight.dtype != dtype or size > WIDEST:
        return False
    if x.numel() == 0:
        return False

    def apart() -> float:
        from proxytune.engine.fused.triton_rows import norm as launch

        x, more, own = (_normal(weight, rows, size) for rows in (TRIED, TRIED, 1))
        want = written_out_norm(x + more, own[0], eps, kind)
        alone, (both, total) = (
            launch(x[None], own[0], eps, *kind)[0][0],
            launch(x[None], own[0], eps, *kind, residual=more),
        )
        return _worst(
            _far(alone, written_out_norm(x, own[0], eps, kind)), _far(both[0], want), _far(total[0], x + more)
        )

    return trusted("norm kernel", (size, dtype, kind), x.device, apart, APART[dtype])


def rotate_and_place(
    query: Tensor,  # [T, H, Dk]
    key: Tensor,  # [T, Hkv, Dk]
    value: Tensor,  # [T, Hkv, Dv]
    rotation: Rotation,
    pools: tuple[Tensor, Tensor],  # [pages, PAGE, Hkv, Dk] and [.., Dv]
    slots: Tensor,  # [T] places in a pool seen as [pages * PAGE, Hkv, D]
) -> Tensor:
    """Rotate queries and keys, and store keys and values -> the queries [T, H, Dk]."""
    if _places(query, key, value, rotation, pools):
        from proxytune.engine.fused.triton_rows import placed

        return placed(query, key, value, rotation, pools, slots)
    turned = rotate(query, *rotation)
    _index(rotate(key, *rotation), value, pools, slots)
    return turned


def place(key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """Store keys [T, Hkv, Dk] and values [T, Hkv, Dv], rotated already."""
    if _places(None, key, value, None, pools):
        from proxytune.engine.fused.triton_rows import placed

        placed(None, key, value, None, pools, slots)
    else:
        _index(key, value, pools, slots)


def _index(key: Tensor, value: Tensor, pools: tuple[Tensor, Tensor], slots: Tensor) -> None:
    for pool, new in zip(pools, (key, value), strict=True):
        pool.flatten(0, 1).index_copy_(0, slots, new.to(pool.dtype))


def _places(
    query: Tensor | None, key: Tensor, value: Tensor, rotation: Rotation | None, pools: tuple[Tensor, Tensor]
) -> bool:
    """Whether the kernel takes such heads, and was found to be right."""
    tensors = [t for t in (query, key, value) if t is not None]
    dtypes = {t.dtype for t in (*tensors, *pools, *(rotation or ()))}
    alike = len(dtypes) == 1 and key.dtype in DTYPES
    near = all(t.stride(-1) == 1 for t in (*tensors, *(rotation or ())))
    if not (runs_triton(key) and alike and near and key.numel() and all(p.is_contiguous() for p in pools)):
        return False
    heads, turned = 0 if query is None else query.shape[1], 0 if rotation is None else rotation.cos.shape[1]
    shape = heads, key.shape[1:], value.shape[1:], turned, key.dtype

    def apart() -> float:
        return _place_apart(key, value, heads, turned)

    return trusted("rotation kernel", shape, key.device, apart, APART[key.dtype])


def _place_apart(key: Tensor, value: Tensor, heads: int, turned: int) -> float:
    """How far the kernel is from the same written out, on heads of a wider row as the models have them."""
    from proxytune.engine.fused.triton_rows import placed

    (_, kv_heads, dk), dv = key.shape, value.shape[2]
    sizes = heads * dk, kv_heads * dk, kv_heads * dv
    q, k, v = torch.split_with_sizes(_normal(key, TRIED, sum(sizes)), sizes, 1)
    q, k, v = q.view(TRIED, heads, dk), k.view(TRIED, kv_heads, dk), v.view(TRIED, kv_heads, dv)
    angles = _normal(key, TRIED, max(1, turned // 2)).repeat(1, 2)
    rotation = Rotation(angles.cos(), angles.sin()) if turned else None
    pools = [(key.new_zeros(1, 9, kv_heads, dk), key.new_zeros(1, 9, kv_heads, dv)) for _ in range(2)]
    slots = torch.tensor([4, 1, 8, 0, 3], device=key.device)
    got = placed(q if turned else None, k, v, rotation, pools[0], slots)
    _index(k if rotation is None else rotate(k.clone(), *rotation), v, pools[1], slots)
    found = [_far(mine, want) for mine, want in zip(*pools, strict=True)]
    return _worst(*found, *([] if rotation is None else [_far(got, rotate(q.clone(), *rotation))]))


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, both [..., N], where rows may lie in wider ones."""
    x, y = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    if not _gates(x, y, activation):
        return ACTIVATIONS[activation](gate) * up
    from proxytune.engine.fused.triton_rows import gated as launch

    return launch(x, y, list(ACTIVATIONS).index(activation)).view(gate.shape)


def _gates(gate: Tensor, up: Tensor, activation: str) -> bool:
    """Whether the kernel takes them, and was found to be right."""
    fits = gate.dtype == up.dtype and gate.dtype in DTYPES and gate.stride(-1) == up.stride(-1) == 1
    if not (runs_triton(gate) and fits and gate.numel()):
        return False

    def apart() -> float:
        from proxytune.engine.fused.triton_rows import gated as launch

        x, y = (_normal(gate, TRIED, 2 * gate.shape[1]) * 3).chunk(2, 1)
        got = launch(x, y, list(ACTIVATIONS).index(activation))
        return _far(got, ACTIVATIONS[activation](x) * y)

    shape = gate.shape[1], gate.dtype, activation
    return trusted("activation kernel", shape, gate.device, apart, APART[gate.dtype])


def _normal(like: Tensor, *shape: int) -> Tensor:
    draw = torch.Generator(like.device).manual_seed(0)
    return torch.randn(*shape, generator=draw, device=like.device).to(like.dtype)


def _far(got: Tensor, want: Tensor) -> float:
    """The largest difference, of large numbers as a share of them."""
    scale = want.double().abs().clamp(min=1)
    return float(((got.double() - want.double()).abs() / scale).max())


def _worst(*far: float) -> float:
    """The largest, or NaN where one is."""
    return max(far, key=lambda one: (one != one, one))
