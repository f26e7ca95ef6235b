"""From text to ids: published whitespace, chat templates, pinned noise keys."""

from __future__ import annotations

import pytest

from proxytune.config import Chat, ModelSpec
from proxytune.decoding import Conversation
from proxytune.decoding.prompts import Form, bare, context, form_of, noise_key, text_for
from proxytune.errors import UserError
from proxytune.records import Prompt
from tests.support import tiny

BYTES = tiny.tokenizer()

PLAIN = "Question: q?\nAnswer:"
WITH = Prompt(PLAIN, user="Question: q?", system="Be kind.", response_prefix="Answer:")
WITHOUT = Prompt(PLAIN, user="Question: q?")
SYSTEM = Prompt(PLAIN, user="Question: q?", system="Be kind.")

FORMS: list[tuple[Chat, Form, Prompt, str]] = [
    ("none", "direct", WITH, PLAIN),
    ("none", "in_ensemble", WITH, PLAIN),
    ("llama2", "direct", WITHOUT, "[INST] Question: q? [/INST]"),
    ("llama2", "in_ensemble", WITHOUT, "[INST] Question: q?\nAnswer: [/INST]"),
    ("llama2", "direct", SYSTEM, "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nQuestion: q? [/INST]"),
    # the published runs' whitespace: no space after [INST], one more before the question
    ("llama2", "in_ensemble", SYSTEM, "[INST]<<SYS>>\nBe kind.\n<</SYS>>\n\n Question: q?\nAnswer: [/INST]"),
    ("llama2", "direct", WITH, "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nQuestion: q? [/INST] Answer:"),
    ("llama2", "in_ensemble", WITH, "[INST]<<SYS>>\nBe kind.\n<</SYS>>\n\n Question: q? [/INST] Answer:"),
    ("tokenizer", "direct", WITHOUT, "<user>Question: q?<assistant>"),
    ("tokenizer", "in_ensemble", WITHOUT, "<user>Question: q?\nAnswer:<assistant>"),
    ("tokenizer", "direct", WITH, "<system>Be kind.<user>Question: q?<assistant>Answer:"),
    ("tokenizer", "in_ensemble", WITH, "<system>Be kind.<user>Question: q?<assistant>Answer:"),
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("chat, form, prompt, want", FORMS)
def test_text_of_every_form(chat: Chat, form: Form, prompt: Prompt, want: str) -> None:
    assert text_for(chat, form, prompt, tiny.tokenizer(chat_template=TEMPLATE)) == want


@pytest.mark.parametrize("chat", ["none", "llama2", "tokenizer"])
def test_a_context_never_ends_before_the_response(chat: Chat) -> None:
    """A tokenizer that was saved with add_eos_token gives the contexts of one that was not."""
    plain, closing = tiny.tokenizer(TEMPLATE), tiny.tokenizer(TEMPLATE, add_eos=True)
    assert closing.encode("a")[-1] == closing.eos_token_id
    spec = ModelSpec(model="m", chat=chat)
    for prompt in (WITH, WITHOUT, SYSTEM):
        want = context(spec, plain, "direct", prompt)
        assert context(spec, closing, "direct", prompt) == want and want[-1] != plain.eos_token_id


def test_special_tokens_of_the_text_are_kept_and_the_first_is_there_once() -> None:
    spec, bos, eos = ModelSpec(model="m"), BYTES.bos_token_id, BYTES.eos_token_id

    def ids(text: str, add_eos: bool = False) -> tuple[int, ...]:
        return context(spec, tiny.tokenizer(add_eos=add_eos), "direct", Prompt(text, text))

    assert ids("<s>ab") == ids("ab") and ids("ab").count(bos) == 1
    assert ids("ab</s>")[-2:] == (ids("b")[-1], eos) == ids("ab</s>", add_eos=True)[-2:]
    assert ids("", add_eos=True) == ids("") == (bos,)


def test_a_missing_template_is_an_error() -> None:
    with pytest.raises(UserError, match="needs a chat template"):
        text_for("tokenizer", "direct", WITH, tiny.tokenizer())


def test_bare_takes_out_every_occurrence_as_the_papers_code_does() -> None:
    assert bare(Prompt("Answer: a?\nAnswer:", "", response_prefix="Answer:")) == " a?"
    assert bare(Prompt("a?  \n", "")) == "a?"


def test_special_tokens_come_once() -> None:
    """Plain and llama2 text get the tokenizer's own <s>; a template brings what it wants."""
    words = tiny.tokenizer(chat_template="<s>" + TEMPLATE)
    for chat in ("none", "llama2", "tokenizer"):
        ids = context(ModelSpec(model="m", chat=chat), words, "direct", WITH)  # type: ignore[arg-type]
        assert ids[0] == 1 and ids.count(1) == 1, chat


def test_only_experts_inside_the_proxy_see_the_ensemble_form() -> None:
    assert form_of("expert", "proxy") == form_of("expert2", "proxy") == "in_ensemble"
    for model, role in [("expert", "expert"), ("base", "proxy"), ("antiexpert", "proxy"), ("tuned", "tuned")]:
        assert form_of(model, role) == "direct"  # type: ignore[arg-type]


KEYS = [
    ((0, "", "0", 0), 5286024451725898028),
    ((0, "gsm", "17", 0), -2311394594843298799),
    ((0, "gsm", "17", 1), -346692533147132627),
    ((1, "gsm", "17", 0), 7929764436212772462),
    ((-5, "truthfulqa", "é\U0001f600", 3), 5614043291285681645),
]
"""Test vectors: little-endian signed 64-bit blake2b-8 of seed, task, id and sample, joined by U+001F."""


@pytest.mark.parametrize("parts, want", KEYS)
def test_noise_keys_are_pinned(parts: tuple[int, str, str, int], want: int) -> None:
    """They decide every sampled result ever stored: they must not change."""
    assert noise_key(*parts) == want


def test_noise_keys_differ_in_every_part() -> None:
    keys = {
        noise_key(seed, task, example, sample)
        for seed in (0, 1, 11)
        for task in ("", "a", "a1")
        for example in ("1", "11", "a")
        for sample in (0, 1, 11)
    }
    assert len(keys) == 81 and all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("chat", ["none", "llama2", "tokenizer"])
def test_all_that_was_said_is_there_in_its_order(chat: Chat) -> None:
    """System messages, too, however many there are and wherever they stand."""
    said = ("system", "Be kind."), ("system", "Be brief."), ("user", "q1"), ("assistant", "a1")
    said = (*said, ("system", "Be rude."), ("user", "q2"))
    spec, words = ModelSpec(model="m", chat=chat), tiny.tokenizer(chat_template=TEMPLATE)
    text = Conversation(said, "It").text_for("expert", "proxy", spec, words)
    places = [text.find(content) for _, content in said]
    assert -1 not in places and places == sorted(places) and text.endswith("It")
