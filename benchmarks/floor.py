"""What a decoding step on CUDA cannot be faster than, and what its kernels add: bytes and kernels, counted.

    python benchmarks/floor.py                          every shape, one row
    python benchmarks/floor.py --shape 13b+7b+7b --rows 8 --context 2048
    python benchmarks/floor.py --work cut               a step with top-p
    python benchmarks/floor.py --work prefill           prompts of --context tokens
    python benchmarks/floor.py --json

No GPU is needed, and nothing is timed. A step is run at its real sizes on torch's `meta` device, which has
shapes and no values. Every operation that is no view counts as one kernel, and so does every launch of a
Triton kernel. Bytes are those that the forwards read: weights once each, and keys and values. What a kernel
costs beside the bytes that it moves is an assumption (`GAP`), and so is the bandwidth: hold measurements
against the counts, and put measured numbers in with --bandwidth and --gap."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.shapes import SHAPES, TRIO, WINDOW, Shape, kv_bytes_per_token
from proxytune.engine.attention import NAME, FusedForward, varlen
from proxytune.engine.attention.attention import LayerCall
from proxytune.engine.cuda import triton_sampling
from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.cuda.state import DeviceBatch, DeviceState, Widths
from proxytune.engine.cuda.step import DeviceStep
from proxytune.engine.ensemble import Ensemble, Term
from proxytune.engine.fused import modules, triton_rows, use_device_kernels
from proxytune.engine.fused.rows import NORM_KINDS
from proxytune.engine.kernels import triton_attention, triton_linear
from proxytune.engine.kernels.int8 import Int8Linear
from proxytune.engine.kernels.wide_head import WideHead
from proxytune.engine.kv import CacheSpec, LayerShape
from proxytune.engine.kv.pages import PAGE, PagedCache
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners import ModelRunner, Runner, VocabMap
from proxytune.engine.runners.runner import forward_all
from proxytune.engine.speculative.draft_length import Ahead

META = torch.device("meta")
DTYPE = torch.bfloat16
BANDWIDTH = 4.3e12
"""Bytes per second: what a large copy on an H200 was planned with."""
GAP = 1.5e-6
"""Seconds that a kernel in a replayed graph takes beside the time of its bytes: assumed, not measured."""
TOKENS = 1 << 20
"""Tokens of a cache that takes no memory."""
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "lift_fresh", "alias"}
"""Operations that launch nothing, and are no views to torch."""
PRODUCTS = {"mm", "addmm", "bmm", "linear_kernel"}
TRITON = (triton_rows, triton_attention, triton_linear, triton_sampling)
ROOMS = ("fused.rows", "cuda.sampling", "kernels.paged_attention", "kernels.int8")
"""Modules of the engine that ask whether a Triton kernel can run; the first two of them, for few kernels."""
TRIED = (*ROOMS, "attention.over_pages", "attention.varlen")
"""Modules that ask whether one is right."""
STEPS = {
    "greedy": SamplingNeeds(False, False),
    "sampled": SamplingNeeds(True, False),
    "cut": SamplingNeeds(True, True),
}
"""How tokens are chosen: the largest logits, a sample, or a sample of what top-p and the like leave."""


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # an operation that is made of others counts as these
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and name not in FREE:
            self.kernels[name] += 1
        return out


class Stub:
    """A Triton kernel that is counted in place of being launched."""

    def __init__(self, name: str, kernels: Counter[str]) -> None:
        self.name, self.kernels = name, kernels

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launched(*given: object, **named: object) -> None:
            self.kernels[self.name] += 1

        return launched


@dataclass(frozen=True)
class Floor:
    """One step of a trio: what it reads, what it launches, and how long that takes at least."""

    shape: str
    work: str
    """greedy, sampled or cut: a decoding step; prefill: a prompt of each row."""
    rows: int
    context: int
    fused: bool
    gigabytes: float
    kernels: int
    products: int
    floor_ms: float
    """Of the bytes alone."""
    expected_ms: float
    share: float
    """The floor's share of what is expected."""


class Priced(NamedTuple):
    """What time is reckoned with."""

    bandwidth: float = BANDWIDTH
    gap: float = GAP


PRICED = Priced()


def floor(
    name: str, rows: int, context: int, work: str = "greedy", *, fused: bool, priced: Priced = PRICED
) -> Floor:
    """The floor of one decoding step without drafts, or of the prefill of rows of so many tokens. `fused`:
    with the kernels of `engine/fused` and of `cuda/triton_sampling`."""
    kernels = launches(name, rows, context, work, fused=fused)
    size = step_bytes(name, rows, context)
    total, least = kernels.total(), size / priced.bandwidth
    expected = least + total * priced.gap
    products = sum(count for kernel, count in kernels.items() if kernel in PRODUCTS)
    return Floor(
        *(name, work, rows, context, fused, size / 1e9, total, products),
        *(least * 1e3, expected * 1e3, least / expected),
    )


def step_bytes(name: str, rows: int, context: int) -> int:
    """Bytes that the three forwards of a step read."""
    large, small = SHAPES[name]
    models = [llama_on_meta(shape) for shape in (large, small)]
    each = [own_bytes(model) + rows * context * kv_bytes_per_token(model) for model in models]
    return each[0] + 2 * each[1]


