"""The responses of all roles to one prompt, side by side, with the tokens marked that the proxy changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from proxytune.cli import console
from proxytune.config import Role
from proxytune.records import Completion, TracedToken
from proxytune.terminal import visible

CHANGED = "bold reverse"


def show_side_by_side(found: Mapping[Role, Completion]) -> None:
    """Print the responses; that of the proxy has its trace."""
    tokens = response_tokens(found["proxy"])
    changed = changed_places(tokens)
    plain = not console.console().is_terminal
    table = Table(show_lines=True)
    for role in found:
        table.add_column(role, overflow="fold", ratio=1)
    table.add_row(*(_marked(tokens, plain) if role == "proxy" else c.text for role, c in found.items()))
    console.show_table(table)
    mark = "in [brackets]" if plain else "highlighted"
    console.show(
        f"{len(changed)} of {len(tokens)} tokens of the proxy are not the base's first choice ({mark})"
    )


def response_tokens(completion: Completion) -> tuple[TracedToken, ...]:
    """The traced tokens of a response without its end-of-sequence token."""
    return completion.trace[:-1] if completion.finish_reason == "eos" else completion.trace


def changed_places(tokens: Sequence[TracedToken]) -> list[int]:
    """Which tokens the proxy changed."""
    return [place for place, token in enumerate(tokens) if is_changed(token)]


def is_changed(token: TracedToken) -> bool:
    """Whether the proxy chose another token than the base would have here."""
    return token.text != token.top["base"]


def _marked(trace: Sequence[TracedToken], plain: bool) -> Text:
    """The proxy's response with the changed tokens marked: in brackets where there are no colours."""
    text = Text()
    for token in trace:
        changed, shown = is_changed(token), visible(token.text)
        text.append(f"[{shown}]" if changed and plain else shown, CHANGED if changed else None)
    return text
