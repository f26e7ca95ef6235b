"""Chat templates: the text that transformers gives, or one line within bounded time and memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from proxytune.decoding import templates
from proxytune.decoding.prompts import NO_SYSTEM, templated, text_for
from proxytune.decoding.templates import TemplateFault, render
from proxytune.records import Prompt
from tests.support import tiny
from tests.support.chat_templates import ALTERNATING, CHOOSY, GEMMA, TURNS

SYSTEM = {"role": "system", "content": "Be kind, é🍎."}
USER = {"role": "user", "content": "1 < 2 & {{ x }}\n</s>?"}

USUAL = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "special tokens": "{{ bos_token }}{{ messages[-1].content | trim }}{{ eos_token }}{{ nothing }}",
    "namespace": "{% set n = namespace(seen=0) %}{% for m in messages %}{% set n.seen = n.seen + 1 %}"
    "{% endfor %}{{ n.seen }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is defined }}",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{%- generation %} b {% endgeneration -%}\n c",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("template", USUAL.values(), ids=USUAL)
def test_the_text_is_that_of_transformers(template: str) -> None:
    words = tiny.tokenizer(chat_template=template)
    for messages in ([USER], [SYSTEM, USER]):
        want = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(words, messages) == want


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
HOSTILE: list[Any] = [
    (LOOPS + ENDS, "it does not end within"),
    (LOOPS + "x" + ENDS, "does not end within|memory"),
    ("{% set big = 10 ** (10 ** 9) %}", "does not end within"),
    ("{{ 'x' * 2**31 }}", "more than 256 MiB of memory"),
    ("{{ '%9999999999d' % 1 }}", "more than 256 MiB of memory"),
    ("{{ messages[0].content.ljust(10 ** 10) }}", "more than 256 MiB of memory"),
    ("{{ messages[0].content.ljust(2 * 10 ** 7) }}", "more than 8,388,608 characters"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
]


@pytest.mark.parametrize("template, why", HOSTILE)
@pytest.mark.every(3)
def test_no_template_takes_all_time_or_memory(
    template: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any thread; and those after it are rendered."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY", 1 << 28)
    found: list[TemplateFault] = []

    def attempt() -> None:
        with pytest.raises(TemplateFault, match=why) as fault:
            render(tiny.tokenizer(chat_template=template), [USER])
        found.append(fault.value)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(found) == 1 and "\n" not in str(found[0])
    assert render(tiny.tokenizer(chat_template="{{ messages[0].role }}"), [USER]) == "user"


def test_an_interrupted_question_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer(chat_template="{{ messages[0].content }}")
    assert render(words, [USER]) == USER["content"]
    process = templates._WORKER._process
    assert process is not None and process.stdout is not None

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.stdout, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render(words, [SYSTEM])
    assert render(words, [USER]) == USER["content"] and process.returncode is not None


BROKEN = {
    "{% if %}": "TemplateSyntaxError: Expected an expression",
    "{{ messages[0].a.b }}": "UndefinedError: 'dict object' has no attribute 'a'",
    "{{ raise_exception('Only\nwith tools') }}": r"^Only$",
    "{{ raise_exception('red \x1b[31m \\ud800 é') }}": r"^red \\x1b\[31m \\ud800 é$",
    "{{ raise_exception('') }}": r"^no reason given$",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
}


@pytest.mark.parametrize("template, why", BROKEN.items())
def test_what_a_template_raises_is_one_line(template: str, why: str) -> None:
    with pytest.raises(TemplateFault, match=why) as fault:
        templated(tiny.tokenizer(chat_template=template), "hi", "Be kind.")
    assert not fault.value.of_these_texts


def test_one_template_of_several_has_to_be_the_default() -> None:
    words = tiny.tokenizer()
    words.chat_template = {"rag": "a", "tools": "b"}
    with pytest.raises(TemplateFault, match="multiple chat templates"):
        render(words, [USER])
    words.chat_template = {"rag": "a", "default": "b"}
    assert render(words, [USER]) == "b"


def test_a_tokenizer_may_have_no_jinja() -> None:
    """Some have code of their own in its place, which was trusted when it was loaded."""

    class Own:
        chat_template = "own"

        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return "".join(f"<{message['role']}>" for message in messages) + messages[-1]["content"][0]

    assert render(Own(), [SYSTEM, USER]) == "<system><user>1"
    with pytest.raises(TemplateFault, match="IndexError"):
        render(Own(), [{"role": "user", "content": ""}])


def test_a_refused_system_message_begins_the_users() -> None:
    words, heard = tiny.tokenizer(chat_template=GEMMA), list[str]()
    asked = Prompt("Q?\nAnswer:", user="Q?", system="Be kind.", response_prefix="Answer:")
    want = "<s><start_of_turn>user\nBe kind.\n\nQ?<end_of_turn>\n<start_of_turn>model\nAnswer:"
    for form in ("direct", "in_ensemble"):
        assert text_for("tokenizer", form, asked, words, heard.append) == want  # type: ignore[arg-type]
    assert heard == [NO_SYSTEM] * 2
    assert text_for("tokenizer", "direct", Prompt("Q?", user="Q?"), words, heard.append).count("user") == 1
    assert templated(tiny.tokenizer(chat_template=TURNS), "Q?", "Be kind.")[1] is False
    assert len(heard) == 2


def test_it_is_known_whether_a_fault_depends_on_the_texts() -> None:
    choosy = tiny.tokenizer(chat_template=CHOOSY + GEMMA)
    for system in (None, "Be kind."):
        with pytest.raises(TemplateFault, match=r"no animals|System role") as fault:
            templated(choosy, "A zebra?", system)
        assert fault.value.of_these_texts
    assert templated(tiny.tokenizer(chat_template=ALTERNATING), "Q?", "Be kind.")[1] is True
    broken = "{% if messages[0].role == 'system' %}{{ 1 // 0 }}{% endif %}" + TURNS
    with pytest.raises(TemplateFault, match="ZeroDivisionError") as fault:
        templated(tiny.tokenizer(chat_template=broken), "Q?", "Be kind.")
    assert not fault.value.of_these_texts, "every prompt with a system message fails"
