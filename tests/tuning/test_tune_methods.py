"""Every method on the demo's antiexpert: what it trains, that a result reads back as what was trained, and
that decoding which shares weights gives what separate models give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from proxytune.config import ModelSpec, Sampling, System, load_system
from proxytune.decoding import Decoder
from proxytune.engine.runners.runner import feed
from proxytune.errors import UserError
from proxytune.models import Models, plain
from proxytune.options import DecodeOptions
from proxytune.training_record import TrainingRecord, read_training
from proxytune.tuning import session
from proxytune.tuning.checkpoints import put_back, rest_of
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.session import TuneJob, plan, tune
from proxytune.tuning.shrink import kept_layers, without_layers
from tests.support.decoders import by_id, ragged

for package in ("trl", "bitsandbytes", "lomo_optim"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow

MODEL = "demo://antiexpert"
SETTINGS: dict[str, Any] = {
    "data": "gsm8k:generated", "limit": 16, "batch": 4, "max_steps": 5, "learning_rate": 2e-2, "warmup": 0.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 8, "validation": "0.25", "save_every": 2},
    "qlora": {"rank": 8},
    "p-tuning": {"virtual_tokens": 5},
    "lomo": {},
}
IDS = [1, 569, 28, 652, 571, 223, 19, 20]


def job_of(method: str, **settings: Any) -> TuneJob:
    return plan(method, MODEL, TuneOptions(**{**SETTINGS, **settings}))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An expert of every method."""
    root, found = tmp_path_factory.mktemp("tuned"), {}
    for method, settings in CASES.items():
        found[method] = root / method
        tune(job_of(method, **settings), found[method], show=False)
    return found


