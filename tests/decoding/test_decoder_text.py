"""Text into the engine and out of it: templates of roles, stop strings, what is streamed, why a response is
cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.records import Example, Prompt
from tests.support import tiny
from tests.support.chat_templates import CHOOSY, GEMMA, TURNS
from tests.support.decoders import decoder, example, ragged
from tests.support.tiny import spec


def chat_trio(trio: System, folder: Path, template: str) -> System:
    """The trio with an expert that has this chat template."""
    words = tiny.tokenizer(chat_template=template)
    return trio.model_copy(
        update={"expert": spec(tiny.save(folder, tiny.build("llama", 2), words), "tokenizer")}
    )


ASKED = [
    Example(str(i), Prompt(f"{q}\nA:", user=q, system="Be kind.", response_prefix="A:"))
    for i, q in enumerate(["why?", "a zebra?", "what is 3?"])
]
SHORT = Sampling(max_new_tokens=5)


def test_what_is_streamed_is_the_text(trio: System) -> None:
    """Random models say random bytes, few of them letters."""
    d, shown = decoder(trio), dict[tuple[str, int], str]()

    def hear(example_id: str, sample: int, piece: str) -> None:
        shown[example_id, sample] = shown.get((example_id, sample), "") + piece

    wild = Sampling(max_new_tokens=60, temperature=2.0, n=2, stop=("ab", "\ufffd\ufffd\ufffd\ufffd"))
    found = list(d.stream(ragged(10, 3), wild, on_text=hear))
    assert {(c.example_id, c.sample): c.text for c in found if c.text} == {
        k: v for k, v in shown.items() if v
    }
    assert sum("\ufffd" in c.text for c in found) > 5


def test_every_alpha_has_a_stream_of_its_own(trio: System) -> None:
    heard = list[str]()
    d, sampling = decoder(trio), Sampling(max_new_tokens=20, temperature=2.0)
    alphas = [parse_alpha(0), parse_alpha(2)]
    asked = [(example("q"), alphas)]
    found = list(d.sweep(asked, sampling, on_text=lambda _, __, piece: heard.append(piece)))
    assert sorted("".join(heard)) == sorted("".join(c.text for _, c in found)), "letters were not mixed up"


def test_a_stop_string_of_a_special_token_and_text(trio: System, tmp_path: Path) -> None:
    """Put into a forced opener, since random models say no such thing."""
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = tiny.build("llama", 2, vocab_size=len(words))
    models = Models(System(name="one", base=spec(tiny.save(tmp_path, model, words))))
    forced = "yes\n<|im_end|>\nuser: no"
    for stop, tokens, text in [
        ("<|im_end|>\n", 6, "yes\n"),
        ("\n<|im_end|>", 5, "yes"),
        ("<|im_end|>\nuser:", 11, "yes\n"),
        ("\n\nu", 7, "yes"),
        ("<|im_end|>", 5, "yes\n"),
    ]:
        sampling = Sampling(max_new_tokens=40, stop=(stop,))
        heard = list[tuple[str, int, str]]()
        [found] = Decoder(models, "base").stream(
            [example("q")], sampling, forced=forced, on_text=lambda *piece, to=heard: to.append(piece)
        )
        assert (found.finish_reason, len(found.token_ids), found.text) == ("stop", tokens, text), stop
        assert "".join(piece for _, _, piece in heard) == text


def test_a_template_that_refuses_the_system_message_is_said_once(trio: System, tmp_path: Path) -> None:
    d = Decoder(Models(chat_trio(trio, tmp_path / "a", GEMMA)), "proxy")
    found = list(d.stream(ASKED, SHORT, task="truthfulqa"))
    assert len(found) == 3 and all(c.remark is None for c in found)
    [remark] = d.remarks
    assert remark.startswith("the chat template of the expert takes no system message")
    folded = tiny.tokenizer().encode(
        "<start_of_turn>user\nBe kind.\n\nwhy?<end_of_turn>\n<start_of_turn>model\nA:"
    )
    assert list(d.contexts(ASKED[0].prompt)["expert"]) == folded
    plain = Decoder(Models(chat_trio(trio, tmp_path / "b", TURNS)), "proxy")
    list(plain.stream(ASKED, SHORT))
    assert plain.remarks == []


def test_an_example_whose_template_fails_has_a_reason_and_the_others_go_on(
    trio: System, tmp_path: Path
) -> None:
    d = Decoder(Models(chat_trio(trio, tmp_path, CHOOSY + TURNS)), "proxy")
    sampling = SHORT.model_copy(update={"n": 2, "temperature": 1.0})
    found = {(c.example_id, c.sample): c for c in d.stream(ASKED, sampling, task="truthfulqa")}
    assert len(found) == 6
    for where, c in found.items():
        assert (c.finish_reason == "template") == (where[0] == "1")
    bad = found["1", 1]
    assert bad.remark == "the chat template of the expert fails on truthfulqa: no animals"
    assert (bad.text, bad.token_ids, bad.trace) == ("", (), ())
    others = [e for e in ASKED if e.id != "1"]
    for c in d.stream(others, sampling, task="truthfulqa"):
        assert found[c.example_id, c.sample] == c
    scored = {(c.example_id, c.sample): c for c in d.likelihoods(ASKED, lambda _: (" a", " b"), task="mc")}
    assert len(scored) == 6
    assert all(
        math.isnan(c.logprob) == (c.fault is not None) == (c.example_id == "1") for c in scored.values()
    )
    assert scored["1", 1].remark == "the chat template of the expert fails on mc: no animals"
    assert scored["1", 1].text == " b"


def test_a_template_that_never_works_is_an_error_before_anything_is_decoded(
    trio: System, tmp_path: Path
) -> None:
    """Of this task, or of any before weights are loaded."""
    no_system = "{% if messages[0].role == 'system' %}{{ 1 // 0 }}{% endif %}"
    d = Decoder(Models(chat_trio(trio, tmp_path / "a", no_system + TURNS)), "expert")
    with pytest.raises(UserError, match=r"^the chat template of the expert fails on gsm: ZeroDivisionError"):
        list(d.stream(ASKED, SHORT, task="gsm"))
    assert d.stats.generated_tokens == 0
    with pytest.raises(UserError, match=r"^the expert: the chat template of .*Undefined.*text"):
        Decoder(Models(chat_trio(trio, tmp_path / "b", "{{ messages[0].text + 1 }}" + TURNS)), "expert")


def test_a_window_that_was_full_first_is_said(trio: System) -> None:
    d = decoder(trio)
    cut, whole = d.stream(
        [example("a" * 250, 0), example("b", 1)], Sampling(max_new_tokens=50, min_new_tokens=50)
    )
    if cut.example_id == "1":
        cut, whole = whole, cut
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    assert cut.remark == "the context window of the base (256 tokens) was full before 50 new tokens"
    assert (whole.finish_reason, len(whole.token_ids), whole.remark) == ("length", 50, None)


def test_the_window_that_the_longest_prompt_fills_is_said(trio: System, tmp_path: Path) -> None:
    """All windows are equal; the expert's prompt has a chat format around it."""
    d = Decoder(Models(chat_trio(trio, tmp_path, TURNS)), "proxy")
    [cut] = d.stream([example("a" * 200)], Sampling(max_new_tokens=90, min_new_tokens=90))
    assert cut.remark == "the context window of the expert (256 tokens) was full before 90 new tokens"
