"""A run decoded by vLLM: the same examples, settings and rows as by our engine, which is the reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from proxytune.config import AlphaSchedule, RunSpec, Sampling, TraceKind
from proxytune.decoding import SteppedDecoder
from proxytune.errors import UserError
from proxytune.integrations.vllm_plugin.alpha import ALPHA, FROM
from proxytune.integrations.vllm_plugin.launch import VllmLaunch, require_vllm
from proxytune.models import Models
from proxytune.options import DecodeOptions, EngineOptions
from proxytune.records import Completion, Example, FinishReason, Prompt, RoleMemory, Took
from proxytune.runs.decoders import RunDecoder
from proxytune.terminal import WorkSoFar


@dataclass(frozen=True)
class Wanted:
    """A response, or the log-probability of a text, that vLLM was asked for."""

    example: Example
    number: int
    alpha: AlphaSchedule
    prompt: int
    """Tokens of the prompt, without the text that is scored."""
    text: str = ""
    """The text that is scored."""
    ids: tuple[int, ...] = ()
    """Its ids."""
    draws: Sampling = field(default_factory=Sampling)


class VllmDecoder(SteppedDecoder):
    """Decodes as one role of a system, in an engine of vLLM."""

    def __init__(self, launch: VllmLaunch) -> None:
        """Check the system and start the engine. UserError where vLLM cannot run it."""
        version = require_vllm()
        launch.check()
        self.launch, self.models, self.texts = launch, launch.models, launch.texts
        self.remarks = launch.texts.remarks
        self.remarks.append(f"decoded by vLLM {version}")
        self._engine: Any = self._started()
        self._waiting: dict[str, Wanted] = {}
        self._finished, self._tokens, self._began = 0, 0, time.perf_counter()
        self._asked, self._share = 0, 0.0

    def _started(self) -> Any:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = self.launch.arguments()
        for name in self.launch.names:
            if self.models.on_load is not None:
                self.models.on_load(name, self.models.spec(name))
        try:
            return LLMEngine.from_engine_args(EngineArgs(**arguments, disable_log_stats=True))
        except ValueError as error:  # vLLM's word for a model or a setting that it does not take
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"vLLM does not take this system: {reason}") from error

    # What a run asks of its decoder

    @property
    def memory(self) -> Mapping[str, RoleMemory]:  # type: ignore[override]
        """Nothing per role: vLLM plans the memory of all models as one."""
        return {}

    def notes(self) -> list[str]:
        """What a user should know about how the models are run."""
        found = []
        if self.launch.decode.speculate == "auto":
            found.append("vLLM drafts only with --speculate K: it does not measure whether that pays")
        if self.launch.decode.threads is not None:
            found.append(
                "--threads is not used by --engine vllm: VLLM_CPU_OMP_THREADS_BIND binds its threads"
            )
        return found

    def work(self) -> WorkSoFar:
        """What is known of the call that is going on."""
        seconds = time.perf_counter() - self._began
        return WorkSoFar(
            finished=self._finished,
            finished_tokens=self._tokens,
            unread=self._asked - self._finished,
            decode_seconds=seconds,
            prefill_seconds=seconds,
        )

    def steps(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: Callable[[str, int, str], None] | None = None,
    ) -> Generator[list[tuple[AlphaSchedule, Completion]], None, None]:
        """What every step of vLLM finished, under its alpha."""
        for what, wrong in (
            ("--trace", trace != "off"),
            ("a forced beginning", forced is not None),
            ("--ban-first", bool(sampling.ban_first)),
            ("text as it is written", on_text is not None),
        ):
            if wrong:
                raise UserError(f"--engine vllm has no {what}: leave it out, or use --engine own")
        unasked: list[tuple[AlphaSchedule, Completion]] = []
        self._begin()
        banned = self.texts.banned(sampling.ban)
        for example, alphas in asked:
            ids = self.texts.ids(example, task)
            for alpha, sample in product(alphas, range(sampling.n)):
                if isinstance(ids, str):
                    unasked.append((alpha, self._failed(example, sample, ids)))
                    continue
                wanted = Wanted(example, sample, alpha, len(ids), draws=sampling)
                seed = self.texts.seed(sampling, task, example, sample)
                self._submit(wanted, ids, self._params(wanted, sampling, seed, banned))
        yield unasked
        yield from self._finish()

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """The log-probabilities of texts under all alphas."""
        self._begin()
        for example in examples:
            ids = self.texts.ids(example, task)
            for number, text in enumerate(texts(example)):
                for alpha in alphas:
                    if isinstance(ids, str):
                        yield alpha, replace(self._failed(example, number, ids), text=text)
                        continue
                    self.score(example, number, alpha, ids, self.texts.continued(text), text)
        for finished in self._finish():
            yield from finished

    def score(
        self,
        example: Example,
        number: int,
        alpha: AlphaSchedule,
        context: tuple[int, ...],
        ids: tuple[int, ...],
        text: str = "",
    ) -> None:
        """Ask for the log-probability of ids after a context."""
        from vllm import SamplingParams

        wanted = Wanted(example, number, alpha, len(context), text, ids)
        extra = {ALPHA: alpha.text, FROM: len(context)} if self.launch.role == "proxy" else None
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, extra_args=extra, detokenize=False
        )
        window, narrowest = self.texts.window
        if len(context) + len(ids) >= window:
            raise UserError(
                f"text {number + 1} of {example.id} has {len(context) + len(ids)} tokens with its prompt, "
                f"and the {narrowest} sees {window}"
            )
        self._submit(wanted, (*context, *ids), params)

    # One request

    def _begin(self) -> None:
        self._waiting.clear()
        self._finished, self._tokens, self._began = 0, 0, time.perf_counter()
        self._asked = 0

    def _params(self, wanted: Wanted, sampling: Sampling, seed: int, banned: frozenset[int]) -> Any:
        from vllm import SamplingParams

        room = self.texts.window[0] - wanted.prompt
        allowed = [token for token in range(self.texts.size) if token not in banned] if banned else None
        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, room),
            min_tokens=min(sampling.min_new_tokens, room),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            stop=list(sampling.stop),
            stop_token_ids=sorted(self.texts.eos),
            allowed_token_ids=allowed,
            logprobs=0,
            skip_special_tokens=True,
            extra_args={ALPHA: wanted.alpha.text} if self.launch.role == "proxy" else None,
        )

    def _submit(self, wanted: Wanted, ids: tuple[int, ...], params: Any) -> None:
        if self.launch.speculates and wanted.alpha != self.launch.alpha and self.launch.role == "proxy":
            raise UserError(
                f"alpha {wanted.alpha.text} with --speculate: vLLM's V1 model runner drafts with the one "
                f"alpha that it was started with ({self.launch.alpha.text}); leave --speculate out"
            )
        name = f"{self._asked}"
        self._waiting[name] = wanted
        self._asked += 1
        self._engine.add_request(name, {"prompt_token_ids": list(ids)}, params)

    def scored(
        self, items: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], alpha: AlphaSchedule
    ) -> Iterator[tuple[int, float, bool]]:
        """The number of each (context, ids), the log-probability of the ids, and whether greedy decoding
        would give them."""
        self._begin()
        for number, (context, ids) in enumerate(items):
            self.score(Example(str(number), Prompt("", "")), 0, alpha, context, ids)
        for ended in self._ended():
            for wanted, output in ended:
                found = _of_ids(wanted, output)
                logprob = math.fsum(one.logprob for one in found)
                yield int(wanted.example.id), logprob, all(one.rank == 1 for one in found)

    def _finish(self) -> Generator[list[tuple[AlphaSchedule, Completion]], None, None]:
        """Everything that was asked for, as it ends."""
        for ended in self._ended():
            read = [(wanted, self._completion(wanted, output)) for wanted, output in ended]
            yield [(wanted.alpha, completion) for wanted, completion in read]

    def _completion(self, wanted: Wanted, output: Any) -> Completion:
        made = self._scored(wanted, output) if wanted.ids else self._read(wanted, output)
        self._tokens += len(made.token_ids)
        return made

    def _ended(self) -> Iterator[list[tuple[Wanted, Any]]]:
        """What every step of vLLM ended. What is left is given up where nobody waits for it any more."""
        try:
            marked = self._began
            while self._waiting:
                ended = [output for output in self._engine.step() if output.finished]
                if ended:
                    now = time.perf_counter()
                    self._share, marked = (now - marked) / len(ended), now
                    self._finished += len(ended)
                yield [(self._waiting.pop(output.request_id), output) for output in ended]
        finally:
            if self._waiting:
                self._engine.abort_request(list(self._waiting))
                self._waiting.clear()

    def _read(self, wanted: Wanted, output: Any) -> Completion:
        """A response of vLLM as a completion."""
        [one] = output.outputs
        tokens = tuple(one.token_ids)
        logprob = math.fsum(
            place[token].logprob for token, place in zip(tokens, one.logprobs or (), strict=True)
        )
        reason: FinishReason = "length"
        if one.finish_reason == "stop":
            reason = "stop" if isinstance(one.stop_reason, str) else "eos"
        if math.isnan(logprob):
            reason = "nan"
        return self.texts.completion(
            wanted.example,
            wanted.number,
            wanted.draws,
            tokens=tokens,
            reason=reason,
            logprob=logprob,
            prompt=wanted.prompt,
            took=self._took(wanted, len(tokens)),
        )

    def _scored(self, wanted: Wanted, output: Any) -> Completion:
        """The log-probability of a text as a completion."""
        logprob = math.fsum(one.logprob for one in _of_ids(wanted, output))
        return Completion(
            example_id=wanted.example.id,
            sample=wanted.number,
            text=wanted.text,
            token_ids=wanted.ids,
            finish_reason="nan" if math.isnan(logprob) else "length",
            logprob=logprob,
            took=self._took(wanted, len(wanted.ids)),
        )

    def _took(self, wanted: Wanted, tokens: int) -> Took:
        """What it took. The time since the last step that ended a response is shared out to those of this
        one: all add up to the time that has passed."""
        prompt = wanted.prompt if wanted.number == 0 else 0
        return Took(seconds=self._share, prompt_tokens=prompt, generated_tokens=tokens)

    def _failed(self, example: Example, number: int, why: str) -> Completion:
        return Completion(example.id, number, "", (), "template", math.nan, remark=why)

    def close(self) -> None:
        """End the engine and its processes: the next role gets their memory."""
        core, self._engine = self._engine.engine_core, None
        core.shutdown()


def _of_ids(wanted: Wanted, output: Any) -> list[Any]:
    """What vLLM says of each id of a text that was scored: its log-probability and rank."""
    places = output.prompt_logprobs[wanted.prompt :]
    return [place[token] for token, place in zip(wanted.ids, places, strict=True)]


def vllm_decoder(models: Models, engine: EngineOptions) -> Callable[[RunSpec, DecodeOptions], RunDecoder]:
    """What opens vLLM for a run."""

    def opened(spec: RunSpec, decode: DecodeOptions) -> RunDecoder:
        return VllmDecoder(VllmLaunch(models, spec.role, spec.alpha, decode, engine))

    return opened
