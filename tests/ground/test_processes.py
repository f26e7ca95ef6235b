"""Which process this is, by what torchrun says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune import processes


@pytest.mark.parametrize(
    ("said", "world", "rank", "gpu"),
    [
        ({}, 1, 0, "cuda:0"),
        ({"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "2"}, 1, 0, "cuda:0"),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, 4, 3, "cuda:1"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "2"}, 4, 0, "cuda:2"),
        ({"WORLD_SIZE": "2"}, 2, 0, "cuda:0"),
    ],
)
def test_which_process_this_is(
    said: dict[str, str], world: int, rank: int, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert (processes.world(), processes.rank(), processes.gpu()) == (world, rank, gpu)
    assert processes.is_first() is (rank == 0)


def test_one_process_alone_meets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.least(7) == 7 and processes.own_folder(tmp_path) == tmp_path
    assert processes.TENSOR == "tensor"
