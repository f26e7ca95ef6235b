"""On a GPU: pages in place of slots, captured steps, the same tokens. Skips without CUDA; the CPU runs the
same pages and the same steps elsewhere (the fixture `layout`, test_device_step, test_graphs)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda import graphs
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.graphs import Graphs, StepShape
from proxytune.engine.kernels import int8
from proxytune.engine.kernels.int8 import Int8Linear, dequantize
from proxytune.engine.kernels.wide_head import wide_product
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.likelihood import Continuation, likelihoods
from proxytune.engine.speculative.drafter import Speculation
from proxytune.records import Completion, Example
from tests.support import adapters, decoders, oracle
from tests.support.adapters import on_anti
from tests.support.decoders import by_id, check, decoder, example, plain, ragged
from tests.support.on_device import Ways, drafting, graphs_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


def in_dtype(system: System, dtype: str, device: str | None = None) -> System:
    """The system with its models in another dtype, on a device; an adapter goes where its model is."""
    change = {"dtype": dtype, "device_map": device}
    models = {role: getattr(system, role) for role in ("base", "expert", "antiexpert")}
    own = {role: spec for role, spec in models.items() if spec.model is not None}
    return system.model_copy(
        update={role: spec.model_copy(update=change) for role, spec in own.items()} | {"name": f"{dtype}"}
    )


def tokens(d: Decoder, examples: Sequence[Example], s: Sampling) -> dict[tuple[str, int], tuple[int, ...]]:
    return {where: c.token_ids for where, c in by_id(list(d.stream(examples, s))).items()}


@pytest.mark.parametrize("k", [0, 3, None, "lookup"])
def test_tokens_are_the_oracles(trio: System, k: Ways) -> None:
    d = decoder(trio, speculation=drafting(k))
    assert all(isinstance(runner.rows, PagedCache) for runner in d.ensemble.runners.values())
    check(d, ragged(20), Sampling(max_new_tokens=12))
    check(d, ragged(6, 1), Sampling(max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.9, n=3))
    assert graphs_of(d).refused is None and graphs_of(d).made > 0


SAMPLERS = [Sampling(max_new_tokens=24), Sampling(max_new_tokens=24, temperature=0.9, top_k=20, top_p=0.9)]


@pytest.mark.parametrize("s", SAMPLERS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("k", [0, 3, "lookup"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_change_nothing(
    trio: System, monkeypatch: pytest.MonkeyPatch, dtype: str, k: Ways, s: Sampling
) -> None:
    """The same steps without capture, and with the models in turn or beside each other."""
    found = []
    for captured, parallel in ((set[str](), None), ({"cuda"}, False), ({"cuda"}, True)):
        monkeypatch.setattr(graphs, "CAPTURED", captured)
        d = decoder(in_dtype(trio, dtype), speculation=drafting(k))
        made = d.ensemble.graphs(d.ensemble.draft_models(d.speculation.drafter))
        made.parallel = parallel
        found.append(list(d.stream(ragged(20, 3), s)))
        assert made.refused is None and bool(made.made) == bool(captured)
    first, *others = ({(c.example_id, c.token_ids, c.logprob) for c in one} for one in found)
    assert all(other == first for other in others)


@pytest.mark.parametrize("k", [0, 3, "lookup"])
def test_float32_says_what_the_cpu_says(trio: System, k: Ways) -> None:
    s, examples = Sampling(max_new_tokens=24), ragged(20, 4)
    cpu = decoder(in_dtype(trio, "float32", "cpu"), speculation=Speculation(k=0))
    gpu = decoder(in_dtype(trio, "float32"), speculation=drafting(k))
    assert tokens(gpu, examples, s) == tokens(cpu, examples, s)


@pytest.mark.parametrize("k", [0, 3])
def test_a_shared_pair_says_what_the_cpu_says(folders: dict[str, Path], k: int) -> None:
    """The expert is a LoRA adapter on the antiexpert: one forward for both, captured."""
    pair = adapters.system(folders, on_anti(folders, "lora"))
    s, examples = Sampling(max_new_tokens=24), ragged(20, 8)
    cpu = decoder(in_dtype(pair, "float32", "cpu"), speculation=Speculation(k=0))
    gpu = decoder(in_dtype(pair, "float32"), speculation=drafting(k))
    assert gpu.loaded["expert"].module is gpu.loaded["antiexpert"].module
    assert gpu.ensemble.draft_models() == ("expert", "antiexpert")
    assert tokens(gpu, examples, s) == tokens(cpu, examples, s)
    made = graphs_of(gpu)
    assert made.refused is None and {shape.ahead.k for shape in made.captured} == {k}


@pytest.mark.parametrize("k", [0, 3])
def test_traces_come_out_of_graphs(trio: System, k: int) -> None:
    """What the CPU's own steps trace."""
    s, examples = Sampling(max_new_tokens=12), ragged(6, 2)
    cpu = decoder(in_dtype(trio, "float32", "cpu"), speculation=Speculation(k=0))
    gpu = decoder(in_dtype(trio, "float32"), speculation=drafting(k))
    ours, theirs = (by_id(list(d.stream(examples, s, trace="tokens"))) for d in (gpu, cpu))
    assert graphs_of(gpu).refused is None and graphs_of(gpu).made > 0
    for where, completion in theirs.items():
        for one, other in zip(ours[where].trace, completion.trace, strict=True):
            assert (one.id, one.top) == (other.id, other.top)
            assert one.probability == pytest.approx(other.probability, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_not_rounded(dtype: torch.dtype) -> None:
    """By torch's own product, or in pieces where it has none."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 512, dtype=dtype), torch.randn(1000, 512, dtype=dtype)
    want = x.double() @ weight.double().T
    found = wide_product(x.cuda(), weight.cuda())
    assert found.dtype == torch.float32
    assert (
        float((found.cpu().double() - want).abs().max()) < 1e-3 < float((want.to(dtype) - want).abs().max())
    )


def test_likelihoods_say_what_the_cpu_says(trio: System) -> None:
    """Over pages, by the kernel, with continuations of more tokens than a draft has."""
    alphas, found = [parse_alpha(1)], []
    for device in ("cpu", None):
        d = decoder(in_dtype(trio, "float32", device))
        items = [
            Continuation(d.contexts(e.prompt), tuple(range(40, 41 + 5 * number)), number)
            for number, e in enumerate(ragged(6, 3))
        ]
        found.append([one.logprobs.cpu() for one in likelihoods(d.ensemble, items, alphas)])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-3, rtol=1e-3)


def gap(d: Decoder, e: Example, response: Sequence[int], one: int, other: int) -> float:
    """By how many standard deviations two tokens differ after `response`, in float64 with rounded weights."""
    contexts, views = d.contexts(e.prompt), {}
    for name in d.loaded:
        module = plain(d, name)
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16().double()
        for key, layer in d.loaded[name].module.named_modules():
            if isinstance(layer, Int8Linear):
                wide = dequantize(layer.weight, layer.weight_scale, torch.float64)
                module.get_submodule(key).weight.data = wide.cpu()
        views[name] = oracle.last_logits(module, [*contexts[name], *response])
    z = views["base"] + views["expert"] - views["antiexpert"]
    return float((z[one] - z[other]).abs() / z.std())


def check_near_ties(
    d: Decoder,
    examples: Sequence[Example],
    one: dict[tuple[str, int], tuple[int, ...]],
    other: dict[tuple[str, int], tuple[int, ...]],
) -> None:
    """Responses are the same, or the first tokens that differ are about as good as each other."""
    for e in examples:
        a, b = one[e.id, 0], other[e.id, 0]
        at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            assert a == b
        else:
            assert gap(d, e, a[:at], a[at], b[at]) < 0.2, e


def test_divergences_in_bfloat16_are_near_ties(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying four tokens at once rounds otherwise than one at a time; only near-ties may turn."""
    monkeypatch.setattr(decoders, "plain_models", {})  # the weights are rounded here
    half, s, examples = in_dtype(trio, "bfloat16"), Sampling(max_new_tokens=24), ragged(40, 5)
    one, other = (tokens(decoder(half, speculation=drafting(k)), examples, s) for k in (0, 3))
    check_near_ties(decoder(half), examples, one, other)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_base_in_graphs_says_what_it_says_without(
    trio: System, monkeypatch: pytest.MonkeyPatch, dtype: str, k: int
) -> None:
    """In bfloat16 up to near-ties: cuBLAS, which multiplies for the experts, may choose otherwise in a
    graph."""
    from proxytune.engine.kernels import triton_linear

    monkeypatch.setattr(decoders, "plain_models", {})  # the weights are rounded here
    launch, rows = triton_linear.launch, list[int]()

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            rows.append(x.shape[0])
        return launch(x, *rest)

    monkeypatch.setattr(triton_linear, "launch", watched)
    wide = in_dtype(trio, dtype)
    base = wide.base.model_copy(update={"quantization": "int8"})
    system = wide.model_copy(update={"base": base, "name": f"int8-{dtype}"})
    s, examples = Sampling(max_new_tokens=24), ragged(12, 9)  # few enough rows for the int8 kernel
    d = decoder(system, speculation=drafting(k))
    assert any(isinstance(m, Int8Linear) for m in d.loaded["base"].module.modules())
    captured = tokens(d, examples, s)
    assert graphs_of(d).refused is None and graphs_of(d).made > 0
    assert rows and max(rows) <= int8.MOST_ROWS
    monkeypatch.setattr(graphs, "CAPTURED", set[str]())
    eager = decoder(system, speculation=drafting(k))
    eagerly = tokens(eager, examples, s)
    assert graphs_of(eager).made == 0
    if dtype == "float32":
        assert captured == eagerly
    else:
        check_near_ties(d, examples, captured, eagerly)


def test_nothing_is_read_in_a_replayed_step(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    run, replays = Graphs.run, list[StepShape]()

    def watched(self: Graphs, shape: StepShape) -> torch.Tensor:
        assert self.ready(shape)
        replays.append(shape)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Graphs, "run", watched)
    check(decoder(trio, speculation=drafting(3)), ragged(8, 6), Sampling(max_new_tokens=16))
    assert len(replays) > 4


def test_the_engines_own_steps_say_the_same(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    s, examples = Sampling(max_new_tokens=20, temperature=0.8, n=2), ragged(10, 7)
    ours = tokens(decoder(trio, speculation=drafting(3)), examples, s)
    monkeypatch.setattr(device_loop, "DEVICES", set())
    assert ours == tokens(decoder(trio, speculation=Speculation(k=3)), examples, s)


def test_memory_does_not_grow_with_requests(trio: System) -> None:
    """2,000 requests of all lengths, four times the same 500, after a warm-up of two times those: it makes
    every graph that they need."""
    d, settings = decoder(trio, batch=16, speculation=drafting(2)), Sampling(max_new_tokens=8)

    def serve(examples: Sequence[Example]) -> list[Completion]:
        return list(d.stream(examples, settings))

    def workload() -> None:
        for seed in range(5):
            assert len(serve(ragged(100, seed))) == 100

    def memory() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    serve([example("a" * 30, 0)])  # the longest prompt first: no later request makes the state wider
    for _ in range(2):
        workload()
    made = set(graphs_of(d).captured)
    allocated, reserved = memory()
    for _ in range(4):
        workload()
    assert set(graphs_of(d).captured) == made
    now_allocated, now_reserved = memory()
    # libraries make workspaces when they like; a leak of 4 KiB per request would be twice this slack
    assert now_allocated <= allocated + (4 << 20)
    assert now_reserved <= reserved + (64 << 20)  # the allocator may cut its blocks otherwise
