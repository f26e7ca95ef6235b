"""What the engine gives, as completions: text, how it ended and why, traces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from proxytune.decoding.call import Scored
from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.stop_strings import StopStrings
from proxytune.decoding.streaming import final_text
from proxytune.engine import Result
from proxytune.records import Completion, FinishReason, Took, TracedToken

NOT_NUMBERS = (
    "the logits became NaN or infinite: try `dtype: float32` or bfloat16 in the system's file (float16 "
    "overflows)"
)


@dataclass(frozen=True)
class ResultReader:
    """Makes completions of the results of one call."""

    stops: StopStrings
    windows: Mapping[str, int]
    """Model -> the tokens that it can see."""
    alone: bool
    """Whether a model decodes by itself: then the combination in its traces is the model."""

    def completion(self, result: Result, example_id: str, sample: int, took: Took) -> Completion:
        """The response to an example."""
        reason: FinishReason = result.finish_reason  # type: ignore[assignment]
        body = result.tokens[:-1] if reason == "eos" else result.tokens
        return Completion(
            example_id=example_id,
            sample=sample,
            text=final_text(self.stops, body),
            token_ids=result.tokens,
            finish_reason=reason,
            logprob=result.logprob,
            trace=self._traced(result),
            remark=self._remark(result),
            took=took,
        )

    def _remark(self, result: Result) -> str | None:
        if result.finish_reason == "nan":
            return NOT_NUMBERS
        return self._cut_short(result) if result.finish_reason == "length" else None

    def _cut_short(self, result: Result) -> str | None:
        """Which window was full before the limit that was asked for, where one was."""
        asked, contexts = result.request.sampling.max_new_tokens, result.request.contexts
        if len(result.tokens) >= asked:
            return None
        name = min(self.windows, key=lambda name: self.windows[name] - len(contexts[name]))
        window = f"the context window of the {name} ({self.windows[name]} tokens)"
        return f"{window} was full before {asked} new tokens"

    def _traced(self, result: Result) -> tuple[TracedToken, ...]:
        def told(name: str) -> bool:
            return not (self.alone and name == "proxy")

        text_of = self.stops.text_of
        return tuple(
            TracedToken(
                text=token_text(text_of, item.token),
                id=item.token,
                probability={name: p for name, p in item.probability.items() if told(name)},
                top={name: token_text(text_of, token) for name, token in item.top.items() if told(name)},
                alpha=item.alpha,
                divergence=dict(item.divergence),
            )
            for item in result.trace
        )


def token_text(text_of: ResponseText, token: int) -> str:
    """The text of one token, or its name where it has none or only a part of a letter."""
    text = text_of([token])
    if text and "\ufffd" not in text:
        return text
    return str(text_of.tokenizer.convert_ids_to_tokens(token))


def scored(tag: Scored, ids: tuple[int, ...], logprob: float, took: Took) -> Completion:
    """A given text as a completion, with its log-probability."""
    faulty = math.isnan(logprob)
    return Completion(
        example_id=tag.example.id,
        sample=tag.number,
        text=tag.text,
        token_ids=ids,
        finish_reason="nan" if faulty else "length",
        logprob=logprob,
        remark=NOT_NUMBERS if faulty else None,
        took=took,
    )


def failed(example_id: str, sample: int, why: str, text: str = "") -> Completion:
    """The response to an example for which a chat template has no text; `text` is one that was to be
    scored."""
    return Completion(example_id, sample, text, (), finish_reason="template", logprob=math.nan, remark=why)
