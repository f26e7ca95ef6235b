"""Errors that a user can mend. A `UserError` is shown as one line with exit code 2; every other exception is
a bug and keeps its traceback."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the value, what is allowed and, where there is one, the next command."""


class PromptTooLong(UserError):
    """A prompt that leaves no room for a response in the context window of a model."""

    def __init__(self, prompt: str, model: str, tokens: int, window: int) -> None:
        """`prompt` names it; `model` has a window of so many tokens."""
        super().__init__(
            f"{prompt} has {tokens} tokens for the {model}, whose context window is {window}: "
            "shorten the prompt"
        )
        self.model, self.tokens, self.window = model, tokens, window


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for an unknown `name`: the nearest known names first, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f" Did you mean: {', '.join(near)}?" if near else ""
    return UserError(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}")


def needs_extra(feature: str, package: str, extra: str) -> None:
    """Raise the error with the exact install line unless `package` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{feature} needs the package '{package}'. Install: pip install 'proxytune[{extra}]'")
