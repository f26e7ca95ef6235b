"""The processes that torchrun started, which decode one system together: every layer of a model with
`device_map: tensor` is split over them.

All of them do the same from the same input. The first one's files and output are the result."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

TENSOR = "tensor"
"""What `device_map` says of a model that is split over the processes."""


def world() -> int:
    """How many there are; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which one this is; 0 is the first."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and shows."""
    return rank() == 0


def gpu() -> str:
    """The GPU of this process where a system names none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0') if world() > 1 else 0}"


def joined() -> None:
    """Meet the others, where that has not happened."""
    import torch
    from torch import distributed

    if world() > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(gpu())
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(distributed.destroy_process_group)


def least(number: int) -> int:
    """The smallest of the numbers that all processes have: what depends on a machine must not differ."""
    if world() == 1:
        return number
    import torch
    from torch import distributed

    joined()
    found = torch.tensor(number, device=gpu() if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return int(found)


def own_folder(folder: Path) -> Path:
    """Where this process keeps the run of a folder: the first there, the others in a copy of what was there,
    which is thrown away at the end."""
    if world() == 1:
        return folder
    from torch import distributed

    joined()
    if is_first():
        distributed.barrier()  # the others have copied
        return folder
    kept = tempfile.mkdtemp(prefix="proxytune-rank")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    copy = Path(kept) / (folder.name or "run")
    if folder.exists():
        shutil.copytree(folder, copy)
    distributed.barrier()
    return copy
