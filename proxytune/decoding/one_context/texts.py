"""What an engine that gives all models the same ids (vLLM) needs of text: the ids of a prompt, those of what
follows it, and the text of a response. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import GenerationConfig

from proxytune.config import Role, Sampling
from proxytune.decoding.completions import NOT_NUMBERS
from proxytune.decoding.conversations import ids_seen
from proxytune.decoding.prompts import continued, form_of, noise_key
from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.sample import sample_context
from proxytune.decoding.stop_strings import StopStrings, ending_ids, single_tokens
from proxytune.decoding.streaming import final_text
from proxytune.decoding.templates import TemplateFault
from proxytune.errors import PromptTooLong, UserError
from proxytune.models import Models, Tokenizer, checkpoint
from proxytune.records import Completion, Example, FinishReason, Prompt, Took

Ids = tuple[int, ...]


@dataclass
class OneContext:
    """The texts of one role, or the proxy, of a system."""

    models: Models
    role: Role
    remarks: list[str] = field(default_factory=list)
    """What was done to prompts that a reader of the responses should know."""

    @cached_property
    def names(self) -> list[str]:
        """The models that decode; the first is the one that is steered."""
        return self.models.names(self.role)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the first."""
        return self.models.tokenizer(self.names[0])

    @cached_property
    def size(self) -> int:
        """Ids that can be generated."""
        return self.models.size(self.names[0])

    @cached_property
    def text_of(self) -> ResponseText:
        """The text of generated ids."""
        return ResponseText(self.tokenizer)

    @cached_property
    def window(self) -> tuple[int, str]:
        """Tokens that every model can see, and the model that sees the fewest."""
        windows = {name: self.models.facts(name).window for name in self.names}
        bounded = {name: window for name, window in windows.items() if window is not None}
        if not bounded:
            raise UserError(f"the context window of the {self.names[0]} is not in its configuration")
        name = min(bounded, key=lambda name: bounded[name])
        return bounded[name], name

    @cached_property
    def eos(self) -> frozenset[int]:
        """The ids that end a response: those of the first model, and those of the experts."""
        ending = [name for name in self.names if not name.startswith("antiexpert") or len(self.names) == 1]
        return frozenset(token for name in ending for token in self._own_eos(name) if token < self.size)

    def _own_eos(self, name: str) -> set[int]:
        spec = self.models.spec(name)
        location = checkpoint.locate(str(spec.model)).location
        try:
            ids = GenerationConfig.from_pretrained(location, revision=spec.revision).eos_token_id
        except OSError:  # no such file: transformers takes the model's configuration then
            config = checkpoint.load_config(spec, trust_remote_code=self.models.trust_remote_code)
            ids = config.get_text_config().eos_token_id
        return ending_ids(ids, self.models.tokenizer(name))

    # Prompts

    def require_one(self) -> None:
        """UserError unless every model sees the same ids of a sample prompt."""
        seen = {
            name: sample_context(
                self.models.spec(name), self.models.tokenizer(name), name, form_of(name, self.role)
            )[1]
            for name in self.names
        }
        self._same(seen, "a sample prompt")

    def _same(self, seen: dict[str, Ids], what: str) -> Ids:
        first, *others = self.names
        for name in others:
            if seen[name] != seen[first]:
                formats = ", ".join(f"{name}: chat {self.models.spec(name).chat}" for name in self.names)
                raise UserError(
                    f"--engine vllm gives all models the same tokens, and {what} differs between the {first} "
                    f"and the {name} ({formats}): use the same `chat:` for all roles, or --engine own"
                )
        return seen[first]

    def ids(self, example: Example, task: str) -> Ids | str:
        """What all models see before a response; why there is nothing, where a chat template has no text for
        this example. UserError where they would see different ids, or no response would fit behind it."""
        try:
            seen = {name: self._context(name, example.prompt) for name in self.names}
        except TemplateFault as fault:
            if not fault.of_these_texts:
                raise
            return str(fault)
        ids = self._same(seen, f"the prompt of {task or 'request'} {example.id}")
        if not ids:
            raise UserError(f"the prompt of request {example.id} is empty")
        window, narrowest = self.window
        if len(ids) >= window:
            raise PromptTooLong(f"the prompt of request {example.id}", narrowest, len(ids), window)
        return ids

    def _context(self, name: str, prompt: Prompt) -> Ids:
        if prompt.ids is not None:
            return tuple(prompt.ids[name])
        spec, tokenizer = self.models.spec(name), self.models.tokenizer(name)
        return ids_seen(name, self.role, spec, tokenizer, prompt, self._remark)

    def _remark(self, *words: str) -> None:
        if (what := " ".join(words)) not in self.remarks:
            self.remarks.append(what)

    def continued(self, text: str) -> Ids:
        """The ids of a text that goes on after other text."""
        return continued(self.tokenizer, text)

    def banned(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids that are exactly one of these texts."""
        return single_tokens(self.tokenizer, texts, self.size)

    def seed(self, sampling: Sampling, task: str, example: Example, sample: int) -> int:
        """The seed of a response, as our engine has it: alpha and role are not in it."""
        return noise_key(sampling.seed, task, example.id, sample)

    # Responses

    def completion(
        self,
        example: Example,
        sample: int,
        sampling: Sampling,
        *,
        tokens: Ids,
        reason: FinishReason,
        logprob: float,
        prompt: int,
        took: Took,
    ) -> Completion:
        """A response of these tokens to a prompt of so many."""
        body = tokens[:-1] if reason == "eos" else tokens
        window, name = self.window
        full = reason == "length" and len(tokens) < sampling.max_new_tokens and prompt + len(tokens) >= window
        remark = (
            f"the context window of the {name} ({window} tokens) was full before {sampling.max_new_tokens} "
            "new tokens"
        )
        return Completion(
            example_id=example.id,
            sample=sample,
            text=final_text(StopStrings(self.text_of, sampling.stop), body),
            token_ids=tokens,
            finish_reason=reason,
            logprob=logprob,
            remark=NOT_NUMBERS if reason == "nan" else remark if full else None,
            took=took,
        )
