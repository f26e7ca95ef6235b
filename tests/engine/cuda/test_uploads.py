"""What the host sends to the device: nothing that waits for what was launched before, and little at a time.
`meta` stands for the device; there nothing is pinned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proxytune.config import Sampling, System
from proxytune.engine.attention import FusedForward, varlen
from proxytune.engine.attention.attention import LayerCall
from proxytune.engine.cuda.state import DeviceState
from proxytune.engine.kv.cache import CacheSpec, LayerShape
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners import ModelRunner, VocabMap
from proxytune.engine.runners.runner import run_together
from tests.support import tiny
from tests.support.decoders import check, decoder, ragged
from tests.support.on_device import as_on_a_device, drafting

META = torch.device("meta")


class Uploads(TorchDispatchMode):
    """Counts copies from the CPU to `meta`, and fails where one waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        with self:  # an operation that is made of others shows as these
            out = func.decompose(*args, **named)
        if out is not NotImplemented:
            return out
        name = func.name().split("::")[1].split(".")[0]
        there = args[0].device if name == "copy_" else named.get("device")
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in {"_to_copy", "copy_"} and there == META and source.device.type == "cpu":
            assert named.get("non_blocking") or any(a is True for a in args), (
                f"{func.name()} waits for the device"
            )
            self.count += 1
        return func(*args, **named)


def model_on_meta(fused: bool) -> ModelRunner:
    """A Llama with pages, as it is on a GPU."""
    model: Any = tiny.build("llama").to(torch.float32)
    model.set_attn_implementation("proxytune")
    model.config.pad_token_id = None
    model = model.to(META)
    layer = LayerShape(2, 8, 8)
    cache = PagedCache(CacheSpec((layer, layer), 1024, torch.float32, (META, META)))
    asked = [LayerCall(layer, META, torch.float32, None, None, True)] * 2
    forward = FusedForward(model, model.model, asked, [False, False], 256) if fused else model
    return ModelRunner(forward, cache, VocabMap(tiny.VOCABULARY), 256, META)


@pytest.mark.parametrize("way", ["groups", "pages", "varlen"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_prefill_does_not_wait(fused: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, some of which go on, by groups and over pages."""
    if way != "groups":
        monkeypatch.setattr("proxytune.engine.attention.attention.supported", lambda *_: True)
        monkeypatch.setattr("proxytune.engine.attention.over_pages._right", lambda *_: False)
    if way == "varlen":
        monkeypatch.setattr(varlen, "takes", lambda *_: True)
        monkeypatch.setattr(varlen, "function", lambda: lambda query, *rest, **named: torch.empty_like(query))
    runner = model_on_meta(fused)
    for _ in range(3):
        runner.rows.admit()
    runner.rows.reserve([60, 30, 30])
    for counts in ((40, 5, 5), (3, 20, 1)):
        segments = [Segment(row, tuple(range(count))) for row, count in enumerate(counts)]
        with Uploads() as mode:
            (logits,) = run_together([(runner, Work(segments, [0, 4]))])
        assert logits.is_meta and logits.shape == (2, tiny.VOCABULARY)
        assert mode.count > 0


def test_what_waits_is_noticed() -> None:
    with pytest.raises(AssertionError, match="waits"), Uploads():
        torch.tensor([1, 2]).to(META)
    with pytest.raises(AssertionError, match="waits"), Uploads():
        torch.zeros(2, device=META).copy_(torch.zeros(2))


def test_a_batch_is_sent_in_two_copies(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are new: their settings, positions and pages together, and their tokens."""
    as_on_a_device(monkeypatch)
    sent, fill, fills = list[int](), DeviceState.fill, list[int]()
    for name in ("_send", "_send_history"):
        send = getattr(DeviceState, name)

        def counted(state: DeviceState, *given: Any, send: Any = send) -> None:
            sent.append(1)
            send(state, *given)

        monkeypatch.setattr(DeviceState, name, counted)

    def watched(state: DeviceState, rows: Any) -> None:
        before = len(sent)
        fill(state, rows)
        fills.append(len(sent) - before)

    monkeypatch.setattr(DeviceState, "fill", watched)
    check(decoder(trio, speculation=drafting(2)), ragged(9), Sampling(max_new_tokens=6))
    assert len(fills) > 1 and max(fills) == 2
