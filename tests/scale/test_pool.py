"""The pool of workers without a cluster: a Ray of this process, whose workers answer as they are told."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from proxytune import __version__
from proxytune.config import ModelSpec, RunSpec, Sampling, System, parse_alpha
from proxytune.decoding import Decoder
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import DecodeOptions, RayOptions
from proxytune.records import Completion, Example, Prompt, RoleMemory, WorkerFacts
from proxytune.scale import ray_pool
from proxytune.scale.parts import AskedExample, Found, Queue, Settings, WorkerState, by_alphas
from proxytune.scale.ray_pool import RayPool, ray_decoder
from proxytune.scale.worker import Worker, WorkerSetup

ONE, TWO = parse_alpha(1), parse_alpha(2)
SYSTEM = System(name="s", base=ModelSpec(model="m"), alpha=TWO)


class Lost(Exception):
    """What Ray raises where a worker is gone."""


class Failed(Lost):
    """What Ray raises where a worker's function failed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Actor:
    """A worker: what it is once it is loaded, and what it does with a part."""

    def __init__(self, ray: FakeRay, number: int) -> None:
        self.ray, self.number = ray, number
        self.load = SimpleNamespace(remote=lambda: ("loading", number))
        self.decode = SimpleNamespace(options=self._options)

    def _options(self, num_returns: str) -> Any:
        assert num_returns == "streaming"
        return SimpleNamespace(remote=self._decode)

    def _decode(self, part: Sequence[AskedExample], settings: Settings) -> Iterator[Any]:
        self.ray.parts.append((self.number, [one.example.id for one in part], settings))
        return iter(self.ray.answers(self.number, part))


