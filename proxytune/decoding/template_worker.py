"""Renders chat templates, in a process of its own: a template is a program that comes with a checkpoint.

templates.py starts this file. Every line of stdin is a question, every line of stdout its answer, JSON both.
A template that does not end is ended by the kernel, whatever it is doing; one that wants too much memory gets
none. The process imports no torch, and ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any


def main() -> None:
    """Answer questions until there are no more."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    limited = False
    for line in sys.stdin:
        question = json.loads(line)
        if not limited:  # behind the imports, which need memory too
            limit_memory(question["bytes"])
            limited = True
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])  # the default action is the end
        answer: dict[str, Any]
        try:
            rendered, _ = render_jinja_template(
                conversations=[question["messages"]],
                chat_template=question["template"],
                add_generation_prompt=True,
                **question["special_tokens"],
            )
            answer = {"text": rendered[0]}
            if len(rendered[0]) > question["characters"]:
                answer = {"error": f"its text has more than {question['characters']:,} characters"}
        except MemoryError:
            answer = {"error": f"it needs more than {question['bytes'] >> 20} MiB of memory"}
        except Exception as error:  # a template can raise anything
            refused = type(error) is TemplateError  # raise_exception: the template's own words
            said = str(error) if refused else f"{type(error).__name__}: {error}"
            answer = {"error": said, "refused": refused}
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def limit_memory(more: int) -> None:
    """At most so many bytes beside what is in use, where the system can tell."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
