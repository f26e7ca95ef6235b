"""The parts of a training one by one, on numbers that are worked out by hand: what it will take, what a
person sees of it, which tokens are learned, what is kept of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.training_record import CurvePoint
from proxytune.tuning import estimate as estimates
from proxytune.tuning import options as tune_options
from proxytune.tuning import shrink, tokens, training, watch
from proxytune.tuning.checkpoints import FOLDER, REST, WHOLE, WholeCheckpoints, put_back, rest_of
from proxytune.tuning.estimate import GIB, LIBRARIES, MemoryEstimate, Shape
from proxytune.tuning.examples import TuneExample
from proxytune.tuning.methods import METHODS
from proxytune.tuning.options import TuneOptions
from proxytune.tuning.system_file import write_system
from proxytune.tuning.training import TrainingExample, TuneConfig

# What it will take


def config(**more: Any) -> Any:
    """A model of 3 layers of 8, whose 4 heads share 2 of keys, with 11 words."""
    made = {
        "hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 11, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 20, **more,
    }  # fmt: skip
    found = SimpleNamespace(**made)
    found.get_text_config = lambda: found
    return found


def shape(**more: Any) -> Shape:
    """A batch of 2 examples of 5 tokens, computed in 2 bytes."""
    made = {"batch": 2, "longest": 5, "itemsize": 4, "computed": 2, "recomputed": False, "adapter": False}
    return Shape(**{**made, "through": False, **more})


@pytest.mark.parametrize(
    ("changes", "job", "expected"),
    [
        # a layer keeps 8 * 8 + 2 * 4 + 4 * 20 = 152 numbers of a token, the head 3 * 11 in 4 bytes
        ({}, {}, 10 * (3 * 152 * 2 + 33 * 4)),
        ({}, {"computed": 4}, 10 * (3 * 152 * 4 + 33 * 4)),
        ({}, {"batch": 3}, 15 * (3 * 152 * 2 + 33 * 4)),
        ({}, {"adapter": True}, 10 * (3 * (152 + 4 * 8 + 20) * 2 + 33 * 4)),
        ({}, {"recomputed": True}, 10 * ((3 * 8 + 152) * 2 + 33 * 4)),
        ({}, {"through": True}, 10 * (3 * 152 * 2 + 99 * 4)),
        ({"intermediate_size": None}, {}, 10 * (3 * (64 + 8 + 4 * 32) * 2 + 33 * 4)),
        ({"head_dim": 7}, {}, 10 * (3 * (64 + 2 * 14 + 80) * 2 + 33 * 4)),
        ({"num_key_value_heads": None}, {}, 10 * (3 * (64 + 2 * 8 + 80) * 2 + 33 * 4)),
    ],
)
def test_what_the_backward_pass_needs(changes: Any, job: Any, expected: int) -> None:
    assert estimates.activations(config(**changes), shape(**job)) == expected


class Small(nn.Module):
    """12 and 6 numbers that are trained, and 10 that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4, False), nn.Linear(2, 3, False), nn.Linear(5, 2, False)
        self.c.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("lora", {"weights": 1000 + 4 * 18, "gradients": 4 * 18, "optimiser": 2 * 4 * 18}),
        ("full", {"weights": 1000, "gradients": 2 * 18, "optimiser": 2 * 4 * 18}),
        ("lomo", {"weights": 1000, "gradients": 4 * 3 * 12}),
    ],
)
def test_memory_by_parts(method: str, parts: dict[str, float]) -> None:
    found = estimates.estimate(Small(), config(), 1000, METHODS[method], shape(itemsize=2, others=500.0))
    activations = 10 * (3 * 152 * 2 + 33 * 4)
    parts |= {"activations": activations, "other models": 500, "libraries": LIBRARIES}
    assert found.parts == parts and found.bytes == sum(parts.values())
    assert (found.parameters, found.trainable) == (28, 18)
    alone = estimates.estimate(Small(), config(), 1000, METHODS[method], shape(itemsize=2))
    assert alone.parts.keys() == parts.keys() - {"other models"}


