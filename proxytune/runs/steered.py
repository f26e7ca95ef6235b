"""A loaded system: its models stay in memory, and every call is answered by them. `generate` is the one-call
form."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from proxytune.config import AlphaSchedule, Role, Sampling, System, TraceKind, as_system
from proxytune.decoding import notes_on, stored_response
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import DecodeOptions, JudgeOptions, RunOptions
from proxytune.records import Completion, Example, Prompt, Run, named_by_content
from proxytune.runs.alpha_sweep import parse_alphas, sweep
from proxytune.runs.decoders import AnyDecoder, client_of, consent, decoder_for
from proxytune.runs.evaluation import Evaluation, alpha_for, asked_for, show_in_notebooks

Alpha = AlphaSchedule | float | str | None
"""What a call takes as alpha; None is the system's."""
IN_USE = (
    "a stream of this model is still open: read it to its end or close it first (with `with`), or load the "
    "system a second time"
)


@dataclass(frozen=True)
class Comparison(Mapping[Role, Completion]):
    """One prompt, answered by every role; the proxy's response with its trace."""

    prompt: str
    responses: dict[Role, Completion]

    def __getitem__(self, role: Role) -> Completion:
        return self.responses[role]

    def __iter__(self) -> Iterator[Role]:
        return iter(self.responses)

    def __len__(self) -> int:
        return len(self.responses)

    def _repr_html_(self) -> str:
        """In a notebook: the proxy's tokens, and all responses."""
        from proxytune.report import notebook  # it needs pandas, and no answer does

        return notebook.comparison_html(self.prompt, self.responses)

    def __str__(self) -> str:
        return "\n\n".join(f"[{role}]\n{completion.text}" for role, completion in self.responses.items())


