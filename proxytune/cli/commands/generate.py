"""The body of `proxytune generate`: a response as it arrives, or all roles side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from rich.table import Table
from rich.text import Text

from proxytune.cli.commands.evaluate import console, print_json, tell_loading
from proxytune.config import Role, Sampling, System, TraceKind
from proxytune.decoding.decoder import Decoder
from proxytune.errors import UserError
from proxytune.models.loading import Models
from proxytune.records import Completion, Example, Prompt, TracedToken
from proxytune.runs.evaluate import alpha_for
from proxytune.speculate import speculation

CHANGED = "bold reverse"


@dataclass(frozen=True)
class Request:
    """What the options of `generate` said."""

    prompt: str
    as_: str
    alpha: str | None
    sampling: Sampling
    batch: int | None
    kv_memory: int | None
    """Bytes for the KV pools of all models."""
    speculate: str
    drafter: str | None
    allow_negative_alpha: bool
    trust_remote_code: bool

    @property
    def example(self) -> Example:
        """The prompt as the one example to decode."""
        text = sys.stdin.read() if self.prompt == "-" else self.prompt
        if not text.strip():
            raise UserError("the prompt is empty")
        return Example(id="0", prompt=Prompt(plain=text, user=text))

    def decoder(self, models: Models, role: Role) -> Decoder:
        """The decoder of a role; says on stderr what a user should know about its models."""
        made = Decoder(
            models,
            role,
            max_batch=self.batch,
            kv_memory=self.kv_memory,
            speculation=speculation(self.speculate, self.drafter),
        )
        for note in made.notes():
            print(f"note: {note}", file=sys.stderr)
        return made


def generate(system: System, asked: Request, *, compare: bool, json_only: bool) -> None:
    """Print the responses of one role, or one response of every role."""
    example = asked.example
    on_load = tell_loading if sys.stderr.isatty() else None
    models = Models(system, trust_remote_code=asked.trust_remote_code, on_load=on_load)
    if compare:
        _one_of_each(asked)
        _compare(system, asked, example, models, json_only=json_only)
        return
    if asked.as_ == "all":
        raise UserError("generate speaks as one role: --compare shows all of them side by side")
    role = system.require(asked.as_)
    alpha = alpha_for(system, role, asked.alpha, allow_negative=asked.allow_negative_alpha)
    decoder = asked.decoder(models, role)
    printer = _Printer(sys.stdout) if asked.sampling.n == 1 and not json_only else None
    stream = decoder.stream([example], asked.sampling, alpha=alpha, on_text=printer.hear if printer else None)
    found = sorted(stream, key=lambda completion: completion.sample)
    if json_only:
        print_json({"as": role, "responses": [_told(completion) for completion in found]})
    elif printer is not None:
        printer.end()
    else:
        for completion in found:
            print(f"--- {completion.sample + 1}\n{completion.text}")


def _one_of_each(asked: Request) -> None:
    """UserError for options that --compare would have to ignore."""
    if asked.sampling.n > 1:
        raise UserError(f"--compare shows one response of each role: leave -n {asked.sampling.n} out")
    if asked.as_ not in ("proxy", "all"):
        raise UserError(f"--compare shows all roles: leave --as {asked.as_} out")


class _Printer:
    """Prints text as it arrives."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def hear(self, example_id: str, sample: int, piece: str) -> None:
        """One more piece of the only response."""
        self.out.write(piece)
        self.out.flush()

    def end(self) -> None:
        """Close the last line."""
        self.out.write("\n")


def _told(completion: Completion) -> dict[str, object]:
    """A completion as JSON."""
    told = asdict(completion)
    del told["example_id"], told["trace"]
    return told


def _compare(system: System, asked: Request, example: Example, models: Models, *, json_only: bool) -> None:
    """One response of every role; in the proxy's, what it changed relative to the base."""
    alpha_for(system, system.require("proxy"), asked.alpha, allow_negative=asked.allow_negative_alpha)
    found: dict[Role, Completion] = {}
    for role in system.roles:
        if role == "tuned":
            models.release(keep=[role])
        own = asked.alpha if role == "proxy" else None
        alpha = alpha_for(system, role, own, allow_negative=asked.allow_negative_alpha)
        trace: TraceKind = "tokens" if role == "proxy" else "off"
        [found[role]] = asked.decoder(models, role).stream(
            [example], asked.sampling, alpha=alpha, trace=trace
        )
    trace_of_proxy = said(found["proxy"])
    changed = [place for place, token in enumerate(trace_of_proxy) if is_changed(token)]
    if json_only:
        tokens = [token.text for token in trace_of_proxy]
        roles = {role: _told(completion) for role, completion in found.items()}
        print_json({"roles": roles, "proxy_tokens": tokens, "changed": changed})
        return
    plain = not console().is_terminal
    table = Table(show_lines=True)
    for role in found:
        table.add_column(role, overflow="fold", ratio=1)
    table.add_row(
        *(_marked(trace_of_proxy, plain) if role == "proxy" else Text(c.text) for role, c in found.items())
    )
    console().print(table)
    mark = "in [brackets]" if plain else "highlighted"
    print(
        f"{len(changed)} of {len(trace_of_proxy)} tokens of the proxy "
        f"are not what the base would have said ({mark})"
    )


def said(completion: Completion) -> tuple[TracedToken, ...]:
    """The traced tokens of a response without its end-of-sequence token."""
    return completion.trace[:-1] if completion.finish_reason == "eos" else completion.trace


def is_changed(token: TracedToken) -> bool:
    """Whether the proxy chose another token than the base would have here."""
    return token.text != token.top["base"]


def _marked(trace: Sequence[TracedToken], plain: bool) -> Text:
    """The proxy's response with the changed tokens marked: in brackets where there are no colours."""
    text = Text()
    for token in trace:
        changed = is_changed(token)
        text.append(f"[{token.text}]" if changed and plain else token.text, CHANGED if changed else None)
    return text
