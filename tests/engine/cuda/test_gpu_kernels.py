"""Kernels on a GPU, at real sizes and in CUDA graphs. Skips without CUDA; Triton's interpreter runs them on
the CPU elsewhere (test_paged_attention, test_int8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from proxytune.config import ModelSpec
from proxytune.engine.kernels import paged_attention as paged
from proxytune.engine.kernels.int8 import MOST_ROWS, Int8Linear, dequantize
from proxytune.engine.kv.pages import PAGE
from proxytune.models.loading import load_module
from proxytune.models.weight_only import random_int8
from tests.support import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""For values of about 1."""
SIZES = {  # query heads, KV heads, keys, values
    "7b": (32, 32, 128, 128),
    "70b": (64, 8, 128, 128),
    "80 wide": (32, 32, 80, 80),
    "deepseek": (16, 16, 192, 128),
    "gemma": (16, 8, 256, 256),
}


def pages(
    lengths: list[int], new: int, size: str, dtype: torch.dtype, longest: int | None = None
) -> dict[str, Any]:
    """Arguments of paged_attention on the GPU: rows scattered over a pool, tables for `longest` tokens."""
    heads, kv_heads, key, value = SIZES[size]
    width = -(-(longest or max(lengths)) // PAGE)
    pool = (len(lengths) * width, PAGE, kv_heads)
    return {
        "query": torch.randn(len(lengths), heads, new, key, device="cuda", dtype=dtype),
        "keys": torch.randn(*pool, key, device="cuda", dtype=dtype),
        "values": torch.randn(*pool, value, device="cuda", dtype=dtype),
        "table": torch.randperm(pool[0], device="cuda").view(len(lengths), width),
        "lengths": torch.tensor(lengths, device="cuda"),
    }


def sdpa(a: dict[str, Any]) -> Tensor:
    """The same by torch's attention, row by row in float64."""
    rows = []
    new = a["query"].shape[2]
    for query, table, length in zip(a["query"], a["table"], a["lengths"].tolist(), strict=True):
        k, v = (a[p][table].flatten(0, 1)[:length].transpose(0, 1).double() for p in ("keys", "values"))
        mask = torch.ones(new, length, dtype=torch.bool, device="cuda").tril(length - new)
        rows.append(scaled_dot_product_attention(query.double(), k, v, attn_mask=mask, enable_gqa=True))
    return torch.stack(rows)


def replayed(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`work` captured after a warm-up, and the tensor that replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("new", [1, 2, 5, 16])
@pytest.mark.parametrize("size", SIZES)
def test_paged_attention_is_sdpa(size: str, new: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = pages([16, 17, 300, 1000, 4096], new, size, dtype)
    assert paged.supported(a["query"], a["keys"], a["values"])
    want = sdpa(a)
    for splits in (None, 1, 7):
        got = paged.paged_attention(**a, splits=splits)
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_serves_every_length(dtype: torch.dtype) -> None:
    """Captured once with empty rows; lengths, pages and queries change in place between replays."""
    torch.manual_seed(0)
    a = pages([0, 0, 0], 5, "70b", dtype, longest=2048)
    graph, out = replayed(lambda: paged.paged_attention(**a))
    for lengths in ([5, 16, 2048], [700, 21, 33], [1500, 0, 6]):
        a["lengths"].copy_(torch.tensor(lengths))
        a["query"].normal_()
        a["table"].copy_(torch.randperm(a["table"].numel(), device="cuda").view_as(a["table"]))
        graph.replay()
        assert torch.equal(out, paged.paged_attention(**a))
        live = [row for row, length in enumerate(lengths) if length]
        one = {k: v[live] if k in {"query", "table", "lengths"} else v for k, v in a.items()}
        torch.testing.assert_close(
            out[live].double(), sdpa(one), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        assert not out[[row for row in range(3) if row not in live]].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4096, 11008), (8192, 1024), (5120, 13824), (1000, 333)], ids=str)
def test_int8_kernel_is_dequantised_matmul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """By the kernel up to MOST_ROWS rows, by cuBLAS beyond, eagerly and in a graph."""
    torch.manual_seed(0)
    layer = Int8Linear.of(nn.Linear(*shape, bias=False, device="cuda"))
    exact = dequantize(layer.weight, layer.weight_scale, torch.float64)
    for rows in (1, 2, 5, 16, 17, MOST_ROWS, MOST_ROWS + 1):
        x = torch.randn(rows, shape[0], device="cuda", dtype=dtype)
        with torch.inference_mode():
            got = layer(x)
            graph, out = replayed(lambda x=x: layer(x))  # type: ignore[misc]
            graph.replay()
        torch.testing.assert_close(
            got.double(), x.double() @ exact.T, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        if rows <= MOST_ROWS:  # cuBLAS may choose otherwise in a graph
            assert torch.equal(out, got)


def test_random_int8_model_never_holds_wide_weights() -> None:
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = random_int8(config, "cuda", dtype=torch.bfloat16)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert torch.cuda.max_memory_allocated() - before < size * 1.02
    logits = model(torch.arange(50, device="cuda")[None]).logits
    assert torch.isfinite(logits).all()


def test_int8_checkpoint_is_quantised_on_its_way(tmp_path: Path) -> None:
    """Peak memory while loading: the int8 model, one wide matrix, and what quantising a part of it takes."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    folder = tiny.save(tmp_path / "wide", tiny.build("llama", 1, **shape).bfloat16())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module = load_module(ModelSpec(model=str(folder), dtype="bfloat16", quantization="int8"))
    size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    matrix = 1024 * 4096
    assert torch.cuda.max_memory_allocated() - before < size * 1.02 + 2 * matrix + 4 * 4 * matrix
    assert size < 0.6 * 2 * sum(p.numel() for p in module.parameters())
