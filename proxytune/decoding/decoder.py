"""One role, or the proxy, of a System, ready to decode: examples in, completions out.

Here text meets the engine: contexts per role, alignment of vocabularies, the plan of KV memory, stops and
traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import TypeVar

import torch

from proxytune.config import AlphaSchedule, Role, Sampling, TraceKind
from proxytune.decoding.call import DecodeStats, RunningStream, Scored, ScoringTexts, Tag
from proxytune.decoding.completions import ResultReader, failed, scored
from proxytune.decoding.conversations import ids_seen
from proxytune.decoding.interface import OnText, RemoteBase, SteppedDecoder
from proxytune.decoding.kv_pools import pool_tokens
from proxytune.decoding.prompts import continued, form_of, noise_key
from proxytune.decoding.remarks import notes_on_models
from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.sample import sample_context
from proxytune.decoding.stop_strings import StopStrings, own_eos, single_tokens
from proxytune.decoding.streaming import TextStream, stop_predicate
from proxytune.decoding.templates import TemplateFault
from proxytune.engine import (
    Chosen,
    Continuation,
    Engine,
    Ensemble,
    Request,
    Term,
    likelihoods,
)
from proxytune.engine.kv import CacheSpec, KVCache, PagedCache, SlotCache
from proxytune.engine.runners import ModelRunner, ReferenceRunner, Runner
from proxytune.engine.speculative import Speculation
from proxytune.models import Loaded, Models
from proxytune.options import DecodeOptions
from proxytune.processes import TENSOR, least
from proxytune.records import Completion, Example, Prompt, RoleMemory, Took
from proxytune.terminal import WorkSoFar

MAX_ROWS = 128
"""Rows decoded together unless set otherwise: past that, matrix products are compute-bound everywhere we
measured."""
PREFILL_TOKENS = {"cpu": 2048, "cuda": 512}
"""Prompt tokens per model and step: on a GPU few, so that a step stays about as long as a decode step."""
SMALL_POOL = 8192
"""Tokens of a second KV pool on a GPU."""

Found = TypeVar("Found")


class Decoder(SteppedDecoder):
    """Decodes as one role of a System."""

    def __init__(
        self,
        models: Models,
        role: Role,
        options: DecodeOptions | None = None,
        *,
        speculation: Speculation | None = None,
        agreement: bool = False,
        remote: RemoteBase | None = None,
    ) -> None:
        """Load what the role needs and plan the KV pools. `remote` is the base of the proxy where it is
        behind an API: the first expert's vocabulary is the common one then.

        `speculation` takes the place of what the options say of it (benchmarks draft in ways of their own).
        With `agreement`, the models of proxy and tuned all see the tokens of `role`, one of the two, for the
        trace. UserError if vocabularies do not match or the memory holds no useful pool."""
        self.models, self.role, self.agreement = models, role, agreement
        if remote is None and role in ("base", "proxy"):
            models.system.local_base()
        self.remote, how = remote, options or DecodeOptions()
        if how.threads is not None:
            torch.set_num_threads(how.threads)
        split = any(models.spec(name).device_map == TENSOR for name in models.names(role))
        length = how.draft_length
        if split and length is None:
            length = 0  # what is measured as fast differs by process, and all must draft alike
        self.speculation = speculation or Speculation(k=length, drafter=how.drafter)
        names = models.names(role)
        if agreement:
            names = list(dict.fromkeys([*names, *models.names("proxy"), "tuned"]))
        models.check(names)
        for name in names:  # a broken template is found before weights are read
            sample_context(models.spec(name), models.tokenizer(name), name, form_of(name, role))
        self.loaded = {name: models.get(name) for name in names}
        self.target = names[0] if remote is None else "base"
        head = self.head = self.loaded[names[0]]
        self.tokenizer = head.tokenizer
        self.text_of = ResponseText(head.tokenizer)
        self.max_batch = how.batch or MAX_ROWS
        self.stats = DecodeStats()
        self.remarks: list[str] = []
        """What was done to prompts that a reader of the responses should know; it comes as they are read."""
        self._running: RunningStream | None = None
        self._scoring: ScoringTexts | None = None
        self._size = head.size
        self._pool = least(pool_tokens(self.loaded, self.max_batch, how.kv_memory))
        beside = {} if remote is None else {"base": remote.runner(head)}
        runners = {name: self._runner(model, self._pool) for name, model in self.loaded.items()}
        self.ensemble = self._ensemble(beside | runners)

    def _ensemble(self, runners: dict[str, Runner]) -> Ensemble:
        """What decodes, and what only watches."""
        reference = "tuned" if self.agreement else None
        if self.role != "proxy" and not self.agreement:
            return Ensemble(runners, self.target)
        proxy = Ensemble(runners, "base", tuple(Term(*term) for term in self.models.terms()))
        if self.role == "proxy":
            return replace(proxy, reference=reference)
        return Ensemble(runners, self.target, observed=proxy, reference=reference)

    def _runner(self, model: Loaded, pool: int) -> Runner:
        family = model.family
        alignment = model.aligned_with(self.head, self.models.system.vocab)
        if family.path == "reference":
            return ReferenceRunner(
                model.forward, alignment, family.window, model.device, pool, cached=family.cached
            )
        spec = CacheSpec(family.layers, pool, family.dtype, family.devices)
        cache: KVCache = SlotCache(spec) if model.device.type == "cpu" else PagedCache(spec)
        soft = any(m.virtual is not None and m.module is model.module for m in self.loaded.values())
        return ModelRunner(
            model.forward,
            cache,
            alignment,
            family.window,
            model.device,
            embed=model.embed if soft else None,
            lora=model.adapters.lora,
            adapter=model.adapter,
        )

    @property
    def memory(self) -> dict[str, RoleMemory]:
        """Bytes per model: weights, counted for the first of those that share them, and KV at its fullest so
        far."""
        owners: dict[int, str] = {}
        for name, model in sorted(self.loaded.items(), key=lambda item: item[1].own > 0):
            owners.setdefault(id(model.module), name)  # one without an adapter, where there is one
        memory = {}
        for name, model in self.loaded.items():
            owner = owners[id(model.module)]
            memory[name] = RoleMemory(
                weights=model.own + (model.weights if owner == name else 0),
                kv_peak=self.ensemble.runners[name].rows.peak_bytes,
                shared_with=None if owner == name else owner,
                path=model.family.path,
                tokenizer=model.tokenizer_from,
            )
        return memory

    def notes(self) -> list[str]:
        """What a user should know about how the models are run."""
        return notes_on_models(self.loaded)

    def contexts(self, prompt: Prompt, of: str = "") -> dict[str, tuple[int, ...]]:
        """Ids that every model sees before the response; experts that only watch see what they see in the
        proxy. TemplateFault, which names the model and what the prompt is `of`, where a chat template
        fails."""
        ids = prompt.ids or {name: self._context(model, prompt, of) for name, model in self.loaded.items()}
        found = {name: (*model.virtual_ids, *ids[name]) for name, model in self.loaded.items()}
        return found if self.remote is None else {"base": self.remote.context(prompt), **found}

    def _context(self, model: Loaded, prompt: Prompt, of: str) -> tuple[int, ...]:
        role: Role = "proxy" if self.agreement else self.role
        ids = ids_seen(model.name, role, model.spec, model.tokenizer, prompt, self._remark, of)
        model.require_rows(ids)
        return ids

    def _remark(self, *words: str) -> None:
        if (what := " ".join(words)) not in self.remarks:
            self.remarks.append(what)

    def contexts_or_why(self, example: Example, task: str) -> dict[str, tuple[int, ...]] | str:
        """The contexts of an example, or why it alone has none."""
        try:
            return self.contexts(example.prompt, task)
        except TemplateFault as fault:
            if not fault.of_these_texts:
                raise
            return str(fault)

    def steps(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        *,
        task: str = "",
        trace: TraceKind = "off",
        forced: str | None = None,
        on_text: OnText | None = None,
    ) -> Generator[list[tuple[AlphaSchedule, Completion]], None, None]:
        """As `sweep`, with what every step of the engine finished, which may be nothing: who calls it has the
        word between two steps, whatever is still being written."""
        stops = StopStrings(self.text_of, sampling.stop)
        windows = {name: runner.window for name, runner in self.ensemble.runners.items()}
        alone = self.role != "proxy" and not self.agreement
        reader = ResultReader(stops, windows, alone)
        streams: dict[tuple[AlphaSchedule, str, int], TextStream] = {}
        unasked: list[tuple[AlphaSchedule, Completion]] = []

        def hear(request: Request, chosen: Chosen) -> None:
            assert isinstance(request.tag, Tag) and on_text is not None
            if chosen.token in request.eos:
                return
            stream = streams.setdefault((request.tag.alpha, *request.tag.where), TextStream(stops))
            on_text(*request.tag.where, stream.push(chosen.token))

        engine = self.engine(hear if on_text is not None else None, trace=trace != "off")
        self._running = running = RunningStream(engine)
        before = self.stats
        try:
            for request in self._requests(asked, sampling, stops, task, forced, unasked):
                running.submit(request)
            yield unasked
            while engine.busy:
                results, finished = engine.step(), []
                self.stats = before.after(engine)
                for result, took in zip(results, running.took(results, self.target), strict=True):
                    tag = result.request.tag
                    assert isinstance(tag, Tag)
                    running.ended(result)
                    finished.append((tag.alpha, reader.completion(result, *tag.where, took)))
                    if on_text is not None and (tag.alpha, *tag.where) in streams:
                        on_text(*tag.where, streams.pop((tag.alpha, *tag.where)).finish())
                yield finished
        finally:
            engine.close()

    def engine(
        self,
        on_token: Callable[[Request, Chosen], None] | None = None,
        *,
        trace: bool = False,
        ranked: int = 0,
    ) -> Engine:
        """An engine on the models, which takes the caches with its first request. Arguments as in Engine."""
        return Engine(
            self.ensemble,
            max_rows=self.max_batch,
            prefill_tokens=PREFILL_TOKENS.get(self.head.device.type, 512),
            trace=trace,
            ranked=ranked,
            on_token=on_token,
            speculation=self.speculation,
        )

    def beside(self) -> Ensemble:
        """The same models with caches of their own: what is computed there disturbs no batch. On a GPU, where
        pools are taken at once, they are small."""
        tokens = self._pool if self.head.device.type == "cpu" else min(self._pool, SMALL_POOL)
        return self._ensemble({name: self._runner(model, tokens) for name, model in self.loaded.items()})

    def cancel(self, example_id: str, sample: int | None = None) -> bool:
        """End a response of the stream that is going on, or all responses to an example: between two of its
        completions, or from `on_text`. They have no completion. -> False if none was left to end."""
        return self._running is not None and self._running.cancel(example_id, sample)

    def work(self) -> WorkSoFar:
        """What is known of the responses, or texts, of the call that is going on."""
        found = self._scoring if self._running is None else self._running
        return WorkSoFar() if found is None else found.work()

    def likelihood_sweep(
        self,
        examples: Sequence[Example],
        texts: Callable[[Example], Sequence[str]],
        alphas: Sequence[AlphaSchedule],
        task: str = "",
    ) -> Generator[tuple[AlphaSchedule, Completion], None, None]:
        """As `likelihoods`, under all alphas from one pass of forwards."""
        items, unasked = list[Continuation](), list[Completion]()
        for example in examples:
            contexts = self.contexts_or_why(example, task)
            for number, text in enumerate(texts(example)):
                if isinstance(contexts, str):
                    unasked.append(failed(example.id, number, contexts, text))
                else:
                    items.append(Continuation(contexts, self.continued(text), Scored(example, number, text)))
        yield from product(alphas, unasked)
        self._running, self._scoring = None, ScoringTexts(len(items))
        found = likelihoods(self.ensemble, items, alphas)
        before = self.stats.seconds
        while (result := self._timed(found)) is not None:
            tag, ids = result.continuation.tag, result.continuation.ids
            assert isinstance(tag, Scored)
            prompt = len(result.continuation.contexts[self.target]) if tag.number == 0 else 0
            self.stats.prompt_tokens += prompt
            self.stats.generated_tokens += len(ids)
            share = (self.stats.seconds - before) / len(alphas)
            before = self.stats.seconds
            took = Took(seconds=share, prompt_tokens=prompt, generated_tokens=len(ids))
            for alpha, logprobs in zip(alphas, result.logprobs, strict=True):
                yield alpha, scored(tag, ids, float(logprobs.double().sum()), took)

    def _timed(self, found: Iterator[Found]) -> Found | None:
        """The next of the texts that are scored, its time counted."""
        assert self._scoring is not None
        began = time.perf_counter()
        result = next(found, None)
        seconds = time.perf_counter() - began
        self.stats.seconds += seconds
        self._scoring.add(seconds, ended=result is not None)
        return result

    def continued(self, text: str) -> tuple[int, ...]:
        """The ids of a text that goes on after other text."""
        return continued(self.tokenizer, text)

    def _requests(
        self,
        asked: Sequence[tuple[Example, Sequence[AlphaSchedule]]],
        sampling: Sampling,
        stops: StopStrings,
        task: str,
        forced: str | None,
        unasked: list[tuple[AlphaSchedule, Completion]],
    ) -> Iterator[Request]:
        """What is to be decoded. `unasked` gets the responses to examples for which a chat template has no
        text."""
        eos = self.eos
        banned = single_tokens(self.tokenizer, sampling.ban, self._size)
        first = single_tokens(self.tokenizer, sampling.ban_first, self._size)
        opener = tuple(self.tokenizer.encode(forced, add_special_tokens=False)) if forced else ()
        for example, alphas in asked:
            contexts = self.contexts_or_why(example, task)
            for alpha, sample in product(alphas, range(sampling.n)):
                if isinstance(contexts, str):
                    unasked.append((alpha, failed(example.id, sample, contexts)))
                    continue
                yield Request(
                    contexts=contexts,
                    key=noise_key(sampling.seed, task, example.id, sample),
                    sampling=sampling,
                    max_new_tokens=sampling.max_new_tokens,
                    alpha=alpha,
                    eos=eos,
                    banned=banned,
                    banned_first=first,
                    forced=opener,
                    stop=stop_predicate(stops),
                    tag=Tag(example, sample, alpha),
                )

    @cached_property
    def eos(self) -> frozenset[int]:
        """The end-of-sequence ids, as the base's: those of the target model, and those of the experts, which
        may end in a way of their own (a chat model's end of turn)."""
        ids = own_eos(self.head)
        for term in self.ensemble.terms:
            alignment = self.ensemble.runners[term.expert].alignment
            ids |= {mine for eos in own_eos(self.loaded[term.expert]) for mine in alignment.spelt_by(eos)}
        return frozenset(token for token in ids if token < self._size)  # padding is never generated