class FakeRay(ModuleType):
    """As much of Ray as a pool uses."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=Lost, RayTaskError=Failed)
        self.started: list[dict[str, Any]] = []
        self.setups: list[Any] = []
        self.inits: list[dict[str, Any]] = []
        self.killed: list[int] = []
        self.parts: list[tuple[int, list[str], Settings]] = []
        self.shut, self.turn = 0, -1
        self.resources: dict[str, float] = {"CPU": 4.0}
        self.states: dict[int, Any] = {}
        self.dies_after: dict[int, int] = {}
        self.remarks: tuple[str, ...] = ()

    def init(self, **settings: Any) -> None:
        self.inits.append(settings)

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, kind: type) -> Any:
        assert kind is Worker

        def options(**settings: Any) -> Any:
            def made(setup: WorkerSetup) -> Actor:
                self.started.append(settings)
                self.setups.append(setup)
                return Actor(self, len(self.started))

            return SimpleNamespace(remote=made)

        return SimpleNamespace(options=options)

    def wait(
        self, references: Sequence[Any], num_returns: int, timeout: float
    ) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1 and timeout == 1.0
        self.turn += 1
        ready = references[self.turn % len(references)]
        return [ready], [other for other in references if other is not ready]

    def get(self, reference: Any) -> Any:
        if isinstance(reference, tuple):
            number = reference[1]
            reference = self.states.get(number, state(number))
        if isinstance(reference, Exception):
            raise reference
        return reference

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.number)
        raise Lost("it was gone already")

    def shutdown(self) -> None:
        self.shut += 1

    def answers(self, number: int, part: Sequence[AskedExample]) -> Iterator[Any]:
        memory = {"base": RoleMemory(weights=10, kv_peak=100 * number)}
        left = self.dies_after.get(number, 10**9)
        for one in part:
            for alpha in one.alphas:
                if left == 0:
                    yield Lost("killed\nby whom?")
                    return
                left -= 1
                count = 2 if one.texts is None else len(one.texts)
                made = tuple(
                    Completion(one.example.id, sample, f"by {number}", (5,) * 3, "length", 0.0)
                    for sample in range(count)
                )
                yield Found((one.example.id, alpha), made, self.remarks, 1000 + number, memory)


def state(number: int, version: str = __version__) -> WorkerState:
    facts = WorkerFacts(host=f"h{number}", pid=number, device="cpu", log=f"log{number}")
    memory = {"base": RoleMemory(weights=10 * number, kv_peak=0)}
    return WorkerState(facts, ("the same", f"note {number}"), memory, version)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr(ray_pool, "needs_extra", lambda *_: None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.delenv(name, raising=False)
    return made


def pool(decode: DecodeOptions | None = None, **options: Any) -> RayPool:
    setup = WorkerSetup(SYSTEM, "base", decode or DecodeOptions())
    return RayPool(setup, RayOptions(**{"ray": "local", "workers": 2, **options}))


def examples(count: int) -> list[Example]:
    return [Example(str(n), Prompt(f"p{n}", "u")) for n in range(count)]


def test_workers_are_started_and_the_first_is_waited_for(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    ray.resources = {"CPU": 4.0, "GPU": 2.0}
    made = pool(DecodeOptions(threads=3), workers=3, gpus_per_worker=2)
    assert ray.started == [{"num_cpus": 3, "num_gpus": 2, "max_restarts": 0}] * 3
    assert ray.setups == [made.setup] * 3
    assert ray.inits == [
        {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": 3,
            "log_to_driver": False,
            "logging_level": "ERROR",
        }
    ]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"
    assert made.notes() == ["the same", "note 1"] and list(made.workers) == [state(1).facts.name]
    assert made.memory["base"].weights == 10
    made.close()
    assert ray.killed == [1, 2, 3] and ray.shut == 1


def test_everything_is_decoded_once_by_whoever_is_free(ray: FakeRay) -> None:
    ray.remarks = ("r1", "r2")
    made, given = pool(DecodeOptions(batch=5)), examples(12)
    sampling = Sampling(max_new_tokens=7)
    found = list(made.sweep([(e, (ONE, TWO)) for e in given], sampling, task="t", trace="tokens", forced="f"))
    keys = [(completion.example_id, alpha, completion.sample) for alpha, completion in found]
    want = [(str(n), alpha, sample) for n in range(12) for alpha in (ONE, TWO) for sample in (0, 1)]
    assert sorted(keys, key=str) == sorted(want, key=str)
    assert all(settings == Settings("t", sampling, "tokens", "f") for _, _, settings in ray.parts)
    # two workers: a quarter of 12 is 3, but no part has fewer than four
    assert [len(names) for _, names, _ in ray.parts] == [4, 4, 4]
    by = {completion.example_id: completion.text for _, completion in found}
    assert {made.place(name)["worker"] for name in by} <= set(made.workers)
    number = int(by["0"].split()[1])
    want_place = {"worker": state(number).facts.name, "process_peak": 1000 + number}
    assert made.place("0") == {**want_place, "kv_peak": {"base": 100 * number}}
    assert made.remarks == ["r1", "r2"] and made.notes() == ["the same", "note 1", "note 2"]
    work = made.work()
    assert (work.finished, work.finished_tokens, work.unread) == (24, 24 * 2 * 3, 0)
    assert work.decode_seconds == work.prefill_seconds > 0
    assert made.memory["base"].weights == 10, "that of the first"


def test_a_part_has_no_more_than_are_decoded_together(ray: FakeRay) -> None:
    """A quarter of 40 would be ten."""
    assert len(list(pool(DecodeOptions(batch=5)).stream(examples(40), Sampling()))) == 80
    assert [len(names) for _, names, _ in ray.parts[:5]] == [5] * 5
    ray.parts.clear()
    assert len(list(pool().stream(examples(600), Sampling()))) == 1200
    assert [len(names) for _, names, _ in ray.parts[:3]] == [128, 118, 89], "128 unless it is set"


def test_alphas_and_texts(ray: FakeRay) -> None:
    made = pool(workers=1)
    [found] = {c.example_id for c in made.stream(examples(1), Sampling(), task="t")}
    assert found == "0" and ray.parts[-1][2] == Settings("t", Sampling())
    seen = list[tuple[Any, ...]]()
    ray.answers = lambda number, part: iter(
        seen.append(one.alphas) or answer for one in part for answer in answers(one)
    )  # type: ignore[method-assign, func-returns-value]

    def answers(one: AskedExample) -> Iterator[Found]:
        return FakeRay.answers(ray, 1, [one])

    list(made.stream(examples(1), Sampling()))
    list(made.stream(examples(1), Sampling(), alpha=ONE))
    texts = list(made.likelihoods(examples(2), lambda e: ("x",) * (1 + int(e.id)), alpha=parse_alpha(0)))
    assert seen == [(TWO,), (ONE,), (parse_alpha(0),), (parse_alpha(0),)]
    assert [(c.example_id, c.sample) for c in texts] == [("0", 0), ("1", 0), ("1", 1)]
    both = list(made.likelihood_sweep(examples(1), lambda _: ("x",), [ONE, TWO], "mc"))
    assert [alpha for alpha, _ in both] == [ONE, TWO] and ray.parts[-1][2] == Settings("mc", Sampling())


def test_what_a_lost_worker_had_is_decoded_by_another(ray: FakeRay) -> None:
    made = pool(workers=1)
    ray.dies_after[1] = 3
    found = [(c.example_id, c.sample) for c in made.stream(examples(5), Sampling())]
    assert found == [(str(n), sample) for n in range(5) for sample in (0, 1)]
    # of the first part of four, one was missing; it comes first again
    assert [(number, names) for number, names, _ in ray.parts] == [(1, ["0", "1", "2", "3"]), (2, ["3", "4"])]
    name = state(1).facts.name
    assert made.remarks == [f"{name} was lost: what it was at (1 examples) was decoded by another"]
    assert made.lost == 1 and ray.killed == [1] and len(ray.started) == 2
    assert list(made.workers) == [name, state(2).facts.name], "it was there once"
    assert [member.actor.number for member in made._members] == [2]


def test_what_comes_twice_counts_once(ray: FakeRay) -> None:
    made = pool(workers=1)

    def twice(number: int, part: Sequence[AskedExample]) -> Iterator[Any]:
        return (found for one in FakeRay.answers(ray, number, part) for found in (one, one))

    ray.answers = twice  # type: ignore[method-assign]
    found = [(c.example_id, c.sample, made.work()) for c in made.stream(examples(2), Sampling())]
    assert [where for *where, _ in found] == [["0", 0], ["0", 1], ["1", 0], ["1", 1]]
    assert [(work.finished, work.unread) for *_, work in found] == [(1, 1), (1, 1), (2, 0), (2, 0)]


def test_what_kills_every_worker_is_no_endless_loop(ray: FakeRay) -> None:
    made = pool(workers=2)
    ray.dies_after = dict.fromkeys(range(1, 99), 0)
    with pytest.raises(UserError) as raised:
        list(made.stream(examples(9), Sampling()))
    assert made.lost == 2 * 3 + 1 and len(made.remarks) == 6
    assert "7 workers were lost, the last one h" in str(raised.value)
    assert ": killed. Its messages are in 'log" in str(raised.value), "the first line of the reason"


def test_a_worker_that_is_lost_while_it_starts(ray: FakeRay) -> None:
    ray.states[1] = Lost("no room")
    made = pool(workers=1)
    assert made.remarks == [
        "a worker that was starting was lost: what it was at (0 examples) was decoded by another"
    ]
    assert len(ray.started) == 2 and list(made.workers) == [state(2).facts.name]


@pytest.mark.parametrize(
    ("told", "kind", "why"),
    [
        (Failed(UserError("no such model")), UserError, "^no such model$"),
        (Failed(ValueError("a bug")), Failed, "^a bug$"),
        (state(1, "0.0.1"), UserError, f"the worker on h1 has proxytune 0.0.1, and this is {__version__}:"),
    ],
)
def test_a_pool_that_cannot_begin_leaves_its_cluster(
    ray: FakeRay, told: Any, kind: type[Exception], why: str
) -> None:
    ray.states[1] = told
    with pytest.raises(kind, match=why):
        pool()
    assert ray.shut == 1 and ray.killed == [1, 2]


def test_the_first_worker_is_not_waited_for_without_end(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.wait = lambda references, num_returns, timeout: ([], references)  # type: ignore[method-assign]
    clock = iter(range(0, 10**6, 450))
    monkeypatch.setattr(ray_pool.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(UserError, match="no worker was ready within 900 seconds"):
        pool()
    assert next(clock) == 4 * 450, "900 seconds are not over at the second look"


def test_more_gpus_than_there_are(ray: FakeRay) -> None:
    ray.resources = {"GPU": 0.5}
    with pytest.raises(UserError, match=r"--gpus-per-worker 0\.75: the Ray cluster has 0\.5 GPUs"):
        pool(gpus_per_worker=0.75)
    pool(gpus_per_worker=0.5)
    del ray.resources["GPU"]
    with pytest.raises(UserError, match=r"--gpus-per-worker 0\.5: the Ray cluster has 0 GPUs"):
        pool(gpus_per_worker=0.5)


def test_a_cluster_elsewhere_is_asked_first(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = list[Any]()

    def dial(address: tuple[str, int], timeout: float) -> Any:
        dialled.append((address, timeout))
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", dial)
    pool(ray="far:6379").close()
    pool(ray="auto").close()
    assert dialled == [(("far", 6379), 5)]
    assert [settings["address"] for settings in ray.inits] == ["far:6379", "auto"]
    assert all("num_cpus" not in settings for settings in ray.inits)
    for wrong in ("far", "far:", ":6379", "far:x"):
        with pytest.raises(UserError, match="an address is HOST:PORT, or auto"):
            pool(ray=wrong)


def test_what_opens_the_pool_of_a_run(ray: FakeRay) -> None:
    spec = RunSpec(
        task="gsm",
        system=SYSTEM,
        role="base",
        alpha=TWO,
        sampling=Sampling(),
        data="generated",
        data_sha256="",
        trace="agreement",
    )
    decode, options = DecodeOptions(batch=3), RayOptions(ray="local", workers=1)
    made = ray_decoder(options, trust_remote_code=True)(spec, decode)
    assert made.setup == WorkerSetup(SYSTEM, "base", decode, True, True) and made.options is options
    plain = ray_decoder(options)(spec.model_copy(update={"trace": "tokens"}), decode)
    assert plain.setup == WorkerSetup(SYSTEM, "base", decode, False, False)


def test_how_large_parts_are() -> None:
    """An eighth of what waits for four workers, rounded up; at most what is decoded together, and at least
    four."""
    for count, most, workers, sizes in [
        (41, 99, 2, [11, 8, 6, 4, 4, 4, 4]),
        (41, 6, 2, [6, 6, 6, 6, 5, 4, 4, 4]),
        (9, 2, 4, [4, 4, 1]),
        (33, 99, 4, [5, 4, 4, 4, 4, 4, 4, 4]),
        (3, 9, 1, [3]),
    ]:
        queue, found = Queue.of([AskedExample(e, (ONE,)) for e in examples(count)], most, workers), []
        while (taken := queue.take()) is not None:
            assert taken[0] == len(found) + 1, "parts are numbered from 1"
            found.append(len(taken[1]))
            assert queue.left == count, "nothing has come back"
        assert found == sizes


def test_what_is_lost_comes_first_and_only_what_is_missing() -> None:
    given = [AskedExample(e, (ONE, TWO), ("x",)) for e in examples(9)]
    queue = Queue.of(given, 4, 1)
    taken = queue.take()
    assert taken is not None and [one.example.id for one in taken[1]] == ["0", "1", "2", "3"]
    assert queue.came(1, ("1", TWO)) and queue.came(1, ("0", ONE)) and queue.came(1, ("0", TWO))
    assert not queue.came(1, ("0", ONE)) and not queue.came(2, ("2", ONE)) and not queue.came(1, ("7", ONE))
    assert queue.left == 8 and queue.lost(1) == 3 and queue.left == 8 and queue.lost(1) == 0
    again = queue.take()
    assert again is not None
    assert [(one.example.id, one.alphas, one.texts) for one in again[1]] == [
        ("1", (ONE,), ("x",)),
        *((name, (ONE, TWO), ("x",)) for name in ("2", "3", "4")),
    ]


def test_a_worker_decodes_what_it_is_sent() -> None:
    """Responses and texts of one part, each with its own count; texts by the alphas that they have."""
    calls = list[Any]()

    class Decoder:
        remarks = ("said",)
        memory = {"base": RoleMemory(weights=1, kv_peak=2)}  # noqa: RUF012

        def sweep(self, asked: Any, sampling: Sampling, **more: Any) -> Iterator[Any]:
            calls.append(([(e.id, alphas) for e, alphas in asked], sampling, more))
            for sample in (1, 0):
                for example, alphas in asked:
                    for alpha in alphas:
                        yield alpha, Completion(example.id, sample, "", (), "length", 0.0)

        def likelihood_sweep(self, given: Any, texts: Any, alphas: Any, task: str) -> Iterator[Any]:
            calls.append(([(e.id, tuple(texts(e))) for e in given], alphas, task))
            for example in given:
                for number in range(len(texts(example))):
                    yield from (
                        (alpha, Completion(example.id, number, "", (), "length", 0.0)) for alpha in alphas
                    )

    worker = Worker(WorkerSetup(SYSTEM, "base", DecodeOptions()))
    worker.decoder = Decoder()  # type: ignore[assignment]
    a, b, c, d = examples(4)
    part = [
        AskedExample(a, (ONE, TWO)),
        AskedExample(b, (ONE,), ("x", "y", "z")),
        AskedExample(c, (TWO,), ("v",)),
        AskedExample(d, (ONE,), ("w",)),
    ]
    settings = Settings("t", Sampling(n=2), "tokens", "f")
    found = list(worker.decode(part, settings))
    assert [(one.key, [made.sample for made in one.completions]) for one in found] == [
        (("0", ONE), [0, 1]),
        (("0", TWO), [0, 1]),
        (("1", ONE), [0, 1, 2]),
        (("3", ONE), [0]),
        (("2", TWO), [0]),
    ]
    assert calls == [
        ([("0", (ONE, TWO))], settings.sampling, {"task": "t", "trace": "tokens", "forced": "f"}),
        ([("1", ("x", "y", "z")), ("3", ("w",))], (ONE,), "t"),
        ([("2", ("v",))], (TWO,), "t"),
    ]
    assert all(one.remarks == ("said",) and one.memory == Decoder.memory for one in found)
    assert all(one.process_peak > 10**7 for one in found)
    calls.clear()
    list(worker.decode(part[1:2], settings))
    assert len(calls) == 1, "no responses were asked for"
    assert list(by_alphas(part)) == [(ONE, TWO), (ONE,), (TWO,)]


@pytest.mark.parametrize("agreement", [False, True])
def test_a_worker_is_the_decoder_of_one_process(system: System, agreement: bool) -> None:
    """With all of its setup: a role, the options of decoding, the model with which agreement is traced."""
    decode, trace = DecodeOptions(batch=1, speculate="off"), "agreement" if agreement else "tokens"
    worker = Worker(WorkerSetup(system, "proxy", decode, agreement=agreement))
    state = worker.load()
    alone = Decoder(Models(system), "proxy", decode, agreement=agreement)
    assert set(state.memory) == set(alone.memory) and ("tuned" in state.memory) == agreement
    asked, settings = examples(2), Settings("gsm", Sampling(max_new_tokens=4), trace)  # type: ignore[arg-type]
    found = list(worker.decode([AskedExample(one, (ONE, TWO)) for one in asked], settings))
    made = alone.sweep(
        [(one, (ONE, TWO)) for one in asked], settings.sampling, task="gsm", trace=settings.trace
    )
    wanted = {(one.example_id, alpha): (one,) for alpha, one in made}
    assert {one.key: one.completions for one in found} == wanted and len(found) == 4
    kept = {token.divergence.keys() == {"base", "proxy"} for [one] in wanted.values() for token in one.trace}
    assert kept == {agreement}