def test_a_training_that_just_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need = MemoryEstimate(5, 3, {"weights": 1.5 * GIB, "gradients": 0.05 * GIB, "optimiser": 0.25 * GIB})
    monkeypatch.setattr(estimates, "free_memory", lambda: need.bytes)
    need.require_room()
    monkeypatch.setattr(estimates, "free_memory", lambda: need.bytes - 1)
    with pytest.raises(UserError, match=r"about 1.8 GiB \(weights 1.5, optimiser 0.2\), and 1.8 GiB are"):
        need.require_room()


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("full", {}, (3, 7, 4, 4, False, False, False)),
        ("lora", {"bf16": True}, (3, 7, 4, 2, False, True, False)),
        ("lora", {"dtype": "bfloat16", "teacher": "t"}, (3, 7, 2, 2, False, True, True)),
        ("p-tuning", {"virtual_tokens": 5}, (3, 12, 4, 4, False, False, False)),
        ("full", {"through": "base", "checkpoint_activations": True}, (3, 7, 4, 4, True, False, True)),
    ],
)
def test_the_shape_of_a_batch(method: str, settings: Any, expected: tuple[object, ...]) -> None:
    found = Shape.of(TuneOptions(batch=3, **settings), METHODS[method], 7, 9.0)
    own = (found.batch, found.longest, found.itemsize, found.computed, found.recomputed)
    assert (*own, found.adapter, found.through) == expected and found.others == 9.0