class SteeredModel:
    """A system whose models are loaded once: each when a call first needs it.

    Threads take turns: a call waits for that of another thread. A stream that is open is refused instead of
    waited for, since nobody knows when it ends."""

    def __init__(self, models: Models, decode: DecodeOptions | None = None) -> None:
        """Decode with `models`; `decode` is how. `load` is the short form."""
        show_in_notebooks()
        self.models = models
        self.decode = decode or DecodeOptions()
        self._lock = threading.RLock()
        self._stream: ResponseStream | None = None
        self._decoder: AnyDecoder | None = None
        self._client = client_of(models.system, self.decode.api)
        self._closed = False

    @property
    def system(self) -> System:
        """The system whose models these are."""
        return self.models.system

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"SteeredModel({self.system.name}: {', '.join(self.system.roles)}{state})"

    def __enter__(self) -> SteeredModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End an open stream and let go of the models; every later call is a UserError."""
        if self._stream is not None:
            self._stream.close()
        with self._lock:
            self._decoder, self._closed = None, True
            self.models.release(keep=[])

    def prepare(self, as_: str = "proxy") -> None:
        """Load what a role needs now, and not with its first response."""
        with self._answering(self.system.require(as_)):
            pass

    def generate(
        self,
        prompts: Sequence[str | Prompt],
        *,
        as_: str = "proxy",
        sampling: Sampling | None = None,
        alpha: Alpha = None,
        allow_negative_alpha: bool = False,
        trace: bool = False,
    ) -> list[Completion]:
        """Responses to `prompts`, in their order (`sampling.n` in a row for each). A text is the plain prompt
        of all roles. `trace` records every token's probability under each role; it changes no token."""
        examples = named_by_content(prompts)
        role, strength = self._asked(as_, alpha, allow_negative_alpha)
        place = {example.id: i for i, example in enumerate(examples)}
        with self._answering(role) as decoder:
            kind: TraceKind = "tokens" if trace else "off"
            found = list(decoder.stream(examples, sampling or Sampling(), alpha=strength, trace=kind))
            _warn(decoder, found)
        return sorted(found, key=lambda completion: (place[completion.example_id], completion.sample))

    def stream(
        self,
        prompt: str | Prompt,
        *,
        as_: str = "proxy",
        sampling: Sampling | None = None,
        alpha: Alpha = None,
        allow_negative_alpha: bool = False,
        trace: bool = False,
    ) -> ResponseStream:
        """The response to one prompt in pieces of text, as they are decoded. The whole of it is the stream's
        `completion` at the end. It raises a UserError where a chat template has no text for the prompt."""
        chosen = sampling or Sampling()
        if chosen.n > 1:
            raise UserError(f"a stream is of one response: leave n = {chosen.n} out, or use generate")
        [example] = named_by_content([prompt])
        role, strength = self._asked(as_, alpha, allow_negative_alpha)
        with self._answering(role) as decoder:
            self._stream = ResponseStream(self, decoder, example, chosen, strength, trace=trace)
            return self._stream

    def logprobs(
        self,
        prompt: str | Prompt,
        texts: Sequence[str],
        *,
        as_: str = "proxy",
        alpha: Alpha = None,
        allow_negative_alpha: bool = False,
    ) -> list[float]:
        """The log-probability (natural) of each text after the prompt: the sum over its tokens, without an
        end-of-sequence token."""
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise UserError('texts must be a list of texts that are not empty: [" A", " B"]')
        [example] = named_by_content([prompt])
        role, strength = self._asked(as_, alpha, allow_negative_alpha)
        with self._answering(role) as decoder:
            found = list(decoder.likelihoods([example], lambda _: texts, alpha=strength))
            _warn(decoder, found)
        return [completion.logprob for completion in sorted(found, key=lambda completion: completion.sample)]

    def compare(
        self,
        prompt: str | Prompt,
        *,
        sampling: Sampling | None = None,
        alpha: Alpha = None,
        allow_negative_alpha: bool = False,
    ) -> Comparison:
        """The responses of all roles to one prompt; alpha is the proxy's."""
        self.system.require("proxy")
        shown = prompt if isinstance(prompt, str) else prompt.plain
        responses: dict[Role, Completion] = {}
        for role in self.system.roles:
            strength = alpha if role == "proxy" else None
            [responses[role]] = self.generate(
                [prompt],
                as_=role,
                sampling=(sampling or Sampling()).model_copy(update={"n": 1}),
                alpha=strength,
                allow_negative_alpha=allow_negative_alpha,
                trace=role == "proxy",
            )
        return Comparison(shown, responses)

    def evaluate(
        self,
        task: str,
        *,
        as_: str = "proxy",
        limit: int | None = None,
        out: str | Path | None = None,
        options: RunOptions | None = None,
        judge: JudgeOptions | str | None = None,
    ) -> Run:
        """As `proxytune.evaluate`, on these models. Before a judge is asked, they are let go, since it may be
        a large model as well; a later call loads them again."""
        evaluation = self._evaluation(task, options, limit, judge)
        with self._turn():
            self._decoder = None  # the run has a decoder of its own
            return evaluation.run(as_, None if out is None else Path(out))[0]

    def sweep(
        self,
        task: str,
        alphas: str | Sequence[AlphaSchedule | float | str],
        *,
        limit: int | None = None,
        out: str | Path | None = None,
        options: RunOptions | None = None,
        judge: JudgeOptions | str | None = None,
    ) -> list[Run]:
        """Evaluate the proxy under every alpha, in one pass: what `proxytune sweep-alpha` does. `alphas` is
        its text ("0:2:0.2") or a list. -> the runs in that order."""
        text = alphas if isinstance(alphas, str) else ",".join(_alpha_text(alpha) for alpha in alphas)
        evaluation = self._evaluation(task, options, limit, judge)
        with self._turn():
            self._decoder = None
            return sweep(evaluation, parse_alphas(text), None if out is None else Path(out))[1]

    def _evaluation(
        self,
        task: str,
        options: RunOptions | None,
        limit: int | None,
        judge: JudgeOptions | str | None,
    ) -> Evaluation:
        asked, who = asked_for(options, limit, judge)
        return Evaluation(self.system, task, asked, self.decode, who, loaded=self.models)

    def _asked(self, as_: str, alpha: Alpha, allow_negative: bool) -> tuple[Role, AlphaSchedule | None]:
        """The role, and its alpha."""
        role = self.system.require(as_)
        return role, alpha_for(self.system, role, alpha, allow_negative=allow_negative)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A time in which nothing else decodes with these models."""
        with self._lock:
            if self._closed:
                raise UserError(f"{self!r} answers no more: load the system again")
            if self._stream is not None:
                raise UserError(IN_USE)
            yield

    @contextmanager
    def _answering(self, role: Role) -> Iterator[AnyDecoder]:
        """A turn with the decoder of a role, which the next call of that role finds again."""
        with self._turn():
            if self._decoder is None or self._decoder.role != role:
                self._decoder = None  # its caches would be in memory beside those of the next
                if self._client is not None and role in ("base", "proxy"):
                    consent(self._client, None)
                self._decoder = decoder_for(self.models, role, self.decode, client=self._client)
                for note in self._decoder.notes():
                    warnings.warn(note, stacklevel=5)
            self._decoder.remarks.clear()
            yield self._decoder

    def _ended(self) -> None:
        """The open stream is at its end."""
        self._stream = None


class ResponseStream(Iterator[str]):
    """One response as it is decoded: pieces of text, which together are the text of `completion`.

    Its model does nothing else until it is at its end or closed."""

    completion: Completion | None = None
    """The whole response, at the end of the stream."""

    def __init__(
        self,
        model: SteeredModel,
        decoder: AnyDecoder,
        example: Example,
        sampling: Sampling,
        alpha: AlphaSchedule | None,
        *,
        trace: bool,
    ) -> None:
        self._model, self._decoder = model, decoder
        self._pieces: list[str] = []
        schedule = model.system.alpha if alpha is None else alpha
        kind: TraceKind = "tokens" if trace else "off"
        self._stopped = False
        self._steps = decoder.steps([(example, [schedule])], sampling, trace=kind, on_text=self._hear)

    def _hear(self, example_id: str, sample: int, piece: str) -> None:
        self._pieces.append(piece)

    def __next__(self) -> str:
        try:
            while not any(self._pieces):
                if self._stopped:
                    raise StopIteration
                finished = next(self._steps)
                if finished:
                    self.completion = finished[0][1]
                    if self.completion.finish_reason == "template":
                        raise UserError(str(self.completion.remark))
                    _warn(self._decoder, [self.completion])
        except BaseException:  # at its end, too
            self.close()
            raise
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def stop(self) -> None:
        """Have the response end after the step that is under way: for a signal handler, or another thread.
        What is there of it comes yet."""
        self._stopped = True

    def close(self) -> None:
        """End the response where it is; nothing is decoded any more. A second time does nothing."""
        self._steps.close()
        self._model._ended()

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def load(
    system: System | str | Path,
    *,
    decode: DecodeOptions | None = None,
    trust_remote_code: bool = False,
) -> SteeredModel:
    """A system whose models are loaded once: a System, a name in configs/systems, or the path of a YAML file.

    Use it with `with`, or call its `close`. Raises UserError for a system that is not there or cannot be
    read."""
    return SteeredModel(Models(as_system(system), trust_remote_code=trust_remote_code), decode)


def generate(
    system: System | str | Path,
    prompts: Sequence[str | Prompt],
    *,
    as_: str = "proxy",
    sampling: Sampling | None = None,
    alpha: Alpha = None,
    allow_negative_alpha: bool = False,
    decode: DecodeOptions | None = None,
    models: Models | None = None,
) -> list[Completion]:
    """Responses to `prompts`, in their order (`sampling.n` in a row for each). A text is the plain prompt of
    all roles. `decode` is how they are computed. It changes no token.
    """
    model = SteeredModel(models or Models(as_system(system)), decode)
    return model.generate(
        prompts, as_=as_, sampling=sampling, alpha=alpha, allow_negative_alpha=allow_negative_alpha
    )


def _alpha_text(alpha: AlphaSchedule | float | str) -> str:
    return alpha.text if isinstance(alpha, AlphaSchedule) else str(alpha)


def _warn(decoder: AnyDecoder, found: Sequence[Completion]) -> None:
    """What a reader of the responses should know, as warnings."""
    for note in (*decoder.remarks, *notes_on([stored_response(completion) for completion in found])):
        warnings.warn(note, stacklevel=4)
