"""What the CPU path chooses between, timed: linear layers by shape and rows, attention of a few queries.

    python benchmarks/cpu_kernels.py                about two minutes on 2 cores
    python benchmarks/cpu_kernels.py --calls 3      fewer calls

The weights of a product are as many copies as exceed the cache together, read in turn, as a model's layers
are. `engine/kernels/linear.py` and `engine/attention/attention.py` choose by sizes alone; their thresholds
come from here."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.tables import markdown
from proxytune.engine.attention.attention import written_out
from proxytune.engine.kernels.cpu_attention import attend_slots, why_not
from proxytune.engine.kernels.linear import LIGHT, ONEDNN, TYPICAL, RowLinear
from proxytune.engine.kernels.scores import ScoreRule

SHAPES: tuple[tuple[int, int], ...] = (
    *((256, 256), (672, 256), (1538, 256)),
    *((384, 384), (1024, 384), (32000, 384)),
    *((768, 768), (2048, 768), (768, 2048)),
    (4096, 4096),
)
"""[out, in] of the demo's base, of the random trio, and of a 7B model's projections."""
ROWS = (1, 2, 4, 16, 64, 256)
BEYOND_CACHE = 100_000_000
"""Bytes of weights read in turn."""
QUERIES = ((1, 4, 64, 250), (16, 4, 64, 250), (128, 4, 64, 170), (128, 4, 16, 170), (32, 12, 64, 100))
"""Rows, heads, head size and keys."""

Way = Callable[[], object]


def medians(ways: Mapping[str, Way], calls: int) -> dict[str, float]:
    """Median seconds of each, called in turn after one call as a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(calls + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if call:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def linears(calls: int) -> str:
    """Microseconds per product, one line per shape and number of rows."""
    lines = []
    for out, inner in SHAPES:
        count = max(1, BEYOND_CACHE // (out * inner * 4))
        layers = [nn.Linear(inner, out, bias=False) for _ in range(count)]
        for rows in ROWS:
            found = medians(_ways(layers, torch.randn(1, rows, inner)), calls)
            best = min(time for name, time in found.items() if name != "chosen")
            times = [f"{time / count * 1e6:.0f}" for time in found.values()]
            lines.append((f"{out} x {inner}", str(rows), *times, f"{found['chosen'] / best:.2f}"))
    heads = ("weights", "rows", "torch's linear", "W @ x.T", "oneDNN", "oneDNN, its layout")
    return markdown((*heads, "RowLinear", "of the best"), lines)


def _ways(layers: Sequence[nn.Linear], x: Tensor) -> dict[str, Way]:
    assert ONEDNN is not None, "this build of torch lacks oneDNN's linear kernel"
    kernel, reorder = ONEDNN
    weights = [layer.weight for layer in layers]
    packed = [reorder(weight, TYPICAL) for weight in weights]
    chosen = [RowLinear.over(layer) for layer in layers]
    for layer in chosen:
        if layer.weight.numel() >= LIGHT:
            layer.pack()
    columns = (x[0] if x.shape[1] > 1 else x[0].expand(2, -1).contiguous()).T
    return {
        "torch": lambda: [linear(x, w) for w in weights],
        "right": lambda: [(w @ columns).T.contiguous() for w in weights],
        "onednn": lambda: [kernel(x, w, None, "none", [], "") for w in weights],
        "packed": lambda: [kernel(x, w, None, "none", [], "") for w in packed],
        "chosen": lambda: [layer(x) for layer in chosen],
    }


def attention(calls: int) -> str:
    """Milliseconds per call, one line per batch and number of queries."""
    lines = []
    for rows, heads, size, length in QUERIES:
        slots = [[torch.randn(rows, heads, 2 * length, size) for _ in "kv"] for _ in range(3)]
        pools = [[slot[:, :, :length] for slot in pair] for pair in slots]
        for queries in (1, 2, 4, 8):
            q, mask = torch.randn(rows, heads, queries, size), torch.zeros(rows, 1, queries, length)
            mask[..., -3:] = -1.0

            def fused(q: Tensor = q, mask: Tensor = mask, pools: list[list[Tensor]] = pools) -> None:
                for keys, values in pools:
                    scaled_dot_product_attention(q, keys, values, attn_mask=mask)

            def products(q: Tensor = q, mask: Tensor = mask, pools: list[list[Tensor]] = pools) -> None:
                for keys, values in pools:
                    written_out(q, keys, values, mask, None)

            kernel = _by_kernel(q, slots, length)
            found = medians({"fused": fused, "products": products, "kernel": kernel}, calls)
            times = [f"{time / len(pools) * 1e3:.2f}" for time in found.values()]
            lines.append((str(rows), f"{heads} x {size}", str(length), str(queries), *times))
    return markdown(("rows", "heads", "keys", "queries", "SDPA", "two products", "our kernel"), lines)


def _by_kernel(q: Tensor, slots: Sequence[Sequence[Tensor]], length: int) -> Way:
    """Queries [R, H, q, D] over the first `length` keys of slots [R, H, .., D]; the last are written too."""
    rows, heads, queries, size = q.shape
    tokens = q.transpose(0, 1).reshape(heads, rows * queries, size)
    parts = torch.tensor([(row, row * queries, queries, length) for row in range(rows)]).T.contiguous()
    out = torch.empty(rows * queries, heads, size)

    def run() -> None:
        for keys, values in slots:
            attend_slots(
                tokens,
                tokens,
                tokens,
                (keys, values),
                parts,
                out,
                ScoreRule(),
                queries,
            )

    return run


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--calls", type=int, default=9, help="timed calls of each way (default 9)")
    calls = parser.parse_args(arguments).calls
    if (reason := why_not()) is not None:
        sys.exit(f"there is no kernel to be timed: {reason}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n", flush=True)
    print(f"Microseconds per product:\n\n{linears(calls)}\n", flush=True)
    print(f"Milliseconds per attention call:\n\n{attention(calls)}")


if __name__ == "__main__":
    main()