def record_of(folder: Path) -> TrainingRecord:
    found = read_training(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("method", CASES)
def test_a_method_learns_and_its_system_runs_at_once(method: str, tuned: dict[str, Path]) -> None:
    record = record_of(tuned[method])
    losses = [point.loss for point in record.curve if point.loss is not None]
    assert record.status == "finished" and len(losses) == record.steps == 5 and losses[-1] < losses[0]
    assert record.result == ("weights" if method in ("full", "lomo") else "adapter")
    assert record.antiexpert == ModelSpec(
        model=MODEL, dtype="float32", quantization="4bit" if method == "qlora" else "none"
    )
    system = load_system(tuned[method] / "system.yaml")
    models = Models(system)
    expert, antiexpert = models.get("expert"), models.get("antiexpert")
    assert (expert.module is antiexpert.module) == (record.result == "adapter")
    if expert.virtual is None:
        assert not torch.allclose(expert.logits(IDS), antiexpert.logits(IDS), atol=1e-2)


def test_the_best_weights_on_held_out_examples_are_kept(tuned: dict[str, Path]) -> None:
    record = record_of(tuned["lora"])
    held = {point.step: point.held_out for point in record.curve if point.held_out is not None}
    assert set(held) == {2, 4, 5} and record.best_step == min(held, key=lambda step: held[step])
    assert (record.examples, record.held_out) == (12, 4)


@pytest.mark.parametrize("method", ["lora", "qlora", "p-tuning"])
def test_a_result_reads_back_as_what_was_trained(method: str, tmp_path: Path) -> None:
    """The trained module in memory against what decoding loads from its files."""
    job = job_of(method, **{**CASES[method], "validation": None})
    with session._quiet_libraries():
        trainer, _ = session._trainer(job, tmp_path, None, False)
        trainer.train()
        session._write_result(job, trainer, tmp_path)
        trained: Any = trainer.model
        with torch.no_grad():
            want = trained.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    system = System(base=job.spec, antiexpert=job.spec, expert=ModelSpec(adapter=str(tmp_path)))
    decoder = Decoder(Models(system), "expert", DecodeOptions(batch=1))
    runner = decoder.ensemble.runners["expert"]
    runner.rows.reserve([64])
    runner.rows.admit()
    got = feed(runner, {0: [*decoder.loaded["expert"].virtual_ids, *IDS]})[0]
    want = want[: len(got)]
    assert torch.allclose(got.float(), want, atol=2e-4), (got.float() - want).abs().max()


WAYS = {
    "plain": DecodeOptions(batch=1, speculate="off", progress=False),
    "drafts": DecodeOptions(batch=4, speculate=3, progress=False),
    "lookup": DecodeOptions(batch=2, speculate=4, drafter="lookup", progress=False),
}


@pytest.mark.parametrize("method", ["lora", "p-tuning"])
def test_shared_decoding_equals_separate_models(method: str, layout: str, tuned: dict[str, Path]) -> None:
    """In float64: contiguous and paged caches, one prefix for several samples, drafts of every kind. Virtual
    tokens are in no response, and take no id of one."""
    adapter = str(tuned[method])
    small, large = (ModelSpec(model=f"demo://{name}", dtype="float64") for name in ("antiexpert", "base"))
    own = small.model_copy(update={"adapter": adapter})
    shared = System(base=large, antiexpert=small, expert=ModelSpec(adapter=adapter))
    apart = System(base=large, antiexpert=small, expert=own)
    sampling = Sampling(max_new_tokens=8, n=2, temperature=0.8, seed=5)
    loaded = {name: Models(system) for name, system in (("shared", shared), ("apart", apart))}
    want = responses(loaded["apart"], WAYS["plain"], sampling)
    assert loaded["apart"].get("expert").module is not loaded["apart"].get("antiexpert").module
    base = responses(loaded["apart"], WAYS["plain"], sampling, alpha=0.0)
    assert base != want
    for name, way in WAYS.items():
        got = responses(loaded["shared"], way, sampling)
        assert got == want, name
        assert all(token < loaded["shared"].get("base").size for ids, _ in got.values() for token in ids)


def responses(models: Models, way: DecodeOptions, sampling: Sampling, alpha: float = 1.0) -> dict[Any, Any]:
    system = models.system.model_copy(update={"alpha": models.system.alpha.model_copy(update={"end": alpha})})
    models = dataclasses.replace(models, system=system)
    found = by_id(list(Decoder(models, "proxy", way).stream(ragged(3, 3), sampling)))
    return {where: (c.token_ids, c.text) for where, c in found.items()}


def test_lomo_is_sgd_step_by_step_and_holds_few_gradients(tmp_path: Path) -> None:
    """The same batches by torch's SGD through the same loop, in float32; and the gradients that are there,
    looked at whenever one is finished."""
    found: dict[str, tuple[list[float], dict[str, Tensor], int]] = {}
    for optim in ("lomo", "sgd"):
        job = job_of("lomo", learning_rate=5e-2)
        with session._quiet_libraries():
            trainer, _ = session._trainer(job, tmp_path / optim, None, False)
            trainer.args.optim = optim
            most = watch_gradients(trainer.model)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        found[optim] = losses, weights, max(most)
    (losses, weights, most), (sgd_losses, sgd_weights, sgd_most) = found["lomo"], found["sgd"]
    assert losses == sgd_losses
    assert all(torch.equal(weights[name], sgd_weights[name]) for name in weights)
    sizes = sorted(p.numel() * 4 for p in weights.values())
    assert sgd_most == sum(sizes)
    assert most <= sizes[-1] + sizes[-2] < 0.6 * sgd_most  # half of this model is its embeddings


def watch_gradients(model: nn.Module) -> list[int]:
    """Bytes of all gradients that are there, each time one is finished."""
    parameters, most = list(model.parameters()), [0]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    return most


def test_the_loss_through_the_base_is_that_of_the_proxy(tmp_path: Path) -> None:
    """By its definition, from separate forwards; and only the expert learns."""
    job = job_of("lora", rank=8, dropout=0.0, through="base", base="demo://base", alpha=1.5, batch=2)
    base, antiexpert = (
        plain.load(ModelSpec(model=f"demo://{n}", dtype="float32")) for n in ("base", "antiexpert")
    )
    with session._quiet_libraries():
        trainer, _ = session._trainer(job, tmp_path, None, False)
        model: Any = trainer.model
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        loss = trainer.compute_loss(model.eval(), dict(batch))
        loss.backward()
    total, count = torch.tensor(0.0), 0
    with torch.no_grad():
        for row in range(2):
            labels = batch["labels"][row]
            n = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :n]
            b, e, a = (m(input_ids=ids).logits[0] for m in (base, model, antiexpert))
            logs = (b + 1.5 * (e - a)).log_softmax(-1)
            for at in range(1, n):
                if labels[at] >= 0:
                    total, count = total - logs[at - 1, labels[at]], count + 1
    assert torch.isclose(loss.detach(), total / count, atol=1e-5)
    assert all(p.grad is None for p in trainer.steering.base.parameters())
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_the_network_behind_a_soft_prompt_is_kept(tmp_path: Path) -> None:
    job = job_of("p-tuning", virtual_tokens=3)
    first, second = (job.method.prepare(plain.load(job.spec), job.options) for _ in range(2))
    kept = rest_of(first, None)
    assert {"lstm_head", "mlp_head", "embedding"} <= {name.split(".")[2] for name in kept}
    put_back(kept, second, None)
    assert all(torch.equal(value, rest_of(second, None)[name]) for name, value in kept.items())


