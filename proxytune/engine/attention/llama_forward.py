"""The forward of a model of Llama's form without what transformers wraps around it.

On a CPU with a few rows, a step of a small model costs more for the calls around its products than for the
products: transformers spends a millisecond of every forward on masks, caches and outputs that we do not
use, and rotates queries and keys in ten operations per layer. Here the same modules are called one after the
other. Whether a model has the form is for `models/support.py` to try out: other models look alike from
outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxytune.engine.attention.attention import LayerCall, attend
from proxytune.engine.attention.packed import Packed
from proxytune.engine.cuda.attention import DevicePacked
from proxytune.engine.fused import Rotation
from proxytune.engine.kernels.cpu_rows import rotate


class Output(NamedTuple):
    """What a forward returns."""

    logits: Tensor
    """[1, K, V]."""


BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}

FIRST = 256
"""Positions whose rotation is computed at once; later twice as many as are needed."""


class LlamaForward(nn.Module):
    """Called as the model itself is in our forwards. Modules are looked up in every call, so that what is put
    in their place later (an adapter's layers) is used."""

    devices = frozenset({"cpu"})
    """Types of devices that it is made for."""

    def __init__(
        self,
        model: nn.Module,
        body: nn.Module,
        asked: Sequence[LayerCall],
        normed: Sequence[bool],
        window: int,
    ) -> None:
        """`asked` and `normed` are by layer: what it asks of attention, and whether it normalises queries and
        keys. `window`: most tokens that the model takes."""
        super().__init__()
        self.model, self.body = model, body
        self.asked, self.normed, self.window = asked, normed, window
        self.rotations: tuple[Tensor, Tensor] | None = None
        """Cosines and sines [P, R] of the first positions."""

    @classmethod
    def of(cls, model: nn.Module, asked: Sequence[LayerCall], window: int) -> LlamaForward | None:
        """None where the model consists of other parts, or does not lie on one device."""
        body = getattr(model, getattr(model, "base_model_prefix", ""), None)
        if not isinstance(body, nn.Module) or _parts(body) != BODY or not hasattr(model, "lm_head"):
            return None
        layers = list(body.layers)  # type: ignore[arg-type]
        inside = [_parts(layer.self_attn) for layer in layers if _parts(layer) == LAYER]
        fits = len(inside) == len(layers) and all(own in (ATTENTION, ATTENTION | NORMS) for own in inside)
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        simple = all(layer.plain for layer in asked) and len({layer.device for layer in asked}) == 1
        if not fits or not simple or watched or asked[0].device.type not in cls.devices:
            return None
        return cls(model, body, asked, [own >= NORMS for own in inside], window)

    def forward(
        self,
        *,
        position_ids: Tensor,  # [1, T]
        logits_to_keep: Tensor,  # [K]
        packed: Packed,
        input_ids: Tensor | None = None,  # [1, T]
        inputs_embeds: Tensor | None = None,  # [1, T, d]
        use_cache: bool = False,
    ) -> Output:
        """Logits after the tokens `logits_to_keep`, of ids or of embeddings; our cache is in `packed`, so
        `use_cache` (the model's own) is always off."""
        body: Any = self.body
        x = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = self._rotation(x, position_ids[0])
        for index, layer in enumerate(body.layers):
            x = self._attention(index, layer.self_attn, layer.input_layernorm(x), cos, sin, packed).add_(x)
            x = layer.mlp(layer.post_attention_layernorm(x)).add_(x)
        head: Any = self.model.lm_head
        return Output(head(body.norm(x.index_select(1, logits_to_keep))))

    def _rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, R] of positions [T], in the dtype of x."""
        need = int(positions.max()) + 1
        if self.rotations is None or len(self.rotations[0]) < need:
            most = max(need, self.window)  # beyond its window a model may turn otherwise
            turn: Any = self.body.rotary_emb
            cos, sin = turn(x, torch.arange(min(most, max(FIRST, 2 * need)))[None])
            self.rotations = cos[0], sin[0]
        cos, sin = self.rotations
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def _attention(
        self, index: int, module: Any, x: Tensor, cos: Tensor, sin: Tensor, packed: Packed
    ) -> Tensor:
        """[1, T, d] -> [1, T, d]."""
        asked, tokens = self.asked[index], x.shape[1]
        query = module.q_proj(x).view(tokens, -1, asked.shape.key)  # [T, H, Dk]
        key = module.k_proj(x).view(tokens, -1, asked.shape.key)
        value = module.v_proj(x).view(tokens, -1, asked.shape.value)
        if self.normed[index]:
            query, key = module.q_norm(query), module.k_norm(key)
        lines = rotate(query, cos, sin), rotate(key, cos, sin), value
        return self._attended(asked, module, lines, packed)

    def _attended(
        self,
        asked: LayerCall,
        module: Any,
        lines: tuple[Tensor, Tensor, Tensor],
        packed: Packed | DevicePacked,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Queries, keys and values [T, H, D] of a layer -> [1, T, d]. A `rotation` is still to be done."""
        query, key, value = (line.transpose(0, 1)[None] for line in lines)
        seen, _ = attend(
            module,
            query,
            key,
            value,
            None,
            scaling=asked.scaling,
            sliding_window=asked.window,
            packed=packed,
            rotation=rotation,
        )
        return module.o_proj(seen.reshape(1, seen.shape[1], -1))  # type: ignore[no-any-return]


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
