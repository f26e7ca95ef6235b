"""Models that a device map spreads over several devices: indices, masks and memory per device. There is one
device here, and torch's `meta` stands in for the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune.config import ModelSpec, System
from proxytune.decoding import kv_pools
from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda import reserve
from proxytune.engine.cuda.loop import steps_on_device
from proxytune.engine.kv.cache import CacheSpec, LayerShape
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.kv.slots import SlotCache
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners.runner import ModelRunner
from proxytune.engine.runners.vocab_map import VocabMap
from proxytune.engine.speculative.drafter import Speculation
from proxytune.errors import UserError
from proxytune.models import memory
from proxytune.models.memory import GIB, free_memory, place_of
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from tests.support.decoders import decoder, loaded_models

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_last_layer_is_elsewhere() -> None:
    """Hidden states lie where the last layer is: an index on the first device does not fit them."""

    def forward(**inputs: Any) -> Any:
        assert inputs["input_ids"].is_meta
        hidden = torch.ones(1, inputs["input_ids"].shape[1], 6)  # on the last device
        return SimpleNamespace(logits=hidden[:, inputs["logits_to_keep"]])

    cache = SlotCache(CacheSpec((LayerShape(1, 2, 2),) * 2, 64, torch.float32, (META, CPU)))
    runner = ModelRunner(forward, cache, VocabMap(6), 64, META)
    cache.admit()
    cache.reserve([3])
    assert runner.forward(Work([Segment(0, (1, 2, 3))], [0, 2])).shape == (2, 6)
    assert runner.devices == {CPU, META}


def test_steps_need_one_device(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm and the head count too, where no layer stores anything."""
    monkeypatch.setattr(device_loop, "DEVICES", {"cpu"})
    spec = CacheSpec((LayerShape(1, 2, 2),), 64, torch.float32, (CPU,))
    runner = ModelRunner(torch.nn.Linear(2, 2), PagedCache(spec), VocabMap(6), 64, CPU)
    assert steps_on_device({"base": runner}, Speculation(k=0))
    apart = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    runner = ModelRunner(apart, PagedCache(spec), VocabMap(6), 64, CPU)
    assert not steps_on_device({"base": runner}, Speculation(k=0))


def test_vocabularies_of_models_on_two_devices(trio: System) -> None:
    """Which tokens two models share is known on their own devices, and used on the target's."""
    ensemble = decoder(trio).ensemble
    (term,) = ensemble.terms
    runners = dict(ensemble.runners)
    for name, device in ((term.expert, CPU), (term.antiexpert, META)):
        own = SimpleNamespace(**vars(runners[name]))
        own.alignment = replace(own.alignment, shared=torch.ones(259, dtype=torch.bool, device=device))
        runners[name] = own  # type: ignore[assignment]
    shared = replace(ensemble, runners=runners).shared_by(term, META)
    assert shared is not None and shared.is_meta


class Gpus:
    """Two GPUs with 10 and 4 GiB free."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = [10 * GIB, 4 * GIB]
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "mem_get_info", lambda index: (self.free[index], 80 * GIB))
        patch.setattr(memory, "give_back", lambda: None)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


def test_free_memory_is_that_of_the_device(gpus: Gpus) -> None:
    assert free_memory() == free_memory("cuda") == free_memory(torch.device("cuda:0")) == 10 * GIB
    assert free_memory("cuda:1") == free_memory(torch.device("cuda", 1)) == 4 * GIB
    assert free_memory("auto") > 14 * GIB
    with pytest.raises(UserError, match=r"no cuda:2 here: .* cuda:0 to cuda:1"):
        free_memory("cuda:2")
    places = {None: "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu", "balanced": "auto"}
    assert {m: place_of(ModelSpec(model="m", device_map=m)) for m in places} == places
    assert place_of(ModelSpec(model="m", device_map={"": "cuda:1"})) == "auto"


def test_weights_are_counted_where_they_go(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(System(base=ModelSpec(model="a"), tuned=ModelSpec(model="b", device_map="cuda:1")))
    models._check_memory({"base": 9.0 * GIB, "tuned": 3.0 * GIB})  # 12 GiB do not fit into either alone
    both = models.system.model_copy(update={"base": ModelSpec(model="a", device_map="cuda:1")})
    with pytest.raises(UserError, match=r"base 2.0 \+ tuned 3.0 = 5.0 GiB do not fit into the 4.0 GiB"):
        Models(both)._check_memory({"base": 2.0 * GIB, "tuned": 3.0 * GIB})


def spread(trio: System, monkeypatch: pytest.MonkeyPatch, free: dict[torch.device, int]) -> Decoder:
    """A decoder of a base whose first layer is on the CPU and whose others are elsewhere."""
    d = decoder(trio, "base")
    base = d.loaded["base"]
    family = replace(base.family, devices=(CPU, *(META,) * (len(base.family.layers) - 1)))
    models = loaded_models[trio.model_dump_json()]
    monkeypatch.setitem(models._loaded, "base", replace(base, family=family))
    monkeypatch.setattr(kv_pools, "free_memory", free.__getitem__)
    return Decoder(models, "base", DecodeOptions(batch=1000))


def test_the_pool_fits_on_every_device(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = decoder(trio, "base").loaded["base"].family.layers
    layer = layers[0].numbers * 8  # bytes of a token, float64
    monkeypatch.setattr(kv_pools, "KV_SHARE", 0.5)
    monkeypatch.setattr(kv_pools, "KV_SHARE_GPU", 0.8)
    for on_cpu, elsewhere, tokens in ((200, 1000, 100), (10_000, 1000, 800)):
        free = {CPU: on_cpu * layer, META: elsewhere * layer * (len(layers) - 1)}
        d = spread(trio, monkeypatch, free)
        assert d.ensemble.runners["base"].rows.capacity == tokens


def test_graphs_have_memory_beside_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free = torch.device("cuda:0"), 80 * GIB
    monkeypatch.setattr(kv_pools, "free_memory", lambda device: free)
    assert kv_pools.kv_budget(gpu, 0) - kv_pools.kv_budget(gpu, 1213) == reserve(1213)
    free = GIB
    assert kv_pools.kv_budget(gpu, 4458) == int(GIB * 0.85) - GIB // 8
