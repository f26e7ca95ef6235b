"""Training examples: from files of any usual form to conversations with the completion that is learned.

The flow is `rows of a file -> TuneExample`. A form is one function in FORMS. What cannot be read is a
UserError that names the file and the line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from proxytune.demo import world
from proxytune.errors import UserError, did_you_mean
from proxytune.records import JsonRow
from proxytune.tasks import TASKS, data

GENERATED = "generated"
ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
}
"""Alpaca's own two prompts, with and without an input."""


@dataclass(frozen=True)
class TuneExample:
    """What a model sees, and what it is to answer."""

    messages: tuple[tuple[str, str], ...]
    """Who speaks, and what; the last one is not the assistant's."""
    completion: str
    """The answer: loss is taken on it and on the end of the sequence, and on nothing else."""
    where: str
    """Where it is from, for an error message."""


@dataclass(frozen=True)
class TuneData:
    """Training and held-out examples, and what they are known by."""

    train: tuple[TuneExample, ...]
    validation: tuple[TuneExample, ...]
    sha256: str
    """Of the content of both, whatever files it stood in."""
    notes: tuple[str, ...] = ()


def read_data(source: str, validation: str | None, limit: int | None, seed: int) -> TuneData:
    """The examples of --data and --validation. A share of the data is drawn by the seed."""
    examples = read_examples(source, limit)
    held: list[TuneExample] = []
    if validation is not None:
        share = _share(validation)
        if share is None:
            held = read_examples(validation, None)
        else:
            count = max(1, round(share * len(examples)))
            if count >= len(examples):
                raise UserError(
                    f"--validation {validation} leaves none of the {len(examples)} examples to learn"
                )
            drawn = set(random.Random(f"validation/{seed}").sample(range(len(examples)), count))
            held = [example for place, example in enumerate(examples) if place in drawn]
            examples = [example for place, example in enumerate(examples) if place not in drawn]
    content = [[(e.messages, e.completion) for e in part] for part in (examples, held)]
    sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return TuneData(tuple(examples), tuple(held), sha256)


def _share(text: str) -> float | None:
    """The share that a text is; None if it names a file."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UserError(f"--validation {text}: a share lies between 0 and 1; or name a file")
    return share


def read_examples(source: str, limit: int | None) -> list[TuneExample]:
    """The examples of `FILE` or `FORM:FILE`."""
    form, colon, rest = source.partition(":")
    if not colon or Path(source).exists():
        form, rest = "", source
    elif form not in FORMS:
        raise UserError(f"{did_you_mean('form of data', form, FORMS)}. Write FILE or FORM:FILE")
    table = _table(form, rest, limit)
    examples: list[TuneExample] = []
    for index, row in enumerate(table.rows):
        try:
            found = (FORMS[form] if form else _either)(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            has = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"{table.where(index)}: {reason} (it has {has})") from None
        examples += [_checked(TuneExample(messages, text, table.where(index))) for messages, text in found]
        if limit is not None and len(examples) >= limit:
            return examples[:limit]
    return examples


def _table(form: str, rest: str, limit: int | None) -> data.DataTable:
    if rest == GENERATED:
        if form != "gsm8k":
            raise UserError("the demo world has training data of one form: gsm8k:generated")
        return data.generate("gsm", "train", limit or world.ITEMS["gsm"])
    table = data.read_file(Path(rest))
    prepare = TASKS["triviaqa"].prepare
    return prepare(table) if form == "triviaqa" and prepare is not None else table


def _checked(example: TuneExample) -> TuneExample:
    """The example, if there is something to learn and something before it."""
    if not example.completion.strip():
        raise UserError(f"{example.where}: the completion is empty")
    if not any(content.strip() for _, content in example.messages):
        raise UserError(f"{example.where}: the prompt is empty")
    return example


# Forms


Pair = tuple[tuple[tuple[str, str], ...], str]
"""Messages and a completion."""


def _text(row: JsonRow, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise TypeError(f"field '{field}' must be text, not {json.dumps(value)[:60]}")
    return value


def _one(prompt: str, completion: str, system: str | None = None) -> list[Pair]:
    messages = (("system", system),) if system else ()
    return [((*messages, ("user", prompt)), completion)]


def _either(row: JsonRow) -> list[Pair]:
    """A row of a file without a form: by the fields that it has."""
    if "messages" in row:
        return conversation(row)
    if "prompt" in row and "completion" in row:
        return _one(_text(row, "prompt"), _text(row, "completion"))
    raise ValueError(
        "neither `prompt` and `completion` nor `messages`; for an original file write its form before it "
        f"({', '.join(f'{name}:FILE' for name in FORMS)})"
    )


def conversation(row: JsonRow, field: str = "messages") -> list[Pair]:
    """Chat messages. Every answer is an example of its own, with what came before it as its prompt: what the
    model will see when it is to answer."""
    given = row[field]
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise TypeError(f"field '{field}' must be a list of messages")
    messages, found = list[tuple[str, str]](), list[Pair]()
    for number, message in enumerate(given, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"message {number} needs a `role` of {', '.join(ROLES)} and a `content` of text")
        if role == "assistant":
            if not messages or messages[-1][0] != "user":
                raise ValueError(f"message {number} is the assistant's and follows no user message")
            found.append((tuple(messages), content))
        messages.append((role, content))
    if not found:
        raise ValueError("no message is the assistant's")
    return found


def gsm8k(row: JsonRow) -> list[Pair]:
    """GSM8K's `question` and `answer`, with its calculator notes and `####`, as the paper's experts had them:
    without the line "Answer the following question." that evaluation puts first."""
    return _one(f"Question: {_text(row, 'question').strip()}\nAnswer:", f" {_text(row, 'answer').strip()}")


def triviaqa(row: JsonRow) -> list[Pair]:
    """TriviaQA's question and its usual answer."""
    return _one(f"Question: {row['question']}\nAnswer:", f" {row['answers'][0]}")


def alpaca(row: JsonRow) -> list[Pair]:
    """`instruction`, `input`, `output`, in Alpaca's own prompts."""
    fields = {"instruction": _text(row, "instruction"), "input": str(row.get("input") or "")}
    return _one(ALPACA[bool(fields["input"])].format(**fields), _text(row, "output"))


def dolly(row: JsonRow) -> list[Pair]:
    """`instruction`, `context`, `response`."""
    context = str(row.get("context") or "")
    text = _text(row, "instruction")
    return _one(f"{text}\n\n{context}" if context else text, _text(row, "response"))


def sharegpt(row: JsonRow) -> list[Pair]:
    """`conversations` of `from` and `value`."""
    given = row["conversations"]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise TypeError("field 'conversations' must be a list of turns")
    turns = [{"role": SHAREGPT.get(str(turn.get("from"))), "content": turn.get("value")} for turn in given]
    return conversation({"messages": turns})


FORMS: dict[str, Callable[[JsonRow], list[Pair]]] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "gsm8k": gsm8k,
    "sharegpt": sharegpt,
    "triviaqa": triviaqa,
}
"""Original files, by the name before the colon."""
