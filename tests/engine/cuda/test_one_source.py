"""Roles that name one checkpoint run on one module, in steps on a device too: tokens stay the plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune.config import Sampling, System
from proxytune.engine.speculative.drafter import Speculation
from tests.support import tiny
from tests.support.decoders import check, decoder, ragged
from tests.support.on_device import as_on_a_device
from tests.support.tiny import spec


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("others", ["nobody", "base", "antiexpert"])
@pytest.mark.every(3)
def test_steps_on_shared_weights(
    others: str, drafts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (spec(tiny.save(tmp_path / str(seed), tiny.build("llama", seed))) for seed in (1, 2))
    system = System(base=one, expert=one, antiexpert=one)
    system = system if others == "nobody" else system.model_copy(update={others: other})
    as_on_a_device(monkeypatch)
    d = decoder(system, speculation=Speculation(k=drafts))
    assert len({id(model.module) for model in d.loaded.values()}) == (1 if others == "nobody" else 2)
    check(d, ragged(6, 3), Sampling(max_new_tokens=12))
    check(d, ragged(4, 2), Sampling(max_new_tokens=8, temperature=1.0, top_k=20))
