"""`proxytune generate`: a response as it arrives, or all roles side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import (
    API,
    DECODING,
    RESPONSE,
    Alpha,
    As,
    Json,
    NegativeAlpha,
    RemoteCode,
    SystemName,
    Vocab,
    grouped,
)
from proxytune.cli.side_by_side import changed_places, response_tokens, show_side_by_side
from proxytune.config import AlphaSchedule, Role, Sampling, System, TraceKind
from proxytune.errors import UserError
from proxytune.options import ApiOptions, DecodeOptions
from proxytune.records import Completion, Example, Prompt

if TYPE_CHECKING:
    from proxytune.black_box import ApiClient
    from proxytune.models import Models
    from proxytune.runs.decoders import AnyDecoder

Defer = Annotated[
    float | None,
    typer.Option(
        metavar="GAMMA",
        min=0.0,
        max=1.0,
        help="With a base behind an API: it speaks alone, and the expert where its most probable token "
        "has less than GAMMA.",
        rich_help_panel="A base behind an API",
    ),
]


@grouped(sampling=RESPONSE, decode=DECODING, api=API)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt, or - for stdin.")],
    *,
    system: SystemName = "demo",
    as_: As = "proxy",
    alpha: Alpha = None,
    allow_negative_alpha: NegativeAlpha = False,
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    sampling: Sampling,
    decode: DecodeOptions,
    api: ApiOptions,
    defer: Defer = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="All roles side by side; the tokens that the proxy changed are marked."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Stream a response.

    Example: proxytune generate $'Answer the following question.\\n\\nQuestion: Tugil has 24 nuts. Then the
    pile grows 4 times. Tugil buys 3 more. How many nuts does Tugil have now?' --system demo --compare
    """
    made, example = console.read_system(system, vocab), read_prompt(prompt)
    if compare:
        _one_of_each(as_, sampling)
    elif as_ == "all":
        raise UserError("generate speaks as one role: --compare shows all of them side by side")

    from proxytune.models import Models

    on_load = console.show_loading if sys.stderr.isatty() else None
    models = Models(made, trust_remote_code=trust_remote_code, on_load=on_load)
    speaker = Speaker(models, example, sampling, decode, alpha, allow_negative_alpha, api, defer)
    if compare:
        _compare(speaker, json_only=json)
    else:
        _stream(speaker, made.require(as_), json_only=json)


def read_prompt(text: str) -> Example:
    """The prompt, or stdin where it is `-`, as the one example to decode."""
    try:
        found = sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin is no {error.encoding} text: {error.reason}") from None
    if not found.strip():
        raise UserError("the prompt is empty")
    return Example(id="0", prompt=Prompt(plain=found, user=found))


@dataclass(frozen=True)
class Speaker:
    """One prompt, to be answered by the roles of a system."""

    models: Models
    example: Example
    sampling: Sampling
    decode: DecodeOptions
    alpha: str | None
    allow_negative: bool
    api: ApiOptions
    defer: float | None

    @property
    def system(self) -> System:
        """The system whose roles answer."""
        return self.models.system

    def alpha_of(self, role: Role, asked: str | None) -> AlphaSchedule | None:
        """The checked alpha of a role."""
        from proxytune.runs import evaluation

        return evaluation.alpha_for(self.system, role, asked, allow_negative=self.allow_negative)

    @cached_property
    def client(self) -> ApiClient | None:
        """What asks the base, where it is behind an API and its cost is agreed to."""
        from proxytune.runs.decoders import client_of, consent

        made = client_of(self.system, self.api)
        if made is not None:
            made.check()
            consent(made, console.asked_on_terminal if sys.stdin.isatty() else None)
        return made

    def decoder(self, role: Role) -> AnyDecoder:
        """The decoder of a role. Notes about its models go to stderr."""
        from proxytune.runs.decoders import decoder_for

        client = self.client if role in ("base", "proxy") else None
        made = decoder_for(self.models, role, self.decode, client=client, defer=self.defer)
        for note in made.notes():
            console.say(f"note: {note}")
        return made


def _stream(speaker: Speaker, role: Role, *, json_only: bool) -> None:
    """The responses of one role; a single one as it arrives."""
    alpha = speaker.alpha_of(role, speaker.alpha)
    decoder, sampling = speaker.decoder(role), speaker.sampling
    streams = sampling.n == 1 and not json_only
    on_text = _hear if streams else None
    stream = decoder.stream([speaker.example], sampling, alpha=alpha, on_text=on_text)
    found = asked(sorted(stream, key=lambda completion: completion.sample))
    if json_only:
        console.print_json({"as": role, "responses": [_as_json(completion) for completion in found]})
    elif streams:
        console.write_data("\n")
    else:
        for completion in found:
            console.write_data(f"--- {completion.sample + 1}\n{completion.text}\n")
    _say_notes(decoder, found)


def asked(found: Sequence[Completion]) -> Sequence[Completion]:
    """The responses; UserError where a chat template has no text for the prompt."""
    for completion in found:
        if completion.finish_reason == "template":
            raise UserError(completion.remark)
    return found


def _say_notes(decoder: AnyDecoder, found: Sequence[Completion]) -> None:
    """What a reader of the responses should know, on stderr."""
    from proxytune.decoding import notes_on, stored_response

    for note in (*decoder.remarks, *notes_on([stored_response(completion) for completion in found])):
        console.say(f"note: {note}")
    if spent := decoder.work().spent:
        console.say(spent)


def _one_of_each(as_: str, sampling: Sampling) -> None:
    """UserError for options that --compare would have to ignore."""
    if sampling.n > 1:
        raise UserError(f"--compare shows one response of each role: leave -n {sampling.n} out")
    if as_ not in ("proxy", "all"):
        raise UserError(f"--compare shows all roles: leave --as {as_} out")


def _hear(example_id: str, sample: int, piece: str) -> None:
    """Print one more piece of the only response. A character is written out alone, so an escape sequence may
    be split over pieces."""
    console.write_data(piece)


def _as_json(completion: Completion) -> dict[str, object]:
    """A completion as JSON."""
    content = asdict(completion)
    del content["example_id"], content["trace"], content["took"]
    return content


def _compare(speaker: Speaker, *, json_only: bool) -> None:
    """One response of every role; in the proxy's, what it changed relative to the base."""
    system, models = speaker.system, speaker.models
    speaker.alpha_of(system.require("proxy"), speaker.alpha)
    found: dict[Role, Completion] = {}
    for role in system.roles:
        if role == "tuned":
            models.release(keep=[role])
        alpha = speaker.alpha_of(role, speaker.alpha if role == "proxy" else None)
        trace: TraceKind = "tokens" if role == "proxy" else "off"
        decoder = speaker.decoder(role)
        stream = decoder.stream([speaker.example], speaker.sampling, alpha=alpha, trace=trace)
        [found[role]] = asked(list(stream))
        _say_notes(decoder, [found[role]])
    if json_only:
        roles = {role: _as_json(completion) for role, completion in found.items()}
        tokens = response_tokens(found["proxy"])
        texts = [token.text for token in tokens]
        console.print_json({"roles": roles, "proxy_tokens": texts, "changed": changed_places(tokens)})
        return
    show_side_by_side(found)
