"""Compiles the Triton kernels for GPUs that are not here: run by tests/test_kernels_compile.py, in a process
without the interpreter.

Prints one JSON object per case: the kernel, the target, and what ptxas and Triton say of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from proxytune.core import triton_attention

ATTEND = {
    "heads": "i32", "pages": "i32", "splits": "i32", "window": "i32", "scaling": "fp32", "softcap": "fp32",
    "table": "*i64", "lengths": "*i64", "sinks": "*bf16", "partial": "*fp32", "maxima": "*fp32",
    "sums": "*fp32",
}  # fmt: skip


def attend(dtype: str, new: int, group: int, key: int, value: int, **flags: bool) -> dict[str, Any]:
    """The arguments of one compilation of `_attend`, as its `launch` would give them."""
    import torch

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    key_pad, value_pad = (max(16, triton.next_power_of_2(n)) for n in (key, value))
    m, n, warps, stages = triton_attention.blocks(new, group, max(key_pad, value_pad), kinds[dtype])
    constants = {
        "GROUP": group, "QUERY": new, "PAGE": 16, "DK": key, "DK_PAD": key_pad, "DV": value, "DV_PAD": value_pad,
        "BLOCK_M": m, "BLOCK_N": n, "WINDOWED": False, "CAPPED": False, "SINKS": False, "DIRECT": False,
        "WIDEN": False, **flags,
    }  # fmt: skip
    return {"kernel": triton_attention._attend, "types": {**ATTEND, **dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")},
            "constants": constants, "warps": warps, "stages": stages}  # fmt: skip


def combine(dtype: str, splits: int) -> dict[str, Any]:
    """The same for `_combine`."""
    constants = {"QUERY": 5, "DV": 128, "DV_PAD": 128, "SPLITS_PAD": splits}
    types = {"heads": "i32", "splits": "i32", "out": f"*{dtype}"}
    types |= dict.fromkeys(("partial", "maxima", "sums"), "*fp32")
    return {"kernel": triton_attention._combine, "types": types, "constants": constants, "warps": 4, "stages": 3}


CASES = {
    "decode bf16 128": attend("bf16", 1, 8, 128, 128),
    "verify bf16 128, everything on": attend("bf16", 5, 4, 128, 128, WINDOWED=True, CAPPED=True, SINKS=True),
    "verify fp16 16 x 8, direct": attend("fp16", 16, 8, 128, 128, DIRECT=True),
    "decode bf16 80": attend("bf16", 1, 1, 80, 80),
    "verify bf16 192/128": attend("bf16", 16, 8, 192, 128),
    "verify bf16 256": attend("bf16", 16, 8, 256, 256),
    "decode fp32 128": attend("fp32", 1, 1, 128, 128),
    "verify fp32 256": attend("fp32", 16, 8, 256, 256),
    "combine bf16": combine("bf16", 128),
}


def build(name: str, capability: int) -> dict[str, Any]:
    """Compile one case. Registers and shared memory come from the cubin's metadata."""
    case = CASES[name]
    kernel = case["kernel"]
    signature = {a: case["types"].get(a, "i32") for a in kernel.arg_names}
    signature |= dict.fromkeys(case["constants"], "constexpr")
    # what the launcher finds out by itself: pointers are aligned, strides are multiples of 16
    strided = {a for a in kernel.arg_names if signature[a].startswith("*") or a[:2] in {"q_", "k_", "v_"}}
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in strided}
    source = ASTSource(kernel, signature, case["constants"], attributes)
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "name": name,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "tf32": "tf32" in ptx,
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "local": ptx.count("ld.local"),
        "cubin": len(compiled.asm["cubin"]),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for case in CASES:
            print(json.dumps(build(case, int(argument))), flush=True)
