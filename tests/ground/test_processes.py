"""Which process this is, by what torchrun says of it."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

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


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The second of two processes; what it says to the other, which has the number 5."""
    heard: list[Any] = []

    def all_reduce(tensor: torch.Tensor, how: Any) -> None:
        heard.append(how)
        tensor.clamp_(max=5)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "is_initialized", lambda: "gloo" in heard)
    monkeypatch.setattr(distributed, "init_process_group", heard.append)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(atexit, "register", lambda ending, *given, **named: heard.append((ending, *given)))
    return heard


def test_processes_meet_once_and_agree_on_the_least(met: list[Any]) -> None:
    assert (processes.least(7), processes.least(3)) == (5, 3)
    assert met == [
        "gloo",
        (distributed.destroy_process_group,),
        distributed.ReduceOp.MIN,
        distributed.ReduceOp.MIN,
    ]


def test_only_the_first_process_writes_to_the_folder(
    met: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have a copy of it, made before the first goes on, that is deleted at the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a").write_text("x")
    copies: list[Path] = []
    monkeypatch.setattr(processes.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    kept = tmp_path / "proxytune-rank" / "run"
    monkeypatch.setattr(distributed, "barrier", lambda: copies.append(kept / "a"))
    assert processes.own_folder(folder) == kept and (kept / "a").read_text() == "x"
    assert copies == [kept / "a"] and met[-1][1] == str(kept.parent)
    assert processes.own_folder(tmp_path / "none") == kept.with_name("none") and len(copies) == 2
    monkeypatch.setenv("RANK", "0")
    assert processes.own_folder(folder) == folder and len(copies) == 3
