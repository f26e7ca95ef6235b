"""The kernels and bytes of a step on CUDA, counted on `meta`."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from benchmarks import floor
from benchmarks.shapes import LLAMA_7B, LLAMA_13B, SHAPES, read_bytes
from proxytune.engine.cuda import FUSED_LAYER, OTHER_LAYER
from tests.support.require import require_or_skip

LAYERS = LLAMA_13B.layers + 2 * LLAMA_7B.layers


@pytest.fixture(autouse=True)
def _triton() -> None:
    if importlib.util.find_spec("triton") is None:
        require_or_skip("triton", "triton is not installed")


def test_kernels_of_a_step() -> None:
    """13B + 7B + 7B, one row. A layer has four products, two norms, a rotation with the cache's write, a
    gate, and attention in two kernels; one norm and one product more belong to every model."""
    kernels = floor.launches("13b+7b+7b", 1, 512, fused=True)
    assert kernels["mm"] == 4 * LAYERS + 3
    assert kernels["norm_kernel"] == 2 * LAYERS + 3
    for one in ("place_kernel", "gate_kernel", "attend_kernel", "combine_kernel"):
        assert kernels[one] == LAYERS
    assert kernels.total() <= 1230
    assert kernels.total() <= FUSED_LAYER * LAYERS
    before = floor.launches("13b+7b+7b", 1, 512, fused=False)
    assert before["mm"] == 7 * LAYERS + 3 and before["place_kernel"] == before["norm_kernel"] == 0
    assert kernels.total() + 3000 < before.total() <= OTHER_LAYER * LAYERS + 10


def test_8_bit_layers_are_counted() -> None:
    """Their products are launches of our kernel, joined as others are."""
    kernels = floor.launches("70b-int8+7b+7b", 1, 512, fused=True)
    assert kernels["linear_kernel"] == 4 * 80
    assert kernels["mm"] == 4 * 64 + 3


def test_bytes_of_a_step() -> None:
    """By hand: weights of 16 bits without the input embedding, and keys and values of every row."""
    for rows, context in ((1, 0), (4, 512)):
        total = 0
        for shape, models in ((LLAMA_13B, 1), (LLAMA_7B, 2)):
            layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
            weights = shape.layers * layer + shape.hidden + shape.vocabulary * shape.hidden
            kv = rows * context * 2 * shape.layers * shape.hidden
            total += models * 2 * (weights + kv)
        assert floor.step_bytes("13b+7b+7b", rows, context) == total
    small = floor.llama_on_meta(SHAPES["smoke"][0])
    with torch.device("cpu"):
        assert floor.own_bytes(small) == read_bytes(type(small)(small.config).to(floor.DTYPE))


def test_a_row_costs_no_kernel_and_a_gap_costs_time(capsys: pytest.CaptureFixture[str]) -> None:
    one, eight = (floor.launches("smoke", rows, 512, fused=True) for rows in (1, 8))
    assert one["mm"] == eight["mm"] and one["norm_kernel"] == eight["norm_kernel"]
    arguments = ["--shape", "smoke", "--json", "--bandwidth", "1000"]
    floor.main([*arguments, "--gap", "2"])
    plain, fused = json.loads(capsys.readouterr().out)
    assert fused["kernels"] == one.total() < plain["kernels"]
    for found in (plain, fused):
        assert found["expected_ms"] == pytest.approx(found["floor_ms"] + 2e-3 * found["kernels"])
        assert found["floor_ms"] == pytest.approx(found["gigabytes"])
        assert found["share"] == pytest.approx(found["floor_ms"] / found["expected_ms"])
    floor.main(["--shape", "smoke"])
    assert "| smoke | greedy | 1 | 512 | yes |" in capsys.readouterr().out
