"""`LlamaForward` for CUDA: between a layer's four products there are four small kernels and attention, where
transformers' modules make thirty-six with it.

A residual is added by the norm that follows, queries and keys are rotated by the kernel that stores keys and
values, and products of one input are one where their weights lie together. Nothing is read by the host, so
that a CUDA graph takes it. Where a kernel does not run, torch computes the same in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from proxytune.engine.attention.llama_forward import LlamaForward, Output
from proxytune.engine.attention.packed import Packed
from proxytune.engine.cuda.attention import DevicePacked
from proxytune.engine.fused import DeviceNorm, Rotation, joint


class FusedForward(LlamaForward):
    """Called as the model itself is in our forwards."""

    devices = frozenset({"cuda"})

    def forward(
        self,
        *,
        position_ids: Tensor,  # [1, T]
        logits_to_keep: Tensor | int,  # [K], or 0 for all
        packed: Packed | DevicePacked,
        input_ids: Tensor | None = None,  # [1, T]
        inputs_embeds: Tensor | None = None,  # [1, T, d]
        use_cache: bool = False,
    ) -> Output:
        """Logits after the tokens `logits_to_keep`, of ids or of embeddings."""
        body: Any = self.body
        x = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = body.rotary_emb(x, position_ids)
        rotation = Rotation(cos[0], sin[0])
        total, new = x, None
        for index, layer in enumerate(body.layers):
            normed, total = _normed(layer.input_layernorm, new, total)
            new = self._attend(index, layer.self_attn, normed, rotation, packed)
            normed, total = _normed(layer.post_attention_layernorm, new, total)
            new = layer.mlp(normed)
        if isinstance(logits_to_keep, Tensor):
            total = total.index_select(1, logits_to_keep)
            new = None if new is None else new.index_select(1, logits_to_keep)
        head: Any = self.model.lm_head
        return Output(head(_normed(body.norm, new, total)[0]))

    def _attend(
        self, index: int, module: Any, x: Tensor, rotation: Rotation, packed: Packed | DevicePacked
    ) -> Tensor:
        """[1, T, d] -> [1, T, d]."""
        asked, tokens = self.asked[index], x.shape[1]
        found = joint((module.q_proj, module.k_proj, module.v_proj), x[0])
        sizes = asked.shape.key, asked.shape.key, asked.shape.value
        query, key, value = (t.reshape(tokens, -1, size) for t, size in zip(found, sizes, strict=True))
        if self.normed[index]:
            query, key = module.q_norm(query), module.k_norm(key)
        return self._attended(asked, module, (query, key, value), packed, rotation)


def _normed(norm: Any, new: Tensor | None, total: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of what a layer adds and the sum so far, and their sum."""
    if new is None:
        return norm(total), total
    if isinstance(norm, DeviceNorm):
        return norm.of_sum(new, total)
    total = new + total
    return norm(total), total
