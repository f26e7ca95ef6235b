"""Multiple choice by the probabilities of the letters, as in the paper's section 7.

An endpoint shows few tokens. A letter that is not among them is at most as probable as the last that is: the
bound counts as its log-probability. Beside that stands the plain rule, by which only visible letters can be
chosen. An item of which no letter is visible ends in a fault, and has no score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxytune.records import Completion, Example, JsonRow


def letters_for(letters: str, choices: Callable[[Example], int]) -> Callable[[Example], Sequence[str]]:
    """What is compared: a space and a letter for each choice."""
    return lambda example: tuple(f" {letter}" for letter in letters[: choices(example)])


def most_probable(letters: str) -> Callable[[Example, Sequence[Completion]], JsonRow]:
    """The row of an example: the most probable letter, the first of equals, and the log-probabilities of all.
    Of an endpoint, `bounded` says which of them are bounds, and `visible_output` is the letter without
    those."""

    def row(example: Example, completions: Sequence[Completion]) -> JsonRow:
        logprobs = [completion.logprob for completion in completions]
        letter = letters[logprobs.index(max(logprobs))]
        found = {**example.target, "logprobs": logprobs, "mc_output": letter, "parsed_output": letter}
        if all(completion.bounded is None for completion in completions):
            return found
        bounded = [completion.bounded is True for completion in completions]
        visible = [place for place, bound in enumerate(bounded) if not bound]
        plain = letters[max(visible, key=logprobs.__getitem__)] if visible else letter
        return found | {"bounded": bounded, "visible_output": plain}

    return row


def score(row: JsonRow) -> dict[str, float]:
    """`accuracy`; for an endpoint with the bounds, and `accuracy_visible` without them."""
    right = row["mc_answer_idx"]
    found = {"accuracy": float(row["parsed_output"] == right)}
    if "visible_output" in row:
        found["accuracy_visible"] = float(row["visible_output"] == right)
    return found
