"""The compiled parts: C++ on the CPU, Triton on CUDA, and what picks between them."""

from __future__ import annotations

from proxytune.engine.kernels import int4, int8
from proxytune.engine.kernels.cpu_attention import why_not
from proxytune.engine.kernels.linear import unpack_linears, use_row_linears
from proxytune.engine.kernels.norm import use_row_norms

__all__ = ["int4", "int8", "unpack_linears", "use_row_linears", "use_row_norms", "why_not"]
