"""From examples to ids: what the model sees, and which of its tokens are learned.

A context is made exactly as decoding makes it (decoding/conversations.py), so that the expert meets in the
proxy what it was tuned on. Loss is taken on the completion and the end of the sequence only, as in the
paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.config import ModelSpec
from proxytune.decoding import Conversation, ids_of
from proxytune.errors import UserError
from proxytune.models import Tokenizer
from proxytune.tuning.examples import TuneExample

NOT_LEARNED = -100
"""The label of a token that counts for no loss (torch's own)."""


@dataclass(frozen=True)
class TokenRows:
    """Examples as ids and labels."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    """NOT_LEARNED on the prompt."""
    cut: int = 0
    """Examples whose completion was cut."""
    joined: int = 0
    """Examples whose prompt is tokenised otherwise when the completion follows it."""

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, self.ids), default=0)


def encode(
    examples: Sequence[TuneExample], spec: ModelSpec, tokenizer: Tokenizer, max_length: int
) -> TokenRows:
    """The examples in the chat format of `spec`, at most `max_length` tokens each. UserError, with the line,
    for a prompt that leaves no room for its completion, and for a tokenizer without an end of sequence."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer of '{spec.model}' has no end-of-sequence token, which is to be learned"
        )
    ids, labels, cut, joined = list[tuple[int, ...]](), list[tuple[int, ...]](), 0, 0
    for example in examples:
        text = Conversation(example.messages).text_for("expert", "proxy", spec, tokenizer)
        prompt = ids_of(spec, tokenizer, text)
        if len(prompt) >= max_length:
            raise UserError(
                f"{example.where}: the prompt has {len(prompt)} tokens, which leaves no room for its "
                f"completion in {max_length}: shorten it, or raise --max-length as far as the "
                "model's window allows"
            )
        whole = ids_of(spec, tokenizer, completed(text, example.completion, spec))
        if whole[-1:] != (eos,):
            whole = (*whole, eos)
        joined += whole[: len(prompt)] != prompt
        cut += len(whole) > max_length
        whole = whole[:max_length]
        ids.append(whole)
        labels.append((*[NOT_LEARNED] * len(prompt), *whole[len(prompt) :])[: len(whole)])
    return TokenRows(tuple(ids), tuple(labels), cut, joined)


def learned_tokens(rows: TokenRows, tokenizer: Tokenizer) -> dict[str, int]:
    """How often each token is learned, the most frequent first."""
    counts = Counter(label for labels in rows.labels for label in labels if label != NOT_LEARNED)
    names = tokenizer.convert_ids_to_tokens(list(counts))
    named = Counter(dict(zip(names, counts.values(), strict=True)))
    return dict(named.most_common())


def completed(text: str, completion: str, spec: ModelSpec) -> str:
    """A context with its completion: after a space, unless there is white space; a chat template brings its
    own."""
    if spec.chat == "tokenizer":
        return text + completion.lstrip()
    touch = text and not text[-1].isspace() and not completion[0].isspace()
    return f"{text}{' ' if touch else ''}{completion}"
