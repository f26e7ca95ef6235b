"""Micro-benchmarks of the CUDA kernels: what a GPU must show before the engine relies on it.

    python benchmarks/gpu_kernels.py [--quick]

prints one JSON object at the end, and each section on stderr when it is known. Sections, each under its own
key:
- `copy`: GB/s of a large copy, the floor that the rest is compared with;
- `linear`: the linear layers of 7B, 13B and 70B Llamas for 1, 2, 4, 8 and more rows, by cuBLAS in bfloat16
  and by the int8 layer: do k + 1 rows cost what one costs, and is int8 twice as fast?
- `attention`: GB/s of KV that the paged attention reads, decode and verify, by length and batch;
- `write`: what writing keys and values by index_copy_ costs beside that;
- `branches`: three models' layers in one graph, one after another and side by side;
- `features`: torch.mm(out_dtype=...) and varlen_attn with pages, or their error messages;
- `forward`: a Hugging Face Llama through the registered attention, captured in a CUDA graph: replayed logits
  against eager ones, and ms per step of both.

Times are medians over replays of CUDA graphs, so launches do not count; weights and KV exceed the L2 cache.
Nobody has run this on a GPU yet. It needs one: there is nothing to measure elsewhere. (It is not called
kernels.py because transformers would take that for the package of this name.)"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from proxytune.engine.kernels.int8 import Int8Linear
from proxytune.engine.kernels.paged_attention import gathered, paged_attention, supported, token_slots
from proxytune.engine.kernels.scores import ScoreRule

PAGE = 16
NAME = "proxytune_benchmark"
BEYOND_L2 = 256 * 2**20
"""Bytes that one replay reads at least, so that nothing is served from the cache of the one before."""
LAYERS = {  # hidden, query, key and value, feed-forward
    "7b": (4096, 4096, 4096, 11008),
    "13b": (5120, 5120, 5120, 13824),
    "70b": (8192, 8192, 1024, 28672),
}
HEADS = {"7b": (32, 32, 128), "13b": (40, 40, 128), "70b": (64, 8, 128)}


@dataclass
class Pages:
    """The KV of all layers in pages, and where the rows of one call are in it; everything on the device."""

    pools: list[tuple[Tensor, Tensor]]
    table: Tensor  # [R, P]
    lengths: Tensor  # [R], the new tokens included
    slots: Tensor  # [R * Q]

    def advance(self, new: int) -> None:
        """The next `new` tokens of every row, in place."""
        self.lengths += new
        self.slots.copy_(token_slots(self.table, self.lengths, new, PAGE, spare=0))


def attend(
    module: nn.Module,
    query: Tensor,  # [1, H, R * Q, Dk]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pages: Pages | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers calls: writes the new tokens to their pages and attends over them."""
    assert pages is not None
    keys, values = pages.pools[int(module.layer_idx)]  # type: ignore[arg-type]
    for pool, new in ((keys, key), (values, value)):
        pool.flatten(0, 1).index_copy_(0, pages.slots, new[0].transpose(0, 1))
    rows = pages.lengths.shape[0]
    q = query[0].reshape(query.shape[1], rows, -1, query.shape[-1]).transpose(0, 1)  # [R, H, Q, Dk]
    out = paged_attention(
        q,
        keys,
        values,
        pages.table,
        pages.lengths,
        ScoreRule(scaling, sliding_window, softcap, s_aux),
    )
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(NAME, attend)


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after it ran three times (compilation, workspaces)."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, times: int = 20) -> float:
    """Median milliseconds of one replay."""
    return event_ms(graph.replay, times)


