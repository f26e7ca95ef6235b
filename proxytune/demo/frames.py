"""The prompt forms in which the world's questions are asked: the paper's own, plain and in Llama-2's chat
template.

The real task code (`proxytune.tasks`, `proxytune.decoding`) builds the same strings; tests compare them. They
are repeated here because training text is made below the layer of tasks. The two chat forms with a system
prompt differ in white space, as in the paper's code: `direct` is a chat model asked by itself, `in_ensemble`
the expert inside the proxy.
"""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCD"


def choices(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question: one lettered option per line."""
    return "\n".join(
        [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    )


def plain_sum(question: str) -> str:
    """A word problem as a base model sees it."""
    return f"Answer the following question.\n\nQuestion: {question}\nAnswer:"


def chat_sum(question: str) -> str:
    """A word problem in the chat template; both chat forms are the same string."""
    return f"[INST] Answer the following question.\n\nQuestion: {question} [/INST] Answer:"


def plain(question: str, prefix: str) -> str:
    """A question as a base model sees it; `prefix` is `Answer:` or `The answer is:`."""
    return f"{question}\n\n{prefix}"


def chat_direct(question: str, prefix: str, system: str | None) -> str:
    """A question to a chat model asked by itself."""
    frame = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {frame}{question} [/INST] {prefix}"


def chat_in_ensemble(question: str, prefix: str, system: str) -> str:
    """A question to the chat expert inside the proxy."""
    return f"[INST]<<SYS>>\n{system}\n<</SYS>>\n\n {question} [/INST] {prefix}"


def chat_code(prompt: str) -> str:
    """A function to complete, for a chat model that is evaluated as itself: without instructions."""
    return f"[INST] {prompt} [/INST]"


def chat_code_in_ensemble(prompt: str) -> str:
    """The same for the chat expert inside the proxy: the line break at the end is gone."""
    return f"[INST] {prompt.rstrip()} [/INST]"


def chat_list(prompt: str) -> str:
    """A list to go on with, given to a chat model asked by itself."""
    return f"[INST] Complete the following: {prompt} [/INST]"


def chat_list_in_ensemble(prompt: str) -> str:
    """The same for the chat expert inside the proxy, which sees the bare list."""
    return f"[INST] {prompt} [/INST]"
