"""The compiled parts: C++ on the CPU, Triton on CUDA, and what picks between them."""

from __future__ import annotations

from proxytune.engine.kernels import int4, int8
from proxytune.engine.kernels.cpu_attention import why_not
from proxytune.engine.kernels.linear import dense, show_weights, use_row_linears
from proxytune.engine.kernels.norm import use_row_norms
from proxytune.engine.kernels.wide_head import use_wide_head

__all__ = [
    "dense",
    "int4",
    "int8",
    "show_weights",
    "use_row_linears",
    "use_row_norms",
    "use_wide_head",
    "why_not",
]