def own_bytes(model: PreTrainedModel) -> int:
    """`read_bytes` of a model on meta, where nothing has an address."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if head is table else int(total - table.nbytes)


def launches(name: str, rows: int, context: int, work: str = "greedy", *, fused: bool) -> Counter[str]:
    """How often every kernel is launched in one step, or in one prefill."""
    large, small = SHAPES[name]
    with ExitStack() as stack:
        mode = Launches()
        for place in on_cuda(mode.kernels, fused=fused):
            stack.enter_context(place)
        runners = {str(role): runner(large if role == "base" else small, fused) for role in TRIO}
        if work == "prefill":
            prompts = Work([Segment(row, (0,) * context) for row in range(rows)], ())
            for one in runners.values():
                for _ in range(rows):
                    one.rows.admit()
                one.rows.reserve([context] * rows)
            with mode:
                forward_all(dict[str, Runner](runners), dict.fromkeys(runners, prompts))
            return mode.kernels
        ensemble = Ensemble(dict[str, Runner](runners), "base", (Term("expert", "antiexpert", 1.0),))
        step = DeviceStep(ensemble.runners, (), "base", ensemble.combine)
        batch = batch_on_meta(runners, rows, context, large.vocabulary)
        mode.kernels.clear()
        with mode:
            step(batch, Ahead(0), STEPS[work]).packed()
    return mode.kernels


def on_cuda(kernels: Counter[str], *, fused: bool) -> Iterator[Any]:
    """What makes `meta` look like a GPU. There nothing can be tried out, so what modules are is said."""
    engine = "proxytune.engine"
    for room in ROOMS[0 if fused else 2 :]:
        yield patch(f"{engine}.{room}.runs_triton", lambda tensor: True)
    for room in TRIED:
        yield patch(f"{engine}.{room}.trusted", lambda *given: True)
    yield patch.object(varlen, "there", lambda query: True)
    yield patch(f"{engine}.kernels.wide_head.wide_product", wide_product)
    for module in TRITON:
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            yield patch.object(module, kernel, Stub(kernel, kernels))
    if fused:
        yield patch.object(modules, "DEVICES", {"meta"})
        yield patch.object(modules, "norm_kind", lambda m: NORM_KINDS[0] if called(m, "RMSNorm") else None)
        yield patch.object(modules, "gate_kind", lambda m, dtype: "silu" if called(m, "MLP") else None)


def called(module: nn.Module, name: str) -> bool:
    """Whether a module is Llama's of that kind."""
    return type(module).__name__ == f"Llama{name}"


def wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An output head as CUDA has it: one kernel."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def llama_on_meta(shape: Shape) -> PreTrainedModel:
    """A Llama without values."""
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config(WINDOW), dtype=DTYPE)
    if shape.int8:
        for path, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and path != "lm_head":
                parent, _, own = path.rpartition(".")
                eight = Int8Linear(layer.in_features, layer.out_features, bias=None, device=META)
                setattr(model.get_submodule(parent), own, eight)
    model.lm_head = WideHead.over(model.lm_head)
    return model.eval().requires_grad_(False)


def runner(shape: Shape, fused: bool) -> ModelRunner:
    """One model with a paged cache, as `Models` makes it on a GPU."""
    model, size = llama_on_meta(shape), shape.hidden // shape.heads
    model.set_attn_implementation(NAME)
    model.config.pad_token_id = None
    layer = LayerShape(shape.kv_heads, size, size)
    cache = PagedCache(CacheSpec((layer,) * shape.layers, TOKENS, DTYPE, (META,) * shape.layers))
    forward: Any = model
    if fused:
        use_device_kernels(model)
        asked = [LayerCall(layer, META, DTYPE, size**-0.5, None, True)] * shape.layers
        forward = FusedForward(model, model.model, asked, [False] * shape.layers, WINDOW)
    return ModelRunner(forward, cache, VocabMap(shape.vocabulary), WINDOW, META)


def batch_on_meta(runners: dict[str, ModelRunner], rows: int, context: int, vocabulary: int) -> DeviceBatch:
    """The state of so many rows, with pages for the context."""
    caches: Any = {name: runner.cache for name, runner in runners.items()}
    widths = Widths(pages=-(-context // PAGE), eos=1)
    state = DeviceState(caches, "base", rows, widths, vocabulary, torch.device("cpu"))
    batch: DeviceBatch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), state.views(rows))
    return batch


def as_text(found: Sequence[Floor]) -> str:
    """A table."""
    lines = [
        "| shape | work | rows | context | fused | GB | kernels | products "
        "| floor, ms | expected, ms | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {f.shape} | {f.work} | {f.rows} | {f.context} | {'yes' if f.fused else 'no'} | {f.gigabytes:.1f} "
        f"| {f.kernels:,} | {f.products:,} | {f.floor_ms:.2f} | {f.expected_ms:.2f} | {f.share:.0%} |"
        for f in found
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: the large ones")
    works = [*STEPS, "prefill"]
    parser.add_argument("--work", choices=works, default="greedy", help="a step, by its sampling; a prefill")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH / 1e9, help="GB/s")
    parser.add_argument("--gap", type=float, default=GAP * 1e6, help="microseconds that a kernel adds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    priced = Priced(options.bandwidth * 1e9, options.gap / 1e6)
    found = [
        floor(name, options.rows, options.context, options.work, fused=fused, priced=priced)
        for name in options.shape or list(SHAPES)[:3]
        for fused in (False, True)
    ]
    print(json.dumps([asdict(f) for f in found], indent=1) if options.json else as_text(found))


if __name__ == "__main__":
    main()
