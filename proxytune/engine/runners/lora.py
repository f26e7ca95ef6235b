"""LoRA adapters that act on a contiguous span of a packed forward: models that differ by an adapter run
together on one set of weights.

y = W x, and on the adapter's tokens y += scale * B (A x) (Hu et al. 2022, eq. 3), unmerged and unrounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from proxytune.engine.kernels.wide_head import wide_product


@dataclass(eq=False)
class SharedLora:
    """Where in the coming forward each adapter acts: one object for all layers of one model."""

    spans: dict[str, slice] = field(default_factory=dict)
    tokens: int = 0

    def place(self, spans: Mapping[str, slice], tokens: int) -> None:
        """The coming forward has so many tokens; each named adapter acts on its span of them."""
        self.spans, self.tokens = dict(spans), tokens


class SpanMismatch(RuntimeError):
    """A layer with an adapter does not see the tokens of the forward in a row (an expert of a mixture)."""


class SpanLora(nn.Module):
    """A linear layer with adapters, each active on its own span of the tokens."""

    def __init__(self, linear: nn.Module, shared: SharedLora) -> None:
        """`linear` maps [..., T, in] to [..., T, out]; it may be quantised."""
        super().__init__()
        self.linear, self.shared = linear, shared
        self.adapters: dict[str, tuple[Tensor, Tensor, float]] = {}

    def add(self, name: str, down: Tensor, up: Tensor, scale: float) -> None:
        """Adapter `name`: A [r, in], B [out, r] and its scale."""
        self.adapters[name] = down, up, scale

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, in] -> [1, T, out]."""
        y: Tensor = self.linear(x)
        tokens_in, tokens_out = x.flatten(0, -2), y.view(-1, y.shape[-1])  # [T, in], [T, out]
        for name, span in self.shared.spans.items():
            if name in self.adapters:
                if len(tokens_in) != self.shared.tokens:
                    raise SpanMismatch(
                        f"a layer with adapter '{name}' sees {len(tokens_in)} of {self.shared.tokens} tokens"
                    )
                down, up, scale = self.adapters[name]
                low = tokens_in[span] @ down.T
                if y.dtype == up.dtype:
                    tokens_out[span].addmm_(low, up.T, alpha=scale)
                else:  # an output head with wide logits
                    tokens_out[span].add_(wide_product(low, up), alpha=scale)
        return y
