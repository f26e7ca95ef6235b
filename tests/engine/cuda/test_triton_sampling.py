"""The kernels that draw tokens leave what `logits.warp` leaves, and draw what is drawn without them.

Where there is no GPU, Triton's interpreter runs them on CPU tensors: a second for two or three rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune.engine.cuda import sampling
from proxytune.engine.cuda.sampling import DrawSettings, Sampler, SamplingNeeds, drawn
from proxytune.engine.logits import warp

MINUS = float("-inf")


def settings_of(*rows: tuple[float, float, float, int], seed: int = 0) -> DrawSettings:
    """Temperature, top-p, min-p and top-k by row, as columns of wider tensors."""
    real = torch.tensor([[0.0, *row[:3], 0.0] for row in rows], dtype=torch.float64)
    whole = torch.tensor([[0, row[3], 7919 * (n + 31 * seed) - 2**62] for n, row in enumerate(rows)])
    return DrawSettings(real[:, 1], real[:, 2], real[:, 3], whole[:, 1], whole[:, 2])


def compare_cuts(logits: Tensor, settings: DrawSettings, device: torch.device, **blocks: int) -> None:
    """What is left of every row, token by token."""
    from proxytune.engine.cuda.triton_sampling import BLOCKS, left

    there = DrawSettings(*(column.to(device) for column in settings))
    floors, lasts = (t.cpu()[:, None] for t in left(logits.to(device), there, 1, BLOCKS._replace(**blocks)))
    temperature, top_p, min_p, top_k, _ = settings
    scaled = logits / temperature.float()[:, None]
    at = torch.arange(logits.shape[1])
    kept = ((scaled > floors) | ((scaled == floors) & (at <= lasts))) & (scaled > MINUS)
    want = warp(logits, temperature, top_k, top_p, min_p) > MINUS
    for row in range(len(logits)):
        differ = (kept[row] != want[row]).nonzero().flatten().tolist()
        assert not differ, (row, [float(column[row]) for column in settings], differ[:5])


TIED = torch.tensor([2.0, 1.0, 2.0, 1.0, 0.0, 1.0, -0.0, 0.0, MINUS, 1.0])
PEAKED = torch.tensor([9.0, *[-20.0 - n / 8 for n in range(30)]])
CASES: dict[str, tuple[Tensor, tuple[float, float, float, int]]] = {
    "top-k, ties stay": (TIED, (1.0, 1.0, 0.0, 4)),
    "top-k of all": (TIED, (0.5, 1.0, 0.0, 10)),
    "top-k of more than there are": (TIED, (1.0, 1.0, 0.0, 99)),
    "top-p, ties are cut by their ids": (TIED, (1.0, 0.7, 0.0, 0)),
    "top-p just at a border": (torch.zeros(8), (1.0, 0.5, 0.0, 0)),
    "top-p among zeros of two signs": (torch.tensor([0.0, -0.0] * 5), (1.0, 0.55, 0.0, 0)),
    "top-p that leaves one": (PEAKED, (1.0, 0.1, 0.0, 0)),
    "top-p that reaches far down": (PEAKED, (3.0, 1 - 1e-5, 0.0, 0)),
    "min-p": (TIED, (1.5, 1.0, 0.4, 0)),
    "min-p, top-k and top-p": (TIED, (0.7, 0.8, 0.05, 6)),
    "top-k, then top-p": (TIED, (2.0, 0.6, 0.0, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_cuts(name: str, kernels: torch.device) -> None:
    """Where the floor is looked for near the largest."""
    logits, row = CASES[name]
    compare_cuts(logits[None], settings_of(row), kernels, scanned=16, few=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cuts_among_all(name: str, kernels: torch.device) -> None:
    """Where too many are near the largest."""
    logits, row = CASES[name]
    compare_cuts(logits[None], settings_of(row), kernels, scanned=16, few=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_cuts(seed: int, kernels: torch.device) -> None:
    draw, rows = torch.Generator().manual_seed(seed), 12

    def one_of(*values: float) -> float:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    size = int(one_of(31, 300, 1000))
    logits = torch.randn(rows, size, generator=draw) * one_of(0.1, 1, 4, 10)
    if seed % 3 == 0:
        logits = (logits * 2).round() / 2
    logits[:, int(one_of(3, 7, 30))] = MINUS
    settings = settings_of(
        *(
            (one_of(0.3, 1, 1.7), one_of(0.2, 0.7, 0.95, 0.999, 1), one_of(0, 0, 0.02, 0.3), int(k))
            for k in torch.randint(0, 60, (rows,), generator=draw) * (torch.rand(rows, generator=draw) < 0.6)
        )
    )
    compare_cuts(logits, settings, kernels, scanned=128, few=64)


@pytest.mark.parametrize("queries", [1, 2])
def test_draws_without_cuts(queries: int, kernels: torch.device) -> None:
    """Noise by position, greedy rows beside others, the first of equal logits, a part that is not full."""
    from proxytune.engine.cuda.triton_sampling import BLOCKS, draw

    logits = torch.randn(3, queries, 500, generator=torch.Generator().manual_seed(1)).round()
    settings = settings_of((0.0, 1, 0, 0), (1.0, 1, 0, 0), (0.3, 1, 0, 0), seed=queries)
    positions = torch.arange(3 * queries).view(3, queries) * 1001
    there = DrawSettings(*(column.to(kernels) for column in settings))
    found = draw(
        logits.to(kernels), positions.to(kernels), there, cuts=False, blocks=BLOCKS._replace(drawn=256)
    ).cpu()
    assert torch.equal(found, drawn(logits, positions, settings, cuts=False))
    assert torch.equal(found[0], logits[0].argmax(-1))


def test_draws_after_cuts(kernels: torch.device) -> None:
    """Rows that are cut, cut otherwise, not cut, and greedy in one call; logits within wider rows."""
    from proxytune.engine.cuda.triton_sampling import BLOCKS, draw

    wide = torch.randn(4, 1, 150, generator=torch.Generator().manual_seed(2)) * 2
    logits, positions = wide[..., :130], torch.arange(4)[:, None]
    settings = settings_of((1.0, 0.6, 0, 0), (1.5, 1, 0, 3), (1.0, 1, 0, 0), (0.0, 0.2, 0.1, 9))
    there = DrawSettings(*(column.to(kernels) for column in settings))
    blocks = BLOCKS._replace(scanned=64, few=64, drawn=64)
    found = draw(wide.to(kernels)[..., :130], positions.to(kernels), there, cuts=True, blocks=blocks).cpu()
    assert torch.equal(found, drawn(logits, positions, settings, cuts=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_rows_that_are_no_distribution_give_some_token(kernels: torch.device) -> None:
    """Which the host then drops: it hears of NaN, +inf, and nothing but -inf through the log-probability."""
    from proxytune.engine.cuda.triton_sampling import BLOCKS, draw

    logits = torch.full((4, 1, 40), MINUS)
    logits[1], logits[2, 0, 3] = float("nan"), float("inf")
    logits[3] = torch.arange(40)
    logits[3, 0, 20] = float("nan")
    settings = settings_of(*[(1.0, 0.5, 0.1, 5)] * 4)
    there = DrawSettings(*(column.to(kernels) for column in settings))
    positions = torch.zeros(4, 1, dtype=torch.long, device=kernels)
    blocks = BLOCKS._replace(scanned=64, few=64, drawn=16)
    for cuts in (True, False):
        found = draw(logits.to(kernels), positions, there, cuts=cuts, blocks=blocks)
        assert ((found >= 0) & (found < 40)).all() and found[0] == 0


def sampler(settings: DrawSettings) -> Sampler:
    """With nothing banned or forced."""
    empty = torch.zeros(len(settings.key), 0, dtype=torch.long)
    return Sampler(
        *(settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.key),
        *(empty, empty, empty, empty, empty.sum(1)),
    )


def test_a_kernel_that_is_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is tried once: on all kinds of rows, against what is written out."""
    monkeypatch.setattr(sampling, "runs_triton", lambda tensor: True)
    tried = list[int]()

    def off(logits: Tensor, positions: Tensor, settings: DrawSettings, **options: Any) -> Tensor:
        tried.append(len(logits))
        return drawn(logits, positions, settings, **options) ^ (positions == 5)

    monkeypatch.setattr("proxytune.engine.cuda.triton_sampling.draw", off)
    settings = settings_of((1.0, 0.9, 0, 0))
    logits, positions = torch.randn(1, 1, 57), torch.full((1, 1), 5)
    with pytest.warns(UserWarning, match="sampling kernel is off by 1"):
        found = sampler(settings).pick(logits, positions, SamplingNeeds(True, True))
    assert torch.equal(found, drawn(logits, positions, settings, cuts=True)) and tried == [6]
    sampler(settings).pick(logits, positions, SamplingNeeds(True, True))
    assert tried == [6]


def test_float64_is_written_out(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.engine.cuda.triton_sampling.draw", None)
    logits = torch.randn(1, 1, 57, dtype=torch.float64)
    settings = settings_of((1.0, 0.9, 0, 0))
    positions = torch.zeros(1, 1, dtype=torch.long)
    found = sampler(settings).pick(logits, positions, SamplingNeeds(True, True))
    assert torch.equal(found, drawn(logits, positions, settings, cuts=True))
