"""Steps over pages as on a GPU, run on the CPU, and what the host may not do while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.graphs import Graphs, StepShape
from proxytune.engine.cuda.loop import DeviceLoop
from proxytune.engine.request import Row
from proxytune.engine.speculative.drafter import LOOKUP, Speculation
from proxytune.models.roles import Loaded
from tests.support.decoders import use_pages

Ways = int | Literal["lookup", "any"] | None
"""Tokens drafted by the expert (None: adaptive), prompt lookup alone, or whatever a step chooses."""
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
COPIES = {"tolist", "numpy", "cpu", "item"}
COPIES |= {f"__{name}__" for name in ("bool", "int", "float", "index", "array", "contains")}


def as_on_a_device(patch: pytest.MonkeyPatch) -> None:
    """Pages in place of slots, models' own forwards, and the CPU counted among the devices."""
    forward = Loaded.forward.fget
    assert forward is not None

    def own(model: Loaded) -> Any:
        return forward(replace(model, family=replace(model.family, llama_forward=None)))

    patch.setattr(Loaded, "forward", property(own))
    use_pages(patch)
    patch.setattr(device_loop, "DEVICES", {"cpu"})


def drafting(k: Ways) -> Speculation:
    """So many tokens by the expert (None: adaptive); prompt lookup alone; or what a step chooses."""
    if k == LOOKUP:
        return Speculation(k=4, drafter=LOOKUP)
    return Speculation() if k == "any" else Speculation(k=k, lookup=False)


def on_launch(
    patch: pytest.MonkeyPatch, heard: Callable[[DeviceLoop, Sequence[Row], StepShape, bool], object]
) -> None:
    """Tell of every step on the device before it starts: its rows, its shape, and whether it runs ahead."""
    launch = DeviceLoop.launch

    def watched(loop: DeviceLoop, rows: list[Row], shape: StepShape, **options: bool) -> None:
        heard(loop, rows, shape, options.get("steady", False))
        launch(loop, rows, shape, **options)  # type: ignore[arg-type]

    patch.setattr(DeviceLoop, "launch", watched)


def graphs_of(d: Decoder) -> Graphs:
    """The only graphs that were made for a decoder."""
    (found,) = d.ensemble._graphs.values()
    return found


class NoReads(TorchDispatchMode):
    """Fails where an operation would make the host wait for the device: values read, shapes that depend on
    values, masks as indices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in READS, f"{func.name()} reads a value"
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"}:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func.name()} with a mask"
        if name == "repeat_interleave":
            assert "Tensor" not in func.name(), f"{func.name()} has a shape that depends on values"
        return func(*args, **(kwargs or {}))


class NoCopies(TorchFunctionMode):
    """Fails where a tensor is handed to Python, which on the CPU is no operation of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in COPIES, func
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read() -> Iterator[None]:
    """A stretch in which the host may read nothing."""
    with NoCopies(), NoReads():
        yield