# What a person sees


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of a watch, and what it says."""
    state = SimpleNamespace(now=100.0, cpu=3.0, said=[])
    times = SimpleNamespace(monotonic=lambda: state.now, process_time=lambda: state.cpu)
    monkeypatch.setattr(watch, "time", times)
    monkeypatch.setattr(watch, "peak_bytes", lambda: 3 * 2**29)
    monkeypatch.setattr(watch, "say", state.said.append)
    return state


def test_a_line_now_and_then_in_a_log(clock: SimpleNamespace) -> None:
    with watch.TrainingLine("t", 30) as line:
        for now, step, loss, seen, rate in ((109.9, 1, 2.0, 50, 1e-4), (110.0, 2, 1.0, 110, None)):
            clock.now = now
            line.at(step, loss, seen, rate)
        assert clock.said == ["t 2/30: loss 1.500, 11 tokens/s, 1.50 GiB, 140 s left"]
        clock.now = 119.9
        line.at(3, 3.0, 199, 1e-4)
        assert len(clock.said) == 1, "not yet 10 seconds since"
        line.at(30, 2.0, 398, 2.5e-5)
        assert clock.said[1:] == [
            "t 30/30: loss 2.000, learning rate 2.50e-05, 20 tokens/s, 1.50 GiB, 0 s left"
        ]
    assert line.losses == [2.0, 1.0, 3.0, 2.0]


def test_a_training_that_goes_on_counts_from_where_it_went_on(clock: SimpleNamespace) -> None:
    with watch.TrainingLine("t", 30) as line:
        line.at(11, 1.0, 500)
        clock.now = 120.0
        line.at(12, 1.0, 560)
    # 2 steps in 20 seconds, and 60 tokens: what came before this part is not in it
    assert clock.said == ["t 12/30: loss 1.000, 3 tokens/s, 1.50 GiB, 180 s left"]


def test_the_loss_is_a_mean_of_the_last_twenty(clock: SimpleNamespace) -> None:
    with watch.TrainingLine("t", 25) as line, watch.TrainingLine("mute", 1, shown=False) as mute:
        for step in range(1, 26):
            line.at(step, 100.0 if step <= 5 else float(step), step)
        mute.at(1, 1.0, 1)
    [said] = clock.said
    assert said.startswith("t 25/25: loss 15.500,")  # (6 + ... + 25) / 20


def test_a_watch_keeps_the_time_of_the_loop(clock: SimpleNamespace) -> None:
    state = SimpleNamespace(max_steps=9, is_world_process_zero=True, global_step=5, num_input_tokens_seen=40)
    kept = watch.Watch("t", True)
    kept.on_log(None, state, None, {"loss": 1.0})
    assert clock.said == [] and kept.before_bytes == 3 * 2**29
    kept.on_train_begin(None, state, None)
    clock.now, clock.cpu = 112.5, 5.25
    kept.on_log(None, state, None, {"loss": 1.0, "learning_rate": 0.5})
    kept.on_log(None, state, None, {"eval_loss": 0.12345})
    kept.on_log(None, state, None)
    kept.on_train_end(None, state, None)
    assert (kept.seconds, kept.cpu_seconds) == (12.5, 2.25)
    assert [said.partition(",")[0] for said in clock.said] == [
        "t 5/9: loss 1.000",
        "t 5/9: held-out loss 0.1235",
    ]
    assert "learning rate 5.00e-01" in clock.said[0]


@pytest.mark.parametrize(("shown", "first"), [(True, False), (False, True)])
def test_one_process_speaks_and_only_where_it_is_asked_to(
    clock: SimpleNamespace, shown: bool, first: bool
) -> None:
    state = SimpleNamespace(max_steps=1, is_world_process_zero=first, global_step=1, num_input_tokens_seen=4)
    kept = watch.Watch("t", shown)
    kept.on_train_begin(None, state, None)
    kept.on_log(None, state, None, {"loss": 1.0, "eval_loss": 1.0})
    kept.on_train_end(None, state, None)
    assert clock.said == []


def test_a_log_becomes_a_curve_by_steps() -> None:
    history = [
        {"step": 2, "loss": 0.5, "learning_rate": 0.25, "epoch": 9.0}, {"step": 2, "eval_loss": 0.75},
        {"step": 1, "loss": 1.5}, {"step": 3, "train_runtime": 1.0},
    ]  # fmt: skip
    assert watch.curve_of(history) == [
        CurvePoint(step=1, loss=1.5), CurvePoint(step=2, loss=0.5, held_out=0.75, learning_rate=0.25),
    ]  # fmt: skip


# Which tokens are learned


def letters(spec: ModelSpec, tokenizer: Any, text: str) -> tuple[int, ...]:
    """A letter is a token; "z" and the space after it are one."""
    return tuple(map(ord, text.replace("z ", "Z")))


def encoded(monkeypatch: pytest.MonkeyPatch, most: int, *pairs: tuple[str, str]) -> tokens.TokenRows:
    """Prompts and completions in letters; the end of a sequence is an exclamation mark."""
    monkeypatch.setattr(tokens, "ids_of", letters)
    asked = [TuneExample((("user", prompt),), text, "line 4") for prompt, text in pairs]
    words: Any = SimpleNamespace(eos_token_id=ord("!"))
    return tokens.encode(asked, ModelSpec(model="m"), words, most)


def test_the_completion_and_one_end_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = encoded(monkeypatch, 6, ("ab", "cd"), ("a", " b!"), ("yz", "c"), ("a", "bcde"))
    assert ["".join(map(chr, ids)) for ids in rows.ids] == ["ab cd!", "a b!", "yZc!", "a bcde"]
    hidden = tokens.NOT_LEARNED
    assert rows.labels[0] == (hidden, hidden, *map(ord, " cd!")), "the space is learned too"
    assert rows.labels[1] == (hidden, *map(ord, " b!")) and rows.labels[2] == (
        hidden,
        hidden,
        *map(ord, "c!"),
    )
    assert rows.labels[3] == (hidden, *map(ord, " bcde")), "cut before its end"
    assert (rows.cut, rows.joined, rows.tokens, rows.longest) == (1, 1, 6 + 4 + 4 + 6, 6)
    assert tokens.TokenRows((), ()).longest == 0
    names: Any = SimpleNamespace(convert_ids_to_tokens=lambda ids: [chr(i).upper() for i in ids])
    learned = tokens.learned_tokens(rows, names)
    assert learned == {" ": 3, "!": 3, "C": 3, "D": 2, "B": 2, "E": 1}
    assert list(learned.values()) == sorted(learned.values(), reverse=True)


def test_a_prompt_has_to_leave_room_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoded(monkeypatch, 3, ("ab", "cd")).ids == (tuple(map(ord, "ab ")),)
    with pytest.raises(UserError, match=r"line 4: the prompt has 2 tokens, .* completion in 2: shorten it"):
        encoded(monkeypatch, 2, ("ab", "cd"))
    nothing: Any = SimpleNamespace(eos_token_id=None)
    with pytest.raises(UserError, match="the tokenizer of 'm' has no end-of-sequence token"):
        tokens.encode([], ModelSpec(model="m"), nothing, 2)


@pytest.mark.parametrize(
    ("text", "completion", "chat", "whole"),
    [
        ("a", "b", "none", "a b"), ("a\n", "b", "none", "a\nb"), ("a", "\nb", "none", "a\nb"),
        ("", "b", "none", "b"), ("a", "b", "llama2", "a b"), ("a", "  b ", "tokenizer", "ab "),
    ],
)  # fmt: skip
def test_a_completion_follows_after_a_space(text: str, completion: str, chat: Any, whole: str) -> None:
    assert tokens.completed(text, completion, ModelSpec(model="m", chat=chat)) == whole


# What is kept


class AdaLomo:
    """The state of lomo-optim's AdaLomo, which transformers does not save."""

    def __init__(self, steps: int, value: float) -> None:
        self.num_steps = steps
        self.exp_avg_sq = {"norm": torch.tensor([value])}
        self.exp_avg_sq_row = {"a.b": torch.tensor([value + 1])}
        self.exp_avg_sq_col = {"a.b": torch.tensor([value + 2])}


