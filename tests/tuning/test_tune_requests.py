"""What `proxytune tune` is asked: data of every form, settings, and what is refused before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.models import plain
from proxytune.tuning.examples import read_data, read_examples
from proxytune.tuning.methods import METHODS
from proxytune.tuning.options import METHOD_HELP, TuneOptions, left_out, read_settings, tune_names
from proxytune.tuning.session import plan, tune
from proxytune.tuning.tokens import NOT_LEARNED, encode
from tests.support import tiny
from tests.support.command_line import proxytune, refused

MODEL = "demo://antiexpert"
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def options(**settings: Any) -> TuneOptions:
    return TuneOptions(**{"data": "gsm8k:generated", "limit": 4, **settings})


FORMS: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "": ({"prompt": "a", "completion": " b"}, [((("user", "a"),), " b")]),
    "gsm8k": (
        {"question": "How? ", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        [((("user", "Question: How?\nAnswer:"),), " 1+1=<<1+1=2>>2\n#### 2")],
    ),
    "triviaqa": (
        {"Question": "Who?", "Answer": {"Value": "Ada", "Aliases": ["Ada", "Lovelace"]}, "QuestionId": "1"},
        [((("user", "Question: Who?\nAnswer:"),), " Ada")],
    ),
    "dolly": (
        {"instruction": "Sum up.", "context": "Text.", "response": "Short."},
        [((("user", "Sum up.\n\nText."),), "Short.")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        [((("user", "Hi"),), "Yes")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_prompts_and_completions(form: str, tmp_path: Path) -> None:
    row, expected = FORMS[form]
    file = lines(tmp_path / "data.jsonl", row)
    found = read_examples(f"{form}:{file}" if form else str(file), None)
    assert [(e.messages, e.completion) for e in found] == expected
    assert found[0].where == f"'{file}' line 1"


def test_every_answer_of_a_conversation_is_an_example_with_what_came_before(tmp_path: Path) -> None:
    more = [*CHAT["messages"], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"}]
    first, second = read_examples(str(lines(tmp_path / "a.jsonl", {"messages": more})), None)
    assert (first.messages, first.completion) == ((("user", "Hi"),), "Yes")
    assert second.messages == (("user", "Hi"), ("assistant", "Yes"), ("user", "Why?"))
    alpaca = lines(tmp_path / "b.jsonl", {"instruction": "Go", "input": "", "output": "Gone"})
    assert read_examples(f"alpaca:{alpaca}", None)[0].messages[0][1].endswith("Go\n\n### Response:\n")


BAD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "no JSON": ("", ({"prompt": "a", "completion": "b"}, "{"), "line 2 is not JSON"),
    "another form": ("", ({"question": "a", "answer": "b"},), "line 1: neither `prompt` and `completion`"),
    "no field": ("gsm8k", ({"question": "a"},), "line 1: no field 'answer' (it has question)"),
    "no text": ("", ({"prompt": "a", "completion": 3},), "line 1: field 'completion' must be text, not 3"),
    "empty": ("", ({"prompt": "a", "completion": " "},), "line 1: the completion is empty"),
    "no answer": ("", ({"messages": CHAT["messages"][:1]},), "line 1: no message is the assistant's"),
    "bad role": ("", ({"messages": [{"role": "bot", "content": "a"}]},), "message 1 needs a `role`"),
    "unknown form": ("gsm", ({},), "Unknown form of data 'gsm'. Did you mean: gsm8k?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_with_its_place(case: str, tmp_path: Path) -> None:
    form, rows, message = BAD[case]
    file = lines(tmp_path / "data.jsonl", *rows)
    with pytest.raises(UserError) as raised:
        read_data(f"{form}:{file}" if form else str(file), None, None, 0)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_held_out_share_is_drawn_by_the_seed_and_never_learned() -> None:
    one, same, other = (read_data("gsm8k:generated", "0.25", 40, seed) for seed in (0, 0, 1))
    assert (len(one.train), len(one.validation)) == (30, 10)
    assert one == same and one.validation != other.validation
    assert not {e.where for e in one.train} & {e.where for e in one.validation}
    with pytest.raises(UserError, match="leaves none of the 1 examples"):
        read_data("gsm8k:generated", "0.9", 1, 0)


def told(path: Path, form: str, *rows: Any, limit: int | None = None) -> list[tuple[Any, str]]:
    """What rows of a form become."""
    file = lines(path / "rows.jsonl", *rows)
    found = read_examples(f"{form}:{file}" if form else str(file), limit)
    return [(one.messages, one.completion) for one in found]


def test_fields_that_a_form_may_lack(tmp_path: Path) -> None:
    [(with_input, output)] = told(tmp_path, "alpaca", {"instruction": "Go", "input": "on", "output": "Gone"})
    assert with_input == ((
        "user",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nGo\n\n### Input:\non"
        "\n\n### Response:\n",
    ),) and output == "Gone"  # fmt: skip
    for context in ({"context": ""}, {"context": None}, {}):
        assert told(tmp_path, "dolly", {"instruction": "Sum.", "response": "S", **context}) == [
            ((("user", "Sum."),), "S")
        ]


def test_a_conversation_with_a_system_message_and_other_names(tmp_path: Path) -> None:
    turns = [("system", "Be brief"), ("user", "Hi"), ("assistant", "Yes"), ("human", "Why"), ("gpt", "So")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    first = (("system", "Be brief"), ("user", "Hi"))
    assert told(tmp_path, "sharegpt", row) == [
        (first, "Yes"), ((*first, ("assistant", "Yes"), ("user", "Why")), "So"),
    ]  # fmt: skip


def test_a_limit_is_of_examples_and_not_of_rows(tmp_path: Path) -> None:
    more = [*CHAT["messages"], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"}]
    rows = [{"messages": more}] * 3
    assert [said for _, said in told(tmp_path, "", *rows, limit=3)] == ["Yes", "So", "Yes"]
    assert len(told(tmp_path, "", *rows, limit=4)) == 4 and len(told(tmp_path, "", *rows)) == 6
    (tmp_path / "gsm8k:rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    assert len(read_examples(str(tmp_path / "gsm8k:rows.jsonl"), None)) == 6, "a file of that name is one"


WRONG_TURNS: dict[str, tuple[Any, str]] = {
    "no list": ({"messages": "Hi"}, "field 'messages' must be a list of messages"),
    "no turns": ({"messages": ["Hi"]}, "field 'messages' must be a list of messages"),
    "two answers": (
        {"messages": [*CHAT["messages"], CHAT["messages"][1]]},
        "message 3 is the assistant's and",
    ),
    "answer first": ({"messages": CHAT["messages"][1:]}, "message 1 is the assistant's and follows no user"),
    "no text": (
        {"messages": [*CHAT["messages"], {"role": "user"}]},
        "message 3 needs a `role` of system, user",
    ),
    "empty prompt": ({"prompt": " ", "completion": "b"}, "the prompt is empty"),
}


@pytest.mark.parametrize("case", WRONG_TURNS)
def test_conversations_that_are_none(case: str, tmp_path: Path) -> None:
    row, message = WRONG_TURNS[case]
    with pytest.raises(UserError, match=r"line 2: ") as raised:
        told(tmp_path, "", CHAT, row)
    assert message in str(raised.value)


@pytest.mark.parametrize(("share", "held"), [("0.1", 1), ("0.3", 1), ("0.4", 2), ("0.75", 3)])
def test_a_share_is_rounded_and_one_at_least(share: str, held: int) -> None:
    found = read_data("gsm8k:generated", share, 4, 0)
    assert (len(found.validation), len(found.train)) == (held, 4 - held)
    places = {e.where for e in read_data("gsm8k:generated", None, 4, 0).train}
    assert {e.where for e in (*found.train, *found.validation)} == places


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.5"])
def test_a_share_lies_between_0_and_1(share: str) -> None:
    with pytest.raises(
        UserError, match=f"--validation {share}: a share lies between 0 and 1; or name a file"
    ):
        read_data("gsm8k:generated", share, 4, 0)


def test_data_is_known_by_its_content_wherever_it_stood(tmp_path: Path) -> None:
    one, two = {"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}
    first = str(lines(tmp_path / "first.jsonl", one, two))
    again = str(lines(tmp_path / "again.jsonl", one, two))
    turned = str(lines(tmp_path / "turned.jsonl", two, one))
    held = str(lines(tmp_path / "held.jsonl", two))
    changed = str(lines(tmp_path / "changed.jsonl", one, {**two, "completion": " e"}))
    usual = read_data(first, None, None, 0)
    assert usual.sha256 == read_data(again, None, None, 5).sha256
    others = [
        read_data(turned, None, None, 0), read_data(first, held, None, 0), read_data(first, None, 1, 0),
        read_data(changed, None, None, 0), read_data(first, "0.5", None, 0),
    ]  # fmt: skip
    assert len({usual.sha256, *(one.sha256 for one in others)}) == 6
    assert [e.completion for e in others[1].validation] == [" d"] and len(others[1].train) == 2
    limited = read_data(first, turned, 1, 0)
    assert (len(limited.train), len(limited.validation)) == (1, 2), "--limit is of the data alone"
    with pytest.raises(UserError, match="the demo world has training data of one form: gsm8k:generated"):
        read_data("alpaca:generated", None, None, 0)


@pytest.mark.parametrize("chat", ["none", "llama2"])
def test_loss_is_on_the_completion_and_the_end_only(chat: Any) -> None:
    spec = ModelSpec(model=MODEL, chat=chat)
    tokenizer, data = plain.load_tokenizer(spec), read_data("gsm8k:generated", None, 3, 0)
    rows = encode(data.train, spec, tokenizer, 2048)
    for example, ids, labels in zip(data.train, rows.ids, rows.labels, strict=True):
        learned = [label for label in labels if label != NOT_LEARNED]
        assert (
            tokenizer.decode(learned) == f"{example.completion}</s>" and learned[-1] == tokenizer.eos_token_id
        )
        assert ids[-len(learned) :] == tuple(learned) and ids.count(tokenizer.bos_token_id) == 1
        prompt = tokenizer.decode(ids[1 : -len(learned)])
        question = example.messages[0][1]
        assert prompt == (question if chat == "none" else f"[INST] {question} [/INST]")
    short = encode(data.train, spec, tokenizer, rows.longest - 5)
    assert short.cut >= 1 and short.longest == rows.longest - 5
    with pytest.raises(UserError, match=r"demo world, gsm train row 1: the prompt has \d+ tokens, .* in 8"):
        encode(data.train, spec, tokenizer, 8)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown method": ("lorra", {}, "Unknown method 'lorra'. Did you mean: lora"),
    "unknown target": ("lora", {"targets": "q_porj"}, "Unknown target module 'q_porj'. Did you mean: q_proj"),
    "accumulated lomo": ("lomo", {"accumulate": 2}, "lomo uses each gradient up"),
    "adaptive lomo": ("lomo", {"adaptive": True}, "AdaLomo (lomo-optim) runs on a GPU only"),
    "half weights": ("full", {"dtype": "bfloat16"}, "would round AdamW's small steps away"),
    "through nothing": ("lora", {"through": "base"}, "--through base needs the large model: --base MODEL"),
    "two losses": ("lora", {"through": "base", "base": "demo://base", "teacher": MODEL}, "are two losses"),
    "patience alone": ("lora", {"patience": 2}, "--patience 2 needs held-out examples"),
    "whole window": ("p-tuning", {"virtual_tokens": 2048}, "takes 2048 tokens in all"),
    "no room": ("p-tuning", {"virtual_tokens": 2030}, "which leaves no room for its completion in 18"),
    "no data": ("lora", {"data": None}, "give the training examples: --data FILE"),
    "unknown receiver": ("lora", {"report_to": "tensorbord"}, "'tensorbord'. Did you mean: tensorboard"),
    "receiver not here": ("lora", {"report_to": "clearml"}, "--report-to clearml: it is not installed here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case: str) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("lomo_optim")
    method, settings, message = REFUSED[case]
    with pytest.raises(UserError) as raised:
        plan(method, MODEL, options(**settings))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_too_little_memory_is_said_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    job = plan("full", MODEL, options())
    monkeypatch.setattr("proxytune.tuning.estimate.free_memory", lambda: 10**8)
    with pytest.raises(
        UserError, match=r"needs about 0\.\d GiB \(libraries 0.7\), and 0.1 GiB are free: use a"
    ):
        tune(job, tmp_path / "out", show=False)


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("layers.0.mlp.up_proj", "v_proj")])
def test_adapters_sit_on_the_targets_that_were_named(targets: tuple[str, ...]) -> None:
    prepared = METHODS["lora"].prepare(tiny.build("llama", 1), options(targets=targets))
    trained = [name for name, parameter in prepared.named_parameters() if parameter.requires_grad]
    on = {name.partition(".lora_")[0].removeprefix("base_model.model.model.") for name in trained}
    linear = {
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
        )
    }  # fmt: skip
    assert on == {path for path in linear if not targets or path.endswith(targets)}


def test_the_estimate_counts_what_the_method_trains() -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("lomo_optim")
    found = {name: plan(name, MODEL, options(rank=2)).estimate for name in METHODS}
    assert found["full"].trainable == found["full"].parameters == found["lomo"].trainable
    assert found["lora"].trainable == found["qlora"].trainable < found["full"].trainable / 10
    assert "optimiser" not in found["lomo"].parts
    assert found["lomo"].parts["gradients"] < 3 * found["full"].parts["gradients"]
    assert found["qlora"].parts["weights"] < found["lora"].parts["weights"]


def test_the_paper_s_settings_are_shipped() -> None:
    assert tune_names() == ["gsm-full", "gsm-lora", "triviaqa-full", "triviaqa-lora"]
    for name in tune_names():
        method = name.partition("-")[2]
        given = TuneOptions(**read_settings(name, method))
        assert (given.epochs, given.max_length, given.warmup, given.weight_decay) == (2, 2048, 0.04, 0)
        assert 4 * given.batch * given.accumulate == 128
        assert given.learning_rate == {"full": 2e-5, "lora": 1e-4}[method] and given.schedule == "linear"
    assert (given.rank, given.lora_alpha, given.dropout, len(given.targets)) == (64, 16, 0.1, 7)
    with pytest.raises(UserError, match="is for the method full, not lora"):
        read_settings("gsm-full", "lora")


def test_settings_of_another_method_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 4\n")
    (tmp_path / "b.yaml").write_text("rnk: 4\n")
    with pytest.raises(UserError, match="rank is of lora, qlora, not of full"):
        read_settings(str(tmp_path / "a.yaml"), "full")
    with pytest.raises(UserError, match="Unknown key 'rnk'"):
        read_settings(str(tmp_path / "b.yaml"), "lora")
    assert set(METHOD_HELP) == set(METHODS)
    assert "rank" in left_out("full") and "rank" not in left_out("lora")


def test_the_command_shows_an_estimate_and_refuses_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    command = ("tune", "lora", "--model", MODEL, "--data", "gsm8k:generated", "--out", tmp_path / "out")
    shown = json.loads(proxytune(*command, "--limit", 4, "--rank", 2, "--dry-run", "--json").stdout)
    assert shown["examples"] == 4 and shown["trainable"] == 4736 and shown["learning_rate"] == 1e-4
    assert not (tmp_path / "out").exists()
    refused(proxytune(*command, "--targets", "nothing"), "Unknown target module 'nothing'")
    refused(proxytune("tune", "merge", tmp_path, "--out", tmp_path / "m"), "give --model MODEL")
