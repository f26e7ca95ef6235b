"""A kernel is held against the same in torch before it is used, once per shape; a wrong one is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxytune.engine.kernels import int8, trial, triton_attention, triton_linear
from proxytune.engine.kernels import paged_attention as paged
from proxytune.engine.kernels.int8 import Int8Linear
from proxytune.engine.kernels.scores import ScoreRule


@pytest.fixture(autouse=True)
def _tried(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is outside tests of other things."""
    monkeypatch.setattr(paged, "trusted", trial.trusted)
    monkeypatch.setattr(int8, "trusted", trial.trusted)
    monkeypatch.setattr(trial, "_found", {})


def one_row(device: torch.device) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    pools = torch.randn(2, 3, 16, 1, 16, device=device)
    table, lengths = torch.tensor([[2, 0]], device=device), torch.tensor([20], device=device)
    return torch.randn(1, 2, 1, 16, device=device), *pools, table, lengths


def counted(patch: pytest.MonkeyPatch, module: Any, wrong: Callable[[Tensor], Tensor]) -> list[int]:
    launch, calls = module.launch, list[int]()

    def other(x: Tensor, *rest: Any) -> Tensor:
        calls.append(1)
        return wrong(launch(x, *rest))

    patch.setattr(module, "launch", other)
    return calls


def same(result: Tensor) -> Tensor:
    return result


def test_a_right_kernel_is_tried_once(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, arguments = counted(monkeypatch, triton_attention, same), one_row(kernels)
    want = paged.gathered(*arguments)
    for launches in (3, 4):
        torch.testing.assert_close(paged.paged_attention(*arguments), want)
        assert len(calls) == launches
    paged.paged_attention(*arguments, ScoreRule(window=5))  # another rule is tried for itself
    assert len(calls) == 7


def broken(result: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nRequired: much")


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "is off by": lambda result: result.roll(1, 0),
    "is off by nan": lambda result: result * float("nan"),
    "does not run .out of resource: shared memory.": broken,
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_attention_kernel_is_not_used(
    words: str, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, arguments = counted(monkeypatch, triton_attention, WRONG[words]), one_row(kernels)
    want = paged.gathered(*arguments)
    with pytest.warns(UserWarning, match=f"attention kernel {words}.*slower"):
        assert torch.equal(paged.paged_attention(*arguments), want)
    tried = len(calls)
    assert torch.equal(paged.paged_attention(*arguments), want) and len(calls) == tried


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_int8_kernel_is_not_used(
    words: str, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = Int8Linear.of(nn.Linear(32, 48, device=kernels))
    x = torch.randn(2, 32, device=kernels)
    want = x @ int8.dequantize(layer.weight, layer.weight_scale, torch.float32).T + layer.bias
    right = counted(monkeypatch, triton_linear, same)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x), want)
    assert len(right) == 3
    trial._found.clear()
    calls = counted(monkeypatch, triton_linear, WRONG[words])
    with pytest.warns(UserWarning, match=f"int8 kernel {words}.*slower"):
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x), want)
    assert len(calls) == 1


def test_memory_that_runs_out_says_nothing_of_a_kernel() -> None:
    def apart() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        trial.trusted("kernel", 1, torch.device("cpu"), apart, 1.0)
    assert trial.trusted("kernel", 1, torch.device("cpu"), lambda: 0.0, 1.0)
