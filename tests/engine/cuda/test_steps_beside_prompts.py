"""Steps go on being started before the last is read while prompts of other rows are computed, and every token
is that of plain decoding."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.config import Sampling, System
from proxytune.decoding.decoder import PREFILL_TOKENS
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.loop import DeviceLoop
from proxytune.engine.engine import Engine
from proxytune.engine.request import Request
from tests.engine.cuda.test_device_step import both, everything
from tests.support.decoders import decoder, kv_bytes, ragged
from tests.support.on_device import Ways, as_on_a_device, drafting, on_launch


@pytest.fixture(autouse=True)
def _on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)


class Beside:
    """Steps that are started before the last is read, while prompts of other rows are computed."""

    def __init__(self, patch: pytest.MonkeyPatch, chunk: int) -> None:
        """With prompts in chunks of so many tokens."""
        patch.setitem(PREFILL_TOKENS, "cpu", chunk)
        self.ahead = self.fed = 0
        follow = DeviceLoop.follow

        def heard(loop: DeviceLoop, rows: Any, shape: object, steady: bool) -> None:
            self.ahead += steady and len(loop.scheduler.rows) > len(rows)

        def counted(loop: DeviceLoop) -> Any:
            prefill = follow(loop)
            self.fed += sum(len(segment.ids) for own in prefill.values() for segment in own)
            assert not self.fed or len(loop.in_flight) == 2 or not any(prefill.values())
            return prefill

        on_launch(patch, heard)
        patch.setattr(DeviceLoop, "follow", counted)


@pytest.mark.parametrize("k", [0, 3, "lookup"])
def test_steps_are_started_ahead_while_others_prefill(
    trio: System, monkeypatch: pytest.MonkeyPatch, k: Ways
) -> None:
    """Rows that decode go on while prompts of many chunks come in, and these then decode with them."""
    beside = Beside(monkeypatch, 4)
    s = Sampling(max_new_tokens=9, seed=2, temperature=0.9, stop=("3",))
    both(monkeypatch, trio, ragged(6, 6, longest=50), s, k, batch=4)
    assert beside.ahead > 3 and beside.fed > 12


def test_prompts_beside_steps_where_memory_is_tight(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows give way, in the middle of their prompts too."""
    beside = Beside(monkeypatch, 4)
    examples, s = ragged(10, 6, longest=12), Sampling(max_new_tokens=40, temperature=0.8)
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 160), speculation=drafting(0))
    tight = everything(list(d.stream(examples, s)))
    assert d.stats.preemptions > 0 and beside.ahead > 0 and beside.fed > 0
    monkeypatch.setattr(device_loop, "DEVICES", set())
    assert tight == everything(list(decoder(trio).stream(examples, s)))


def test_a_request_that_comes_is_let_in_though_others_prefill(
    trio: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a row that is cancelled in its prompt leaves the steps of the others as they are."""
    d, order = decoder(trio, speculation=drafting(0)), list[Any]()
    engine = Engine(
        d.ensemble,
        max_rows=4,
        prefill_tokens=8,
        speculation=drafting(0),
        on_token=lambda request, token: order.append(request.tag),
    )

    def request(tag: str, length: int, new: int) -> Request:
        return Request({n: (1, *range(40, 40 + length)) for n in d.loaded}, 1, new, tag=tag)

    engine.submit(request("first", 3, 60))
    for _ in range(4):
        engine.step()
    long = engine.submit(request("long", 90, 5))
    engine.submit(request("cancelled", 91, 5))
    for _ in range(5):
        engine.step()
    assert engine.device is not None and engine.device.in_flight and len(engine.scheduler.rows) > 1
    assert engine.cancel(long + 1) and not order.count("long")
    engine.submit(request("last", 2, 5))
    results = []
    while engine.busy:
        results += engine.step()
    assert {r.request.tag: len(r.tokens) for r in results} == {"first": 60, "long": 5, "last": 5}
    assert order.index("long") < 60 and order.index("last") < 60