def test_the_state_of_adalomo_goes_into_a_checkpoint_and_back(tmp_path: Path) -> None:
    here, there = AdaLomo(7, 0.5), AdaLomo(0, 9.0)
    there.exp_avg_sq = {}
    folder = tmp_path / FOLDER / "checkpoint-3"
    folder.mkdir(parents=True)
    given: dict[str, Any] = {"model": nn.Linear(1, 1), "optimizer": SimpleNamespace(optimizer=here)}
    for first in (False, True):
        assert not (folder / WHOLE).exists() and not (folder / REST).exists()
        state = SimpleNamespace(is_world_process_zero=first, global_step=3)
        WholeCheckpoints(tmp_path, None).on_save(None, state, None, **given)
    assert (folder / WHOLE).exists()
    assert load_file(folder / REST).keys() == {
        "adalomo.exp_avg_sq.norm", "adalomo.exp_avg_sq_row.a.b", "adalomo.exp_avg_sq_col.a.b",
        "adalomo.num_steps",
    }  # fmt: skip
    given["optimizer"] = there
    WholeCheckpoints(tmp_path, None).on_train_begin(None, None, None, **given)
    assert there.num_steps == 0, "a training from its beginning"
    WholeCheckpoints(tmp_path, folder).on_train_begin(None, None, None, **given)
    assert vars(there) == vars(here) and there.num_steps == 7


def test_only_adalomo_and_soft_prompts_have_a_rest() -> None:
    assert rest_of(nn.Linear(1, 1), SimpleNamespace(exp_avg_sq={"a": torch.ones(1)}, num_steps=3)) == {}
    prompted = nn.Module()
    prompted.prompt_encoder = nn.ModuleDict({"default": nn.Linear(2, 1)})
    kept = rest_of(prompted, None)
    assert kept.keys() == {"prompt_encoder.default.weight", "prompt_encoder.default.bias"}
    with torch.no_grad():
        prompted.prompt_encoder["default"].weight += 1.0
    assert not torch.equal(kept["prompt_encoder.default.weight"], prompted.prompt_encoder["default"].weight)
    put_back(kept, prompted, None)
    assert torch.equal(kept["prompt_encoder.default.weight"], prompted.prompt_encoder["default"].weight)


# Layers


@pytest.mark.parametrize(
    ("layers", "keep", "chosen"),
    [(9, 1, [0]), (9, 2, [0, 8]), (9, 4, [0, 3, 5, 8]), (6, 5, [0, 1, 2, 4, 5]), (3, 3, [0, 1, 2])],
)
def test_layers_are_kept_evenly(layers: int, keep: int, chosen: list[int]) -> None:
    assert shrink.kept_layers(layers, keep) == chosen


def test_a_configuration_tells_which_layers_are_left() -> None:
    told = SimpleNamespace(num_hidden_layers=4, layer_types=["a", "b", "c", "d"], other=[1, 2], name="abcd")
    shrink._tell(told, 4, [0, 3])
    assert vars(told) == {
        "num_hidden_layers": 2, "layer_types": ["a", "d"], "other": [1, 2], "name": "abcd",
    }  # fmt: skip


def test_the_layers_have_to_be_in_one_list() -> None:
    def parts(n: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Identity() for _ in range(n))

    one = nn.ModuleDict({"a": nn.ModuleDict({"layers": parts(3)}), "experts": parts(2)})
    assert shrink._list_of_layers(one, 3, "m") == "a.layers"
    for found in (nn.ModuleDict({"a": parts(3), "b": parts(3)}), nn.ModuleDict({"a": parts(2)})):
        with pytest.raises(UserError, match="'m' does not keep its 3 layers in one list"):
            shrink._list_of_layers(found, 3, "m")


