"""Chat templates of tokenizers, rendered under limits.

A chat template is a program that comes with a checkpoint. It can loop for days or build a text of gigabytes,
and no thread of ours could be stopped from outside. So templates are rendered by another process
(template_worker.py), which is started with the first one. What it gives is what
`tokenizer.apply_chat_template` gives: it calls the same function of transformers."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from proxytune.errors import UserError
from proxytune.models import Tokenizer

Message = dict[str, str]
"""`role` and `content`."""

SECONDS = 5
"""CPU time in which a template must be rendered. Usual ones take a thousandth of a second."""
MEMORY = 1 << 30
"""Bytes that rendering may take."""
CHARACTERS = 1 << 23
"""Longest text of a template."""


class TemplateFault(UserError):
    """A chat template that gives no text for some messages, and why."""

    def __init__(self, reason: str, *, refused: bool = False, of_these_texts: bool = False) -> None:
        """`refused`: the template raised this itself (`raise_exception`). `of_these_texts`: it has a text for
        other messages of the same roles."""
        super().__init__(reason)
        self.refused, self.of_these_texts = refused, of_these_texts


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The messages in the chat template of a tokenizer, up to where the assistant speaks. TemplateFault, with
    the reason in one line, where there is no such text."""
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _rendered_by_its_own_code(tokenizer, messages)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # none, or several without a default
        raise TemplateFault(_line(str(error))) from None
    answer = _WORKER.ask(
        {
            "template": template,
            "messages": list(messages),
            "special_tokens": tokenizer.special_tokens_map,
            "seconds": SECONDS,
            "bytes": MEMORY,
            "characters": CHARACTERS,
        }
    )
    if "error" in answer:
        raise TemplateFault(_line(answer["error"]), refused=answer.get("refused", False))
    text: str = answer["text"]
    return text


def _rendered_by_its_own_code(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """For tokenizers that are no user of Jinja: theirs is code that was trusted when it was loaded."""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # as wide as what such code may raise
        raise TemplateFault(_line(f"{type(error).__name__}: {error}")) from error
    return text


def _line(text: str) -> str:
    """The first line of a message, not too long; what cannot be printed or stored is spelt out."""
    lines = text.strip().splitlines() or ["no reason given"]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in lines[0][:300])


class _Worker:
    """The process that renders, started when it is first asked and after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question; why there is none, where the question ended the process."""
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(question, default=str) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BaseException:  # interrupted: the next answer would be to another question
                process.kill()
                self._end()
                raise
            if line.endswith("\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer
            code = self._end()
        if code == -signal.SIGPROF:
            return {"error": f"it does not end within {question['seconds']} seconds"}
        if code < 0:
            return {"error": f"it ends its process with {signal.Signals(-code).name}"}
        raise RuntimeError(f"the process that renders chat templates ended with {code}: see above")

    def _start(self) -> subprocess.Popen[str]:
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment = {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us
        )
        return self._process

    def _end(self) -> int:
        """Wait for the end of the process; -> its exit code."""
        process, self._process = self._process, None
        assert process is not None
        with process:  # closes its stdin, at which it ends
            pass
        return process.returncode

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._end()


_WORKER = _Worker()
atexit.register(_WORKER.close)
