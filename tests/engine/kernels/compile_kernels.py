"""Compiles the Triton kernels for GPUs that are not here: run by test_kernels_compile, in a process without
the interpreter.

Prints one JSON object per case: the kernel, the target, and what ptxas and Triton say of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proxytune.engine.cuda import triton_sampling
from proxytune.engine.fused import triton_rows
from proxytune.engine.kernels import triton_attention, triton_linear

SCALARS = {"scaling": "fp32", "softcap": "fp32", "eps": "fp32"}
KINDS = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: types of its pointers, its constants (scalars that are 1 too)."""

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


def attend(dtype: str, new: int, group: int, key: int, value: int, **constants: int | bool) -> Case:
    """`attend_kernel` as its `launch` would have it."""
    key_pad, value_pad = (max(16, triton.next_power_of_2(n)) for n in (key, value))
    m, n, warps, stages = triton_attention.blocks(new, group, max(key_pad, value_pad), KINDS[dtype])
    sizes = {"GROUP": group, "QUERY": new, "PAGE": 16, "DK": key, "DK_PAD": key_pad, "DV": value}
    flags = dict.fromkeys(("WINDOWED", "CAPPED", "SINKS", "DIRECT", "RAGGED", "WIDEN"), False)
    pointers = dict.fromkeys(("query", "keys", "values", "out", "sinks"), dtype)
    pointers |= dict.fromkeys(("table", "rows"), "i64")
    pointers |= dict.fromkeys(("partial", "maxima", "sums"), "fp32")
    return Case(
        triton_attention.attend_kernel,
        pointers,
        sizes | {"DV_PAD": value_pad, "BLOCK_M": m, "BLOCK_N": n} | flags | constants,
        warps,
        stages,
    )


def linear(
    dtype: str, rows: int, outputs: int, *, even: bool = True, biased: bool = False, inputs: int = 512
) -> Case:
    """`linear_kernel` likewise; with many inputs, of a layer whose inputs are shared out."""
    cut = triton_linear.blocks(rows, outputs, inputs, KINDS[dtype])
    constants = {"BLOCK_M": cut.rows, "BLOCK_N": cut.outputs, "BLOCK_K": cut.inputs}
    return Case(
        triton_linear.linear_kernel,
        {"x": dtype, "out": "fp32" if cut.splits > 1 else dtype, "bias": dtype}
        | {"weight": "i8", "scale": "fp32"},
        constants | {"EVEN": even, "BIASED": biased, "SPLIT": cut.splits > 1, "WIDEN": False},
        cut.warps,
        cut.stages,
    )


def added(dtype: str) -> Case:
    """`add_kernel` likewise."""
    pointers = {"parts": "fp32", "scale": "fp32", "bias": dtype, "out": dtype}
    return Case(triton_linear.add_kernel, pointers, {"BLOCK": triton_linear.ADDED, "BIASED": True}, 2, 3)


def combine(dtype: str, splits: int) -> Case:
    """`combine_kernel` likewise."""
    pointers = {**dict.fromkeys(("partial", "maxima", "sums"), "fp32"), "out": dtype}
    constants = {"DV": 128, "DV_PAD": 128, "SPLITS_PAD": splits}
    return Case(triton_attention.combine_kernel, pointers, constants, 4, 3)


def norm(dtype: str, size: int, *, added: bool = True, late: bool = False, shift: float = 0.0) -> Case:
    """`norm_kernel` likewise."""
    block = triton.next_power_of_2(size)
    constants: dict[str, Any] = {"SIZE": size, "BLOCK": block, "ADDED": added, "LATE": late, "SHIFT": shift}
    pointers = dict.fromkeys(("x", "residual", "weight", "total", "out"), dtype)
    return Case(triton_rows.norm_kernel, pointers, constants, triton_rows.norm_warps(block), 3)