# Settings


def test_the_defaults() -> None:
    assert TuneOptions().model_dump() == {
        "data": None, "limit": None, "chat": "none", "max_length": 2048, "validation": None, "patience": 0,
        "epochs": 2.0, "max_steps": None, "batch": 8, "accumulate": 1, "learning_rate": None,
        "schedule": "linear", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0, "bf16": False,
        "dtype": "float32", "checkpoint_activations": False, "rank": 64, "lora_alpha": 16.0, "dropout": 0.1,
        "targets": (), "virtual_tokens": 20, "encoder": "lstm", "encoder_hidden": None, "adaptive": False,
        "base": None, "through": None, "teacher": None, "alpha": 1.0, "save_every": None, "seed": 0,
        "report_to": (),
    }  # fmt: skip


def test_names_are_read_from_texts_with_commas() -> None:
    assert tune_options.read_names("a, b,,c ") == ("a", "b", "c")
    assert tune_options.read_names(["a,b", " c"]) == ("a", "b", "c")
    assert tune_options.read_names(("a", 3)) == ("a", 3) and tune_options.read_names(3) == 3


def test_which_settings_a_method_does_not_have() -> None:
    lora = {"rank", "lora_alpha", "dropout", "targets"}
    prompt = {"virtual_tokens", "encoder", "encoder_hidden"}
    assert {name: tune_options.left_out(name) for name in METHODS} == {
        "full": lora | prompt | {"adaptive"}, "lora": prompt | {"adaptive"}, "qlora": prompt | {"adaptive"},
        "p-tuning": lora | {"adaptive"}, "lomo": lora | prompt | {"weight_decay", "clip"},
    }  # fmt: skip


def test_what_the_methods_are() -> None:
    asked = TuneOptions(virtual_tokens=5)
    assert {
        m.name: (m.result, m.learning_rate, m.optimizer(asked), m.state_numbers, m.quantization, m.packages)
        for m in METHODS.values()
    } == {
        "full": ("weights", 2e-5, "adamw_torch", 2, "none", ()),
        "lora": ("adapter", 1e-4, "adamw_torch", 2, "none", ()),
        "qlora": ("adapter", 1e-4, "adamw_torch", 2, "4bit", ("bitsandbytes",)),
        "p-tuning": ("adapter", 1e-3, "adamw_torch", 2, "none", ()),
        "lomo": ("weights", 3e-2, "lomo", 0, "none", ("lomo_optim",)),
    }
    assert {m.name: (m.fused, m.virtual_tokens(asked)) for m in METHODS.values()} == {
        "full": (False, 0), "lora": (False, 0), "qlora": (False, 0), "p-tuning": (False, 5),
        "lomo": (True, 0),
    }  # fmt: skip
    assert METHODS["lomo"].optimizer(TuneOptions(adaptive=True)) == "adalomo"
    with pytest.raises(UserError, match="--weight-decay: lomo is run without it"):
        METHODS["lomo"].refuse(TuneOptions(weight_decay=0.1))
    METHODS["lomo"].refuse(TuneOptions())
    METHODS["lora"].refuse(TuneOptions(dtype="bfloat16", accumulate=3, weight_decay=0.1))


# The system that uses it


@pytest.mark.parametrize("large_name", ["demo://base", "org/of-the-hub"])
@pytest.mark.parametrize(
    ("result", "settings", "expert"),
    [
        ("adapter", {"chat": "llama2"}, {"adapter": "./", "chat": "llama2"}),
        ("weights", {}, {"model": "./", "dtype": "float32"}),
    ],
)
def test_the_system_of_an_expert(
    result: Any, settings: Any, expert: dict[str, str], large_name: str, tmp_path: Path
) -> None:
    small = ModelSpec(model=str(tmp_path), dtype="float32", quantization="4bit", chat="llama2")
    large = ModelSpec(model=large_name, dtype="bfloat16")
    (tmp_path / "made").mkdir()
    write_system(small, large, result, TuneOptions(alpha=1.5, **settings), tmp_path / "made")
    text = (tmp_path / "made" / "system.yaml").read_text()
    assert text.startswith("# The expert of this folder") and f"--system {tmp_path}/made/system.yaml" in text
    assert yaml.safe_load(text) == {
        "description": "made: an expert made by proxytune tune",
        "base": {"model": large_name, "dtype": "bfloat16"},
        "antiexpert": {"model": str(tmp_path), "dtype": "float32", "quantization": "4bit"},
        "expert": expert,
        "alpha": 1.5,
    }