def test_merged_weights_are_the_model_with_its_adapter(tuned: dict[str, Path], tmp_path: Path) -> None:
    spec = ModelSpec(model=MODEL, adapter=str(tuned["lora"]), dtype="float32")
    plain.merge(spec, tmp_path / "merged")
    system = load_system(tuned["lora"] / "system.yaml")
    merged = System(base=ModelSpec(model=str(tmp_path / "merged"), dtype="float32"))
    want, got = Models(system).get("expert").logits(IDS), Models(merged).get("base").logits(IDS)
    assert torch.allclose(want, got, atol=1e-4)
    with pytest.raises(UserError, match="is not empty"):
        plain.merge(spec, tmp_path / "merged")
    with pytest.raises(UserError, match="is a soft prompt"):
        plain.merge(spec.model_copy(update={"adapter": str(tuned["p-tuning"])}), tmp_path / "m")


@pytest.mark.parametrize("method", ["lora", "p-tuning"])
def test_an_adapter_of_another_model_is_one_line(method: str, tuned: dict[str, Path]) -> None:
    base = ModelSpec(model="demo://base", dtype="float32")
    system = System(base=base, antiexpert=base, expert=ModelSpec(adapter=str(tuned[method])))
    with pytest.raises(UserError) as raised:
        Models(system).get("expert")
    assert str(tuned[method]) in str(raised.value) and "\n" not in str(raised.value)


def test_a_finished_training_is_read_and_another_one_is_refused(tuned: dict[str, Path]) -> None:
    folder = tuned["full"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    again = tune(job_of("full"), folder, show=False)
    assert again == record_of(folder) and (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another training \(seed 0 -> 1\)"):
        tune(job_of("full", seed=1), folder, show=False)
    with pytest.raises(UserError, match="is not empty and holds no training"):
        tune(job_of("full"), folder.parent, show=False)


def test_a_training_is_known_by_its_examples_not_by_their_file(
    tuned: dict[str, Path], tmp_path: Path
) -> None:
    job, folder = job_of("full"), tuned["full"]
    moved = tmp_path / "moved.jsonl"
    pairs = [{"prompt": one.messages[-1][1], "completion": one.completion} for one in job.data.train]
    moved.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert tune(job_of("full", data=str(moved), limit=None), folder, show=False) == record_of(folder)
    with pytest.raises(UserError, match="holds another training \\(data_sha256 "):
        tune(job_of("full", data=str(moved), limit=len(pairs) - 1), folder, show=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_weights_are_safetensors_only(tuned: dict[str, Path]) -> None:
    for folder in tuned.values():
        names = {path.suffix for path in folder.iterdir()}
        assert ".safetensors" in names and not names & {".bin", ".pt", ".pth"}
        assert load_file(next(folder.glob("*model.safetensors")))


def test_a_model_without_layers_learns_the_whole_one_s_distribution(tmp_path: Path) -> None:
    """Which layers are kept, and the loss of --teacher by its definition."""
    assert kept_layers(30, 15)[:2] == [0, 2] and kept_layers(30, 15)[-1] == 29 and kept_layers(5, 1) == [0]
    without_layers("demo://base", 2, tmp_path / "bare")
    whole, bare = (
        plain.load(ModelSpec(model=model, dtype="float32"))
        for model in ("demo://base", str(tmp_path / "bare"))
    )
    assert bare.config.num_hidden_layers == 2 == len(bare.model.layers)
    last = dict(whole.model.layers[3].named_parameters())
    assert all(torch.equal(p, last[name]) for name, p in bare.model.layers[1].named_parameters())
    settings = {**SETTINGS, "teacher": "demo://base", "limit": 4, "learning_rate": 1e-3}
    job = plan("full", str(tmp_path / "bare"), TuneOptions(**settings))
    with session._quiet_libraries():
        trainer, _ = session._trainer(job, tmp_path / "out", None, False)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
            p, q = (m(input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1) for m in (whole, bare))
        learned = batch["labels"][0, 1:] >= 0
        assert torch.isclose(loss, (p.exp() * (p - q)).sum(-1)[learned].mean(), atol=1e-5)
        trainer.train()  # all examples in every batch
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="has 4, of which 1 to 3 can be kept"):
        without_layers("demo://base", 4, tmp_path / "other")