def placed(dtype: str, key: int, value: int, turned: int) -> Case:
    """`place_kernel` likewise."""
    pointers = dict.fromkeys(("query", "key", "value", "cos", "sin", "turned", "keys", "values"), dtype)
    key_pad, value_pad = (triton.next_power_of_2(size) for size in (key, value))
    constants: dict[str, Any] = {"DK": key, "DK_PAD": key_pad, "DV": value, "DV_PAD": value_pad}
    constants |= {"TURNED": turned, "HALF": max(1, triton.next_power_of_2(turned // 2))}
    constants |= {"WIDE": triton_rows.wide(KINDS[dtype])}
    return Case(triton_rows.place_kernel, {**pointers, "slots": "i64"}, constants, 1, 3)


def gate(dtype: str, activation: int) -> Case:
    """`gate_kernel` likewise."""
    constants: dict[str, Any] = {"ACTIVATION": activation, "BLOCK": triton_rows.GATE_BLOCK}
    constants |= {"WIDE": triton_rows.wide(KINDS[dtype])}
    return Case(triton_rows.gate_kernel, dict.fromkeys(("gate", "up", "out"), dtype), constants, 4, 3)


def cutting() -> Case:
    """`cut_kernel` likewise."""
    types = {"logits": "fp32", "near": "fp32", "floors": "fp32", "lasts": "i32", "top_ks": "i64"}
    types |= dict.fromkeys(("temperatures", "top_ps", "min_ps"), "fp64")
    cut = triton_sampling.BLOCKS
    constants = {"BLOCK": cut.scanned, "FEW": cut.few, "NEAR": triton_sampling.NEAR}
    return Case(triton_sampling.cut_kernel, types, constants, cut.warps, 3)


def drawing(*, cuts: bool) -> Case:
    """`draw_kernel` likewise."""
    types = {"logits": "fp32", "temperatures": "fp64", "keys": "i64", "positions": "i64", "floors": "fp32"}
    types |= {"lasts": "i32", "bests": "fp64", "tokens": "i32"}
    constants: dict[str, Any] = {"BLOCK": triton_sampling.BLOCKS.drawn, "CUT": cuts}
    return Case(triton_sampling.draw_kernel, types, constants, 4, 3)


def settling() -> Case:
    """`settle_kernel` likewise."""
    types = {"bests": "fp64", "tokens": "i32", "out": "i64"}
    return Case(triton_sampling.settle_kernel, types, {"PARTS": 128}, 1, 3)


CASES = {
    "decode bf16 128": attend("bf16", 1, 8, 128, 128),
    "verify bf16 128, everything on": attend("bf16", 5, 4, 128, 128, WINDOWED=True, CAPPED=True, SINKS=True),
    "verify fp16 16 x 8, direct": attend("fp16", 16, 8, 128, 128, DIRECT=True),
    "decode bf16 80": attend("bf16", 1, 1, 80, 80),
    "verify bf16 192/128": attend("bf16", 16, 8, 192, 128),
    "verify bf16 256": attend("bf16", 16, 8, 256, 256),
    "decode fp32 128": attend("fp32", 1, 1, 128, 128),
    "verify fp32 256": attend("fp32", 16, 8, 256, 256),
    "scalars of 1, bf16": attend("bf16", 1, 1, 64, 64, heads=1, pages=1, splits=1, window=1, WINDOWED=True),
    "prefill bf16 128, tiles": attend("bf16", 64, 1, 128, 128, RAGGED=True, DIRECT=True),
    "prefill bf16 128, tiles of groups": attend("bf16", 8, 8, 128, 128, RAGGED=True),
    "prefill fp32 64, tiles": attend("fp32", 4, 4, 64, 64, RAGGED=True, WINDOWED=True),
    "combine bf16": combine("bf16", 128),
    "linear bf16 1 x 8192": linear("bf16", 1, 8192),
    "linear bf16 1 x 28672": linear("bf16", 1, 28672),
    "linear bf16 8 x 1024": linear("bf16", 8, 1024),
    "linear bf16 8 x 1024, inputs shared out": linear("bf16", 8, 1024, inputs=8192),
    "rows: parts of a linear layer, bf16": added("bf16"),
    "linear fp16 64 x 28672": linear("fp16", 64, 28672, biased=True),
    "linear bf16 64 x 1000, ragged": linear("bf16", 64, 1000, even=False),
    "linear fp32 64 x 28672": linear("fp32", 64, 28672),
    "rows: norm bf16 8192 of a sum": norm("bf16", 8192),
    "rows: norm fp16 128, late": norm("fp16", 128, added=False, late=True, shift=1.0),
    "rows: norm fp32 16384 of a sum": norm("fp32", 16384),
    "rows: rotation bf16 128": placed("bf16", 128, 128, 128),
    "rows: rotation fp64 80 of 96, 64": placed("fp64", 96, 64, 80),
    "rows: store bf16 192/128": placed("bf16", 192, 128, 0),
    "rows: silu bf16": gate("bf16", triton_rows.SILU),
    "rows: gelu fp64": gate("fp64", triton_rows.GELU_TANH),
    "rows: cut of a vocabulary": cutting(),
    "rows: draw after a cut": drawing(cuts=True),
    "rows: draw from all": drawing(cuts=False),
    "rows: settle a draw": settling(),
}


def resources(cubin: bytes) -> dict[str, str]:
    """Registers per thread and bytes of stack (spilled registers), by Triton's cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return dict(re.findall(r"(REG|STACK):(\d+)", text))


def build(name: str, capability: int) -> dict[str, Any]:
    """Compile one case. Shared memory, registers and spills say whether it can run well."""
    case = CASES[name]
    names = case.kernel.arg_names
    signature = {a: f"*{case.pointers[a]}" if a in case.pointers else SCALARS.get(a, "i32") for a in names}
    signature |= dict.fromkeys(case.constants, "constexpr")
    # what the launcher finds out by itself: pointers, strides and most sizes are multiples of 16
    even = {
        *case.pointers,
        *(a for a in names if a[:2] in {"q_", "k_", "v_", "x_"}),
        "inputs",
        "outputs",
        "span",
    }
    even -= set() if case.constants.get("EVEN", True) else {"inputs", "outputs", "x_row", "span"}
    hints = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if a in even - case.constants.keys()
    }
    options = {"num_warps": case.warps, "num_stages": case.stages}
    source = ASTSource(case.kernel, signature, case.constants, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    usage = resources(compiled.asm["cubin"])
    return {
        "name": name,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "tf32": "tf32" in ptx,
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for case in CASES:
            print(json.dumps(build(case, int(argument))), flush=True)