# The loop


def test_learning_rates_of_a_short_training() -> None:
    slow = TuneConfig(warmup_steps=3, decay_share=0.5)
    rates = [training.learning_rate_factor(step, 8, slow) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    flat = TuneConfig(decay_share=0.0)
    assert [training.learning_rate_factor(step, 3, flat) for step in range(3)] == [1.0, 1.0, 1.0]


def test_batches_are_in_another_order_each_epoch() -> None:
    rows = [TrainingExample((i, i), (1.0, 1.0)) for i in range(7)]
    found = [
        [int(row[0]) for row in batch.ids]
        for batch in training.batches(rows, TuneConfig(epochs=2, batch_size=3))
    ]
    assert list(map(len, found)) == [3, 3, 1, 3, 3, 1]
    first, second = ([row for batch in part for row in batch] for part in (found[:3], found[3:]))
    assert first != second and sorted(first) == sorted(second) == list(range(7))


def test_rows_are_padded_on_the_right() -> None:
    batch = training.collate([TrainingExample((5,), (0.5,)), TrainingExample((6, 7, 8), (1.0, 2.0, 3.0))])
    assert batch.ids.tolist() == [[5, 0, 0], [6, 7, 8]] and batch.mask is not None
    assert batch.weights.tolist() == [[0.5, 0, 0], [1, 2, 3]]
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 1]]


class Layers(nn.Module):
    """Parameters of every kind that Muon treats apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
        self.inner, self.lm_head = nn.Linear(4, 5, bias=True), nn.Linear(4, 3, bias=False)


def test_muon_is_for_the_matrices_of_the_layers() -> None:
    model = Layers()
    names = {id(p): name for name, p in model.named_parameters()}
    inner, rest = training.muon(0.5)(model)
    own = [{names[id(p)] for group in o.param_groups for p in group["params"]} for o in (inner, rest)]
    assert own[0] == {"inner.weight"} and own[1] == set(names.values()) - own[0]
    assert [(g["lr"], g["weight_decay"]) for o in (inner, rest) for g in o.param_groups] == [(0.5, 0.02)] * 2
    assert rest.param_groups[0]["betas"] == (0.9, 0.98) and inner.param_groups[0]["ns_steps"] == 4
    other, _ = training.muon(0.5, embedding="inner")(model)
    assert {names[id(p)] for group in other.param_groups for p in group["params"]} == {"embed.weight"}


def test_adamw_holds_what_is_trainable() -> None:
    model = Layers()
    model.embed.weight.requires_grad_(False)
    [found] = training.adamw(0.25, 0.125)(model)
    [group] = found.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.25, 0.125, (0.9, 0.98))
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()} - {id(model.embed.weight)}


class Unigram(nn.Module):
    """The same logits at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros(2))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """As a causal language model answers."""
        return SimpleNamespace(logits=self.free.expand(*input_ids.shape, 2))


def test_a_step_by_hand() -> None:
    """The loss of a token of two equal ones is log 2, its gradient (-1/2, 1/2), of norm 0.7071."""
    rows = [TrainingExample((0, 0), (1.0, 1.0))] * 2
    for clip, expected in ((10.0, 0.5), (0.70710678 / 4, 0.125)):
        model = Unigram()
        loop = TuneConfig(batch_size=1, clip=clip)
        fitted = training.fit(
            model, rows[:1], [torch.optim.SGD(model.parameters(), lr=1.0)], loop, show=False
        )
        assert model.free.tolist() == pytest.approx([expected, -expected], abs=1e-4)
        assert fitted.losses == pytest.approx([0.693147], abs=1e-5) and fitted.tokens == 2
    model = Unigram()
    halved = [torch.optim.SGD(model.parameters(), lr=1.0)]
    training.fit(model, rows, halved, TuneConfig(batch_size=1), show=False)
    # the second step has half of the rate: p = 1 / (1 + e) of the other token, twice 0.2689 / 2 at most
    assert float(model.free[0].detach()) == pytest.approx(0.5 + 0.268941 / 2, abs=1e-4)
