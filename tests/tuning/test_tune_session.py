"""What a training asks of trl, and its own losses, in the place of which a stand-in is here: so these take
milliseconds. That trl does it is tried in test_tune_methods.py."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.training_record import read_training
from proxytune.tuning import session
from proxytune.tuning.estimate import MemoryEstimate
from proxytune.tuning.examples import TuneData
from proxytune.tuning.methods import METHODS
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.tokens import NOT_LEARNED, TokenRows

ROWS = TokenRows(((1, 2, 3), (4, 5)), ((NOT_LEARNED, 2, 3), (NOT_LEARNED, 5)), cut=2, joined=3)
NOTHING = TokenRows((), ())


def job(method: str = "lora", held: TokenRows = NOTHING, **settings: Any) -> session.TuneJob:
    """A training of two examples."""
    words: Any = SimpleNamespace(
        convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids],
        save_pretrained=lambda out: (out / "tokenizer.json").write_text("own"),
    )
    return session.TuneJob(
        METHODS[method], ModelSpec(model="small", dtype="bfloat16", chat="llama2", revision="v2"),
        TuneOptions(**settings), TuneData((), (), "abc"), ROWS, held, words,
        MemoryEstimate(50, 7, {"weights": 3.0, "gradients": 4.5}), notes=("noted",),
    )  # fmt: skip


# The request


def test_what_decides_the_weights() -> None:
    asked = job(report_to=("wandb",), base="large", seed=3, alpha=1.5).request
    assert (asked.method, asked.model, asked.revision, asked.data_sha256) == ("lora", "small", "v2", "abc")
    assert asked.settings == {
        **TuneOptions(seed=3, alpha=1.5).model_dump(mode="json", exclude={"report_to", "base"}),
        "learning_rate": 1e-4,
    }
    through = job(base="large", through="base").request.settings
    assert through["base"] == "large" and "report_to" not in through


def test_the_learning_rate_and_the_base_have_defaults() -> None:
    assert job("full").learning_rate == 2e-5 and job("full", learning_rate=0.5).learning_rate == 0.5
    assert job().base == job().spec
    assert job(base="large").base == ModelSpec(model="large", dtype="bfloat16")


@pytest.mark.parametrize(
    ("window", "most", "virtual", "room"),
    [(None, 900, 5, 900), (100, 900, 5, 95), (100, 90, 5, 90), (100, 96, 5, 95), (100, 900, 99, 1)],
)
def test_an_example_fits_into_the_window(window: int | None, most: int, virtual: int, room: int) -> None:
    config = SimpleNamespace() if window is None else SimpleNamespace(max_position_embeddings=window)
    skeleton: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert session._window(skeleton, ModelSpec(model="m"), most, virtual, TuneData((), (), "")) == room
    if window is not None:
        with pytest.raises(UserError, match="--virtual-tokens 100: 'm' takes 100 tokens in all"):
            session._window(skeleton, ModelSpec(model="m"), most, window, TuneData((), (), ""))


@pytest.mark.parametrize(
    ("method", "settings", "expected", "asked"),
    [
        ("lora", {}, 0.0, []),
        ("lora", {"base": "large"}, 0.0, []),
        ("lora", {"base": "large", "through": "base"}, 70.0, ["large"]),
        ("full", {"base": "large", "through": "base"}, 79.0, ["large"]),
        ("full", {"base": "large", "teacher": "wise"}, 70.0, ["wise"]),
    ],
)
def test_memory_of_the_models_that_run_beside_the_expert(
    method: str, settings: Any, expected: float, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def one_vocabulary(other: ModelSpec, own: ModelSpec) -> int:
        assert (own.model, other.dtype) == ("small", "bfloat16")
        seen.append(other.model)
        return 3

    monkeypatch.setattr(session.plain, "check", lambda spec: (None, 70.0))
    monkeypatch.setattr(session.plain, "require_one_vocabulary", one_vocabulary)
    spec = ModelSpec(model="small", dtype="bfloat16")
    assert session._others(spec, TuneOptions(**settings), METHODS[method], 9.0) == expected
    assert seen == asked


def test_what_was_done_to_the_examples_is_noted() -> None:
    held = TokenRows((), (), cut=5, joined=0)
    cut, joined = session._notes(ROWS, held, TuneOptions(max_length=33))
    assert cut == "7 completions were cut at 33 tokens: their ends are not learned"
    assert joined.startswith("3 prompts are tokenised otherwise where their completion follows: ")
    assert session._notes(NOTHING, NOTHING, TuneOptions()) == ()
    assert len(session._notes(NOTHING, held, TuneOptions())) == 1


# The folder


def test_a_record_is_begun_with_all_that_is_known(tmp_path: Path) -> None:
    begun = session._begun(job(held=TokenRows(((1,),), ((1,),))))
    assert begun.model_dump(include={
        "status", "result", "examples", "held_out", "tokens", "learned", "cut", "parameters", "trainable",
        "estimated_bytes", "notes",
    }) == {
        "status": "unfinished", "result": "adapter", "examples": 2, "held_out": 1, "tokens": 5,
        "learned": {"t2": 1, "t3": 1, "t5": 1}, "cut": 2, "parameters": 50, "trainable": 7,
        "estimated_bytes": 7.5, "notes": ("noted",),
    }  # fmt: skip
    assert begun.antiexpert == ModelSpec(model="small", dtype="bfloat16", revision="v2"), "in no chat format"
    assert begun.request == job().request and begun.provenance.device == "cpu"
    assert session._read_own(job(), tmp_path) is None
    (tmp_path / ".writer").touch()
    assert session._read_own(job(), tmp_path) is None, "another process of this training may have begun"
    begun.write(tmp_path)
    assert session._read_own(job(), tmp_path) == begun == read_training(tmp_path)
    with pytest.raises(UserError, match=r"holds another training \(rank 64 -> 8\)"):
        session._read_own(job(rank=8), tmp_path)
    (tmp_path / "training.json").rename(tmp_path / "other.json")
    with pytest.raises(UserError, match="is not empty and holds no training"):
        session._read_own(job(), tmp_path)


class Owner:
    """In the place of a folder's owner: says what is done with it."""

    told: ClassVar[list[str]] = []

    def __init__(self, out: Path) -> None:
        self.out = out

    def __getattr__(self, name: str) -> Any:
        return lambda: Owner.told.append(name)