def event_ms(work: Callable[[], Any], times: int = 20) -> float:
    """Median milliseconds between CUDA events around one call, after three that do not count."""
    found: list[float] = []
    for number in range(times + 3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        work()
        last.record()
        last.synchronize()
        if number >= 3:
            found.append(float(first.elapsed_time(last)))
    return statistics.median(found)


def copy_speed() -> float:
    """GB/s read and written together by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source)) / 1e6


def linear_speed(quick: bool) -> Iterator[dict[str, Any]]:
    """Every linear layer of a Llama by rows and kind of weight; as many copies as exceed the L2 cache."""
    for model, (hidden, query, kv, wide) in LAYERS.items():
        shapes = {"q": (query, hidden), "kv": (kv, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        for layer, (outputs, inputs) in shapes.items():
            if quick and layer != "up":
                continue
            copies = max(2, BEYOND_L2 // (outputs * inputs) + 1)
            plain = [
                nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
                for _ in range(copies)
            ]
            eight = [Int8Linear.of(one) for one in plain]
            for rows in (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64, 128):
                x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
                yield {
                    "model": model,
                    "layer": layer,
                    "rows": rows,
                    **one_linear("bf16", plain, x, outputs * inputs * 2),
                    **one_linear("int8", eight, x, outputs * inputs),
                }


def one_linear(kind: str, layers: Sequence[nn.Linear], x: Tensor, size: int) -> dict[str, float]:
    """Microseconds per layer and GB/s of its `size` bytes of weights."""

    def work() -> None:
        for layer in layers:
            layer(x)

    with torch.inference_mode():
        each = replay_ms(captured(work)) / len(layers)
    return {f"{kind}_us": each * 1e3, f"{kind}_gbps": size / each / 1e6}


def pages_for(
    rows: int, length: int, new: int, layers: int, kv_heads: int, size: int, dtype: torch.dtype
) -> Pages:
    """Random KV for rows of `length` tokens, scattered over the pool; the last `new` are the call's own."""
    width = -(-length // PAGE) + 1
    shape = (rows * width, PAGE, kv_heads, size)
    pools = [
        (torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape, device="cuda", dtype=dtype))
        for _ in range(layers)
    ]
    table = torch.randperm(rows * width, device="cuda").view(rows, width)
    lengths = torch.full((rows,), length, device="cuda")
    return Pages(pools, table, lengths, token_slots(table, lengths, new, PAGE, spare=0))


def attention_speed(quick: bool) -> Iterator[dict[str, Any]]:
    """The paged attention of one layer by the number of splits, over pools that exceed the L2 cache."""
    for model, (heads, kv_heads, size) in HEADS.items():
        for rows, length in ((1, 512), (8, 4096)) if quick else GRID:
            for new in (1, 5):
                per_pool = rows * length * kv_heads * size * 4
                p = pages_for(
                    rows, length, new, max(1, BEYOND_L2 // per_pool), kv_heads, size, torch.bfloat16
                )
                q = torch.randn(rows, heads, new, size, device="cuda", dtype=torch.bfloat16)
                assert supported(q, *p.pools[0])
                want = gathered(q, *p.pools[0], p.table, p.lengths)
                error = (paged_attention(q, *p.pools[0], p.table, p.lengths) - want).abs().max().item()
                found = {}
                for splits in (None, 1, 8, 32):
                    work = attention_calls(p, q, splits)
                    found[str(splits or "default")] = (
                        per_pool * len(p.pools) / replay_ms(captured(work)) / 1e6
                    )
                yield {
                    "model": model,
                    "rows": rows,
                    "length": length,
                    "new": new,
                    "gbps_by_splits": found,
                    "largest_difference": error,
                }
                del p, q, want


GRID = [(1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (64, 512), (64, 2048)]
"""Rows and length of the attention calls."""


def attention_calls(p: Pages, q: Tensor, splits: int | None) -> Callable[[], None]:
    """One call per pool."""

    def work() -> None:
        for keys, values in p.pools:
            paged_attention(q, keys, values, p.table, p.lengths, splits=splits)

    return work


def write_speed() -> Iterator[dict[str, Any]]:
    """Microseconds for one layer's keys and values, two index_copy_ in a graph."""
    for rows in (1, 8, 64):
        p = pages_for(rows, 512, 5, 1, 32, 128, torch.bfloat16)
        new = torch.randn(rows * 5, 32, 128, device="cuda", dtype=torch.bfloat16)

        def work(p: Pages = p, new: Tensor = new) -> None:
            for _ in range(100):
                for pool in p.pools[0]:
                    pool.flatten(0, 1).index_copy_(0, p.slots, new)

        yield {"rows": rows, "new": 5, "us_per_layer": replay_ms(captured(work)) * 10}


def branch_speed(quick: bool) -> dict[str, float]:
    """A chain of layers per model, 13B beside two of 7B, in one graph: in a row, and on three streams."""
    depth = 4 if quick else 10
    with torch.inference_mode():
        chains = []
        for model in ("13b", "7b", "7b"):
            hidden, _, _, wide = LAYERS[model]
            sizes = [(hidden, wide), (wide, hidden)] * depth
            chains.append(
                [nn.Linear(i, o, bias=False, device="cuda", dtype=torch.bfloat16) for i, o in sizes]
            )
        starts = [torch.randn(1, c[0].in_features, device="cuda", dtype=torch.bfloat16) for c in chains]
        streams = [torch.cuda.Stream() for _ in chains]  # type: ignore[no-untyped-call]

        def chain(number: int) -> None:
            x = starts[number]
            for layer in chains[number]:
                x = nn.functional.silu(layer(x))

        def serial() -> None:
            for number in range(len(chains)):
                chain(number)

        def parallel() -> None:
            here = torch.cuda.current_stream()
            for number, stream in enumerate(streams):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    chain(number)
            for stream in streams:
                here.wait_stream(stream)

        one, side_by_side = replay_ms(captured(serial)), replay_ms(captured(parallel))
    size = sum(layer.weight.nbytes for c in chains for layer in c)
    return {
        "serial_ms": one,
        "parallel_ms": side_by_side,
        "gain": one / side_by_side,
        "parallel_gbps": size / side_by_side / 1e6,
    }


@contextmanager
def noted(found: dict[str, Any], name: str) -> Iterator[None]:
    """Record that a feature works or what it raised: this is a probe, so every error is an answer."""
    try:
        yield
        found.setdefault(name, True)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def features() -> dict[str, Any]:
    """Whether torch has what the engine might use."""
    found: dict[str, Any] = {}
    a, b = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with noted(found, "mm_out_dtype_error"):
        out = torch.mm(a, b, out_dtype=torch.float32)
        found["mm_out_dtype_error"] = (out - a.float() @ b.float()).abs().max().item()
    with noted(found, "varlen_attn_paged_error"):
        from torch.nn.attention.varlen import varlen_attn

        p = pages_for(2, 60, 1, 1, 8, 128, torch.bfloat16)
        keys, values = p.pools[0]
        q = torch.randn(2, 32, 128, device="cuda", dtype=torch.bfloat16)
        attended = varlen_attn(
            q,
            keys,
            values,
            torch.arange(3, device="cuda", dtype=torch.int32),
            None,
            1,
            64,
            enable_gqa=True,
            window_size=(-1, 0),
            seqused_k=p.lengths.int(),
            block_table=p.table.int(),
        )
        want = paged_attention(q[:, :, None], keys, values, p.table, p.lengths)[:, :, 0]
        assert isinstance(attended, torch.Tensor)
        found["varlen_attn_paged_error"] = (attended - want).abs().max().item()
    return found


def forward_in_a_graph(quick: bool) -> dict[str, Any]:
    """Decode steps of a Llama with random weights through `attend`, eagerly and as replays of one graph."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4 if quick else 22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    rows, length, steps = 4, 100, 8
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation(NAME)
    ids = torch.randint(0, config.vocab_size, (1, rows), device="cuda")
    p = pages_for(rows, length + 64, 1, config.num_hidden_layers, 4, 64, torch.bfloat16)
    before = [(k.clone(), v.clone()) for k, v in p.pools]
    out = torch.empty(rows, config.vocab_size, device="cuda", dtype=torch.bfloat16)

    @torch.inference_mode()
    def step() -> None:
        """Feed each row's token, keep the logits, take the likeliest as the next: all on the device."""
        p.advance(1)
        positions = (p.lengths - 1)[None]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, pages=p).logits[0]
        out.copy_(logits)
        ids.copy_(logits.argmax(-1)[None])

    def restart() -> None:
        with torch.inference_mode():
            for (k, v), (old_k, old_v) in zip(p.pools, before, strict=True):
                k.copy_(old_k)
                v.copy_(old_v)
            p.lengths.fill_(length)
            ids.fill_(1)

    results = []
    graph = captured(step)
    for run in (step, graph.replay):
        restart()
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
        results.append((ids.clone(), out.clone()))
    (eager_ids, eager), (graph_ids, replayed) = results
    times = []
    for run in (step, graph.replay):
        restart()
        times.append(event_ms(run, times=20))
    return {
        "layers": config.num_hidden_layers,
        "rows": rows,
        "identical": bool(torch.equal(eager, replayed) and torch.equal(eager_ids, graph_ids)),
        "largest_difference": (eager.float() - replayed.float()).abs().max().item(),
        "eager_ms": times[0],
        "graph_ms": times[1],
        "graph_gbps": sum(p.nbytes for p in model.parameters()) / times[1] / 1e6,
    }


def environment() -> dict[str, str]:
    """Versions and the device."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run every section and print the JSON object. 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="few shapes, for a first look")
    options = parser.parse_args(arguments)
    if options.device == "cpu" or not torch.cuda.is_available():
        why = "--device cpu" if options.device == "cpu" else "no CUDA device"
        print(
            f"benchmarks/gpu_kernels.py: {why}: this measures kernels that run on a GPU only. "
            "Tests that need none: tests/engine/kernels/ (paged_attention, int8)",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": environment()}
    sections: dict[str, Callable[[], Any]] = {
        "copy": lambda: {"gbps": copy_speed()},
        "features": features,
        "forward": lambda: forward_in_a_graph(options.quick),
        "branches": lambda: branch_speed(options.quick),
        "write": lambda: list(write_speed()),
        "linear": lambda: list(linear_speed(options.quick)),
        "attention": lambda: list(attention_speed(options.quick)),
    }
    for name, section in sections.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        with noted(found, name):  # one section that fails must not hide the others' answers
            found[name] = section()
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)  # in case it is cut off
        torch.cuda.empty_cache()
    print(json.dumps(found, indent=1))
    return 0 if all(not isinstance(found[name], str) for name in sections) else 1


if __name__ == "__main__":
    raise SystemExit(main())
