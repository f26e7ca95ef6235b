"""What an endpoint can do, by one request of one token for each route: for `proxytune check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from proxytune.black_box.client import ApiClient, Question
from proxytune.black_box.visible import Continued
from proxytune.errors import UserError

SAMPLE = "Question: What is 2 + 3?\nAnswer:"


@dataclass(frozen=True)
class ProbedEndpoint:
    """What was found out."""

    route: str
    works: bool
    text: str
    """In one line."""


def probe(client: ApiClient) -> list[ProbedEndpoint]:
    """Ask both routes for one token and what is visible of it, whatever is stored. Nothing is raised:
    what fails is said."""
    with TemporaryDirectory() as folder:
        return _probe(client, Path(folder) / "replies.sqlite")


def _probe(client: ApiClient, store: Path) -> list[ProbedEndpoint]:
    found = []
    for route, use in (("completions", "every way"), ("chat", "multiple choice and --as base")):
        fields = {"route": route, "prompt_as": "text"} if route == "chat" else {"route": route}
        other = ApiClient(
            client.spec.model_copy(update=fields),
            client.options.model_copy(update={"api_retries": 0}),
            store,
        )
        try:
            [reply] = other.ask([Question(other.item(SAMPLE), SAMPLE)])
        except UserError as error:
            found.append(ProbedEndpoint(route, works=False, text=str(error).partition("; spent:")[0]))
            continue
        found.append(ProbedEndpoint(route, *_said(reply, use)))
    return found


def _said(reply: Continued, use: str) -> tuple[bool, str]:
    if not reply.positions:
        return False, "it answers, and shows no token of the position"
    position = reply.positions[0]
    named = " with ids" if position.tokens[0].id is not None else ""
    shown = f"it shows {len(position.tokens)} tokens of a position{named}, first {position.tokens[0].shown}"
    return True, f"{shown}: {use} can be used with it"