@pytest.mark.parametrize(
    ("first", "status", "done", "shown"),
    [
        (True, None, ["room", "take", "train", "release"], True),
        (True, "unfinished", ["room", "take", "train", "release"], True),
        (True, "finished", ["tidy", "release"], None), (False, None, ["train"], False),
        (False, "unfinished", ["train"], False), (False, "finished", [], None),
    ],
)  # fmt: skip
def test_who_trains_and_what_is_read(
    first: bool,
    status: Any,
    done: list[str],
    shown: bool | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    there = None if status is None else session._begun(job()).model_copy(update={"status": status})
    trained = list[Any]()

    def train(*given: Any) -> str:
        Owner.told.append("train")
        trained.append(given[1:])
        return "trained"

    Owner.told.clear()
    monkeypatch.setattr(session, "is_first", lambda: first)
    monkeypatch.setattr(session, "FolderOwner", Owner)
    monkeypatch.setattr(session, "_read_own", lambda job, out: there)
    monkeypatch.setattr(session, "_train", train)
    monkeypatch.setattr(MemoryEstimate, "require_room", lambda self: Owner.told.append("room"))
    found: Any = session.tune(job(), tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and Owner.told == done
    assert found == (there if shown is None else "trained")
    assert trained == ([] if shown is None else [(tmp_path / "a" / "b", there, shown)])


@pytest.mark.parametrize(("first", "resumed"), [(True, False), (True, True), (False, True)])
def test_what_a_training_records(
    first: bool, resumed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = SimpleNamespace(
        log_history=[{"step": 1, "loss": 2.5}], global_step=40, max_steps=41, epoch=1.234567,
        num_input_tokens_seen=98765.0,
    )  # fmt: skip
    began, systems = list[Any](), list[Any]()
    trainer = SimpleNamespace(state=state, train=lambda **how: began.append(how))
    watch = SimpleNamespace(seconds=61.23456, cpu_seconds=50.98765, before_bytes=11)
    monkeypatch.setattr(session, "is_first", lambda: first)
    monkeypatch.setattr(session, "newest", lambda out: tmp_path / "checkpoint-3" if resumed else None)
    monkeypatch.setattr(session, "_trainer", lambda *given: (trainer, watch))
    monkeypatch.setattr(session, "_write_result", lambda *given: 30)
    monkeypatch.setattr(session, "peak_bytes", lambda: 77)
    monkeypatch.setattr(session, "write_system", lambda *given: systems.append(given))
    (tmp_path / "checkpoints").mkdir()
    there = session._begun(job()).model_copy(update={"resumed": 4}) if resumed else None
    made = session._train(job(), tmp_path, there, True)
    assert began == [{"resume_from_checkpoint": str(tmp_path / "checkpoint-3") if resumed else None}]
    assert made.model_dump(include={
        "status", "steps", "epochs", "best_step", "stopped_early", "seconds", "cpu_seconds", "tokens_seen",
        "peak_bytes", "before_bytes", "resumed",
    }) == {
        "status": "finished", "steps": 40, "epochs": 1.2346, "best_step": 30 if first else None,
        "stopped_early": True, "seconds": 61.235, "cpu_seconds": 50.988, "tokens_seen": 98765,
        "peak_bytes": 77, "before_bytes": 11, "resumed": 5 if resumed else 0,
    }  # fmt: skip
    assert made.curve[0].loss == 2.5 and (tmp_path / "checkpoints").exists() is not first
    assert read_training(tmp_path) == (made if first else None)
    own = job()
    assert systems == ([(own.spec, own.base, "adapter", own.options, tmp_path)] if first else [])
    state.global_step = 41
    assert session._train(job(), tmp_path, there, True).stopped_early is False


def trainer_at(best: Path | None, best_step: int, step: int, saved: list[Any]) -> Any:
    """A trainer whose model says where it is saved."""
    model = SimpleNamespace(save_pretrained=lambda out, **more: saved.append((out, more)))
    state = SimpleNamespace(
        best_model_checkpoint=None if best is None else str(best), best_global_step=best_step,
        global_step=step,
    )  # fmt: skip
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    return SimpleNamespace(state=state, model=model, accelerator=accelerator)


@pytest.mark.parametrize(
    ("method", "copied"),
    [
        ("lora", {"adapter_config.json", "adapter_model.safetensors"}),
        ("full", {
            "config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors",
            "model.safetensors.index.json", "tokenizer.json",
        }),
    ],
)  # fmt: skip
def test_the_best_weights_are_copied_out_of_their_checkpoint(
    method: str, copied: set[str], tmp_path: Path
) -> None:
    best, out, saved = tmp_path / "best", tmp_path / "out", list[Any]()
    best.mkdir()
    out.mkdir()
    for name in (
        "config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors",
        "proxytune.safetensors", "model.safetensors.index.json", "optimizer.pt", "trainer_state.json",
    ):  # fmt: skip
        (best / name).write_text(name)
    (out / "README.md").touch()
    assert session._write_result(job(method), trainer_at(best, 3, 5, saved), out) == 3
    assert {path.name for path in out.iterdir()} == copied and saved == []


@pytest.mark.parametrize(("method", "more"), [("lora", {"save_embedding_layers": False}), ("full", {})])
def test_the_last_weights_are_written_where_they_are_the_best(
    method: str, more: dict[str, bool], tmp_path: Path
) -> None:
    for best, step in ((tmp_path / "best", 5), (None, 0)):
        saved = list[Any]()
        found = session._write_result(job(method), trainer_at(best, step, 5, saved), tmp_path)
        assert found == (None if best is None else 5) and saved == [(tmp_path, more)]
        assert (tmp_path / "tokenizer.json").exists() == (method == "full")


# What is asked of trl


@pytest.fixture
def asked_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """trl, whose configuration is what it is given."""
    trl = ModuleType("trl")
    trl.SFTConfig = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", trl)


PLAIN = {
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.03, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "num_train_epochs": 2.0, "max_steps": -1, "optim": "adamw_torch", "bf16": False,
    "gradient_checkpointing": False, "seed": 0, "data_seed": 0, "save_strategy": "epoch", "save_steps": 500,
    "save_total_limit": 2, "eval_strategy": "no", "eval_steps": None, "metric_for_best_model": None,
    "greater_is_better": None, "restore_callback_states_from_checkpoint": False, "logging_steps": 1,
    "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "non_padding", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "max_length": None,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "settings", "held", "changed"),
    [
        ("lora", {}, False, {}),
        (
            "lora",
            {
                "batch": 3, "accumulate": 4, "learning_rate": 0.5, "schedule": "constant", "warmup": 0.25,
                "weight_decay": 0.125, "clip": 0.75, "epochs": 1.5, "bf16": True, "seed": 7,
                "checkpoint_activations": True, "report_to": ("wandb", "trackio"), "patience": 2,
            },
            False,
            {
                "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3,
                "gradient_accumulation_steps": 4, "learning_rate": 0.5,
                "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.25, "weight_decay": 0.125,
                "max_grad_norm": 0.75, "num_train_epochs": 1.5, "bf16": True, "seed": 7, "data_seed": 7,
                "gradient_checkpointing": True, "report_to": ["wandb", "trackio"],
                "restore_callback_states_from_checkpoint": True,
            },
        ),
        (
            "lora",
            {"schedule": "cosine", "max_steps": 9, "save_every": 4},
            True,
            {
                "lr_scheduler_type": "cosine", "max_steps": 9, "save_strategy": "steps", "save_steps": 4,
                "eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "eval_loss",
                "greater_is_better": False,
            },
        ),
        ("full", {"save_every": 4}, False, {
            "learning_rate": 2e-5, "save_strategy": "steps", "save_steps": 4,
        }),
        ("lomo", {}, True, {
            "learning_rate": 3e-2, "optim": "lomo", "max_grad_norm": 0.0, "eval_strategy": "epoch",
            "metric_for_best_model": "eval_loss", "greater_is_better": False,
        }),
    ],
)  # fmt: skip
def test_the_options_as_trl_has_them(
    method: str, settings: Any, held: bool, changed: Any, asked_of_trl: None, tmp_path: Path
) -> None:
    found: Any = session.arguments(job(method, ROWS if held else NOTHING, **settings), tmp_path)
    assert found == {**PLAIN, "output_dir": str(tmp_path / "checkpoints"), **changed}


def test_a_data_set_has_ids_and_labels() -> None:
    found = session._dataset(ROWS)
    assert found.to_list() == [
        {"input_ids": [1, 2, 3], "labels": [NOT_LEARNED, 2, 3]},
        {"input_ids": [4, 5], "labels": [NOT_LEARNED, 5]},
    ]


# Losses


class StandIn:
    """As much of SFTTrainer as its losses need."""

    def __init__(self, model: nn.Module, processes: int = 1, average: bool = False) -> None:
        self.model = model
        self.args = SimpleNamespace(average_tokens_across_devices=average)
        self.accelerator = SimpleNamespace(num_processes=processes, unwrap_model=lambda wrapped: wrapped)
        self._metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}

    def compute_loss(self, *given: Any) -> Any:
        """trl's own."""
        return ("trl's own", *given[2:])


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """proxytune.tuning.trainer on the stand-in."""
    trl = ModuleType("trl")
    trl.SFTTrainer = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", trl)
    path = Path(session.__file__).with_name("trainer.py")
    spec = importlib.util.spec_from_file_location("trainer_on_a_stand_in", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


class Table(nn.Module):
    """A model whose logits follow from the token alone; `virtual` positions come before it, as a soft
    prompt's do."""

    def __init__(self, seed: int, words: int = 5, virtual: int = 0) -> None:
        super().__init__()
        made = torch.randn(6, words, generator=torch.Generator().manual_seed(seed))
        self.rows, self.virtual, self.off = nn.Parameter(made), virtual, False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        """Logits of every position; zeros where its adapter is off."""
        assert attention_mask.shape == input_ids.shape and not use_cache
        logits = self.rows[input_ids] * (0.0 if self.off else 1.0)
        before = torch.full((len(input_ids), 0 if self.off else self.virtual, logits.shape[-1]), 99.0)
        return SimpleNamespace(logits=torch.cat([before, logits], dim=1))

    @contextmanager
    def disable_adapter(self) -> Any:
        """Without what was tuned."""
        self.off = True
        yield
        self.off = False


IDS = [[1, 2, 3, 4], [4, 3, 2, 0]]
LABELS = [[NOT_LEARNED, NOT_LEARNED, 3, 4], [NOT_LEARNED, 3, NOT_LEARNED, NOT_LEARNED]]
LEARNED = [(0, 1, 3), (0, 2, 4), (1, 0, 3)]
"""Row, the position that predicts, and the token that is predicted."""


def inputs() -> dict[str, Tensor]:
    """Two examples with three learned tokens."""
    return {
        "input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
    }  # fmt: skip


@pytest.mark.parametrize("apart", [True, False])
def test_the_loss_of_the_whole_proxy(losses: Any, apart: bool) -> None:
    expert, base, antiexpert = Table(1, virtual=2), Table(2, words=7), Table(3, words=6)
    trainer = losses.ExpertTrainer(expert)
    trainer.steering = losses.Steering(base, antiexpert if apart else None, 1.5, 5)
    total, right = 0.0, 0
    for row, at, token in LEARNED:
        b, e, a = (m.rows[IDS[row][at]][:5] for m in (base, expert, antiexpert))
        logits = b + 1.5 * (e - (a if apart else 0.0))
        total -= logits.log_softmax(-1)[token].item()
        right += int(logits.argmax()) == token
    loss = trainer.compute_loss(expert, inputs())
    assert loss.item() == pytest.approx(total / 3, abs=1e-5)
    assert trainer._metrics["train"]["mean_token_accuracy"] == [pytest.approx(right / 3)]
    loss.backward()
    assert expert.rows.grad is not None and base.rows.grad is None and antiexpert.rows.grad is None


def test_the_loss_of_a_teacher(losses: Any) -> None:
    """KL(teacher || student) over the words that both have."""
    expert, teacher = Table(1), Table(2, words=7)
    trainer = losses.ExpertTrainer(expert.eval())
    trainer.teacher = teacher
    total = 0.0
    for row, at, _ in LEARNED:
        p, q = (m.rows[IDS[row][at]][:5].log_softmax(-1) for m in (teacher, expert))
        total += (p.exp() * (p - q)).sum().item()
    assert trainer.compute_loss(expert, inputs()).item() == pytest.approx(total / 3, abs=1e-5)
    assert list(trainer._metrics["train"]) == [] and len(trainer._metrics["eval"]["mean_token_accuracy"]) == 1
    assert teacher.rows.grad is None


def test_a_loss_is_over_the_tokens_of_all_batches_of_a_step(losses: Any) -> None:
    expert = Table(1)
    teacher = Table(2)

    def loss(count: Any, **more: Any) -> float:
        trainer = losses.ExpertTrainer(expert, **more)
        trainer.teacher = teacher
        found: Tensor = trainer.compute_loss(expert, inputs(), False, count)
        return found.item()

    total = 3 * loss(None)
    assert loss(12) == pytest.approx(total / 12) and loss(torch.tensor(12)) == pytest.approx(total / 12)
    assert loss(12, processes=4) == pytest.approx(total / 12)
    assert loss(12, processes=4, average=True) == pytest.approx(total / 3)
    assert loss(None, processes=4, average=True) == pytest.approx(total / 3)
    nothing = {**inputs(), "labels": torch.full((2, 4), NOT_LEARNED)}
    trainer = losses.ExpertTrainer(expert)
    trainer.teacher = teacher
    assert trainer.compute_loss(expert, nothing).item() == 0.0
    assert trainer._metrics["train"]["mean_token_accuracy"] == [0.0]


def test_without_another_model_the_loss_is_trl_s(losses: Any) -> None:
    found = losses.ExpertTrainer(Table(1)).compute_loss(None, inputs(), True, 5)
    assert found == ("trl's own", True, 5)
