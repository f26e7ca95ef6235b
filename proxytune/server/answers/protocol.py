"""What may be asked: the bodies of requests, in OpenAI's names.

A field that is not here is refused by name. So is a field of OpenAI's that would change the answer and is not
supported, unless it has the value that changes nothing. Nothing is dropped silently but what can have no
effect on an answer (IGNORED)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RANKED = 20
"""Most probable tokens that can be asked for in the place of each."""
IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields of OpenAI's that have no part in the answer."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0, 0.0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields of OpenAI's that are not supported -> values with which they change nothing."""
LONGEST_NUMBER = 2**63 - 1


class Body(BaseModel):
    """A request's body: fields have their own type, and no others are taken."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, content: Any) -> Any:
        """Leave out what changes nothing, and refuse what is not supported."""
        if not isinstance(content, dict):
            return content
        for name in NEUTRAL.keys() & content.keys() - cls.model_fields.keys():
            if not any(
                content[name] == value and type(content[name]) is type(value) for value in NEUTRAL[name]
            ):
                raise ValueError(f"'{name}' is not supported: leave it out")
        dropped = (NEUTRAL.keys() | IGNORED) - cls.model_fields.keys()
        return {name: value for name, value in content.items() if name not in dropped}


class StreamOptions(Body):
    """What is streamed beside the text."""

    include_usage: bool | None = None
    """Send the token counts in a last chunk."""
    include_obfuscation: bool | None = None
    """OpenAI's padding of chunks: only false is supported."""

    @model_validator(mode="after")
    def _no_padding(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("'include_obfuscation' is not supported: leave it out")
        return self


class ResponseBody(Body):
    """What both kinds of completions take."""

    model: str = Field(max_length=300)
    """A served model: `S` is the proxy of system S, `S/base` (expert, antiexpert, tuned) one role alone."""
    temperature: float | None = Field(default=1.0, ge=0, le=100)
    """0 is greedy."""
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=0, ge=-1, le=LONGEST_NUMBER)
    """0 and -1 are off."""
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    n: int | None = Field(default=1, ge=1)
    """Responses per prompt."""
    min_tokens: int | None = Field(default=0, ge=0, le=LONGEST_NUMBER)
    """The end of sequence is banned before so many tokens."""
    seed: int | None = Field(default=None, ge=-(2**63), le=LONGEST_NUMBER)
    """The same seed and prompt give the same response. None draws one."""
    stop: str | list[str] | None = None
    """A response ends before the first of these."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    alpha: float | str | None = None
    """Strength of the expert-minus-antiexpert shift: a number or `first:N`, `warmup:N`, `linear:FROM:TO:N`.
    Of the proxy only; None is the system's."""
    proxytune_trace: bool = False
    """Give every token's probability under each role (docs/server.md)."""


class CompletionBody(ResponseBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """A text or its token ids, or a list of either."""
    max_tokens: int | None = Field(default=16, ge=0, le=LONGEST_NUMBER)
    """0 only with `echo`. None: as many as the context window holds."""
    proxytune_format: Literal["plain", "roles"] = "plain"
    """plain: every model sees the prompt as it is. roles: a text is shown to every model in its own format, as
    `proxytune generate` does."""
    echo: bool | None = False
    """Give the prompt back before the response, with `logprobs` scored."""
    logprobs: int | None = Field(default=None, ge=0, le=RANKED)
    """Log-probabilities of the tokens, and of so many of the most probable ones in their place."""


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class MessageBody(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(ResponseBody):
    """POST /v1/chat/completions."""

    messages: list[MessageBody] = Field(min_length=1)
    """Every model sees them in a format of its own."""
    max_tokens: int | None = Field(default=None, ge=1, le=LONGEST_NUMBER)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=LONGEST_NUMBER)
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=RANKED)
    continue_final_message: bool = False
    """The last message is the assistant's, and the response goes on with it."""


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = Field(default=None, max_length=300)
    prompt: str | None = None
    messages: list[MessageBody] | None = Field(default=None, min_length=1)
    """In place of `prompt`: a conversation in the format of the model that decodes."""
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=300)
    tokens: list[int]
