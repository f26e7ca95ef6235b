"""A base behind an API, as a system's file names it: the counterpart of ModelSpec."""

from __future__ import annotations

import re
import urllib.parse
from typing import Literal

from pydantic import Field, field_validator, model_validator

from proxytune.schema import Record

MOST_VISIBLE = 10**6
"""Tokens of a position that an endpoint can be asked for: more than any vocabulary has."""


class ApiSpec(Record):
    """A base whose weights nobody has here: an OpenAI-style endpoint shows its most probable tokens."""

    api: str
    """The address to which /completions or /chat/completions is added."""
    model: str
    """The model's name at the endpoint."""
    top_logprobs: int = Field(default=5, ge=1, le=MOST_VISIBLE)
    """How many tokens of a position are asked for: OpenAI's chat models show 20, their older ones 5."""
    route: Literal["completions", "chat"] = "completions"
    """completions: it continues a prompt, which free generation needs. chat: it answers a message."""
    prompt_as: Literal["text", "ids"] = "text"
    """ids: a completions endpoint gets prompts as token ids of the expert, which must have its tokenizer."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; none is needed where the endpoint asks for none."""

    @field_validator("api")
    @classmethod
    def _an_address(cls, value: str) -> str:
        try:
            parts = urllib.parse.urlsplit(value)
            named = bool(parts.hostname) and parts.port != 0
        except ValueError:
            named = False
        if not named or parts.scheme not in ("http", "https") or not value.isascii() or " " in value:
            raise ValueError("give http:// or https://, a host and a path")
        if not value.isprintable() or parts.username is not None or parts.query or parts.fragment:
            raise ValueError("give an address without a user, a query or a fragment: a key belongs elsewhere")
        return value.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def _no_key(cls, value: str) -> str:
        if re.fullmatch("[A-Z][A-Z0-9_]*", value) is None:
            raise ValueError("name the environment variable that holds the key, and not the key itself")
        return value

    @field_validator("model")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("name the model")
        return value

    @model_validator(mode="after")
    def _ids_for_completions(self) -> ApiSpec:
        if self.prompt_as == "ids" and self.route == "chat":
            raise ValueError("a chat endpoint takes no token ids: leave `prompt_as` out")
        return self

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, where calls cost nothing unless a price is given."""
        return urllib.parse.urlsplit(self.api).hostname in ("localhost", "127.0.0.1", "::1")

    def __str__(self) -> str:
        return f"{self.model} at {self.api}"
