"""One role of a system: its model, its path, its tokenizer, and what it sees of a sample prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from proxytune.checks.findings import ContextShown, Finding, RoleCheck
from proxytune.config import ModelSpec
from proxytune.decoding import sample_context
from proxytune.errors import UserError
from proxytune.models import Models, Tokenizer

T = TypeVar("T")

SPECIAL = ("bos", "eos", "pad")


@dataclass
class Findings:
    """What was found so far. Each part of a check is tried by itself, so that one problem hides no other."""

    found: list[Finding] = field(default_factory=list)

    def problem(self, about: str, text: str) -> None:
        """Something that keeps the system from running; the same line is kept once."""
        line = Finding(level="problem", about=about, text=text)
        if all(other.text != text for other in self.found):
            self.found.append(line)

    def note(self, about: str, text: str) -> None:
        """Something worth knowing."""
        self.found.append(Finding(level="note", about=about, text=text))

    def attempt(self, about: str, look: Callable[[], T]) -> T | None:
        """What `look` returns; its UserError is a problem, and None."""
        try:
            return look()
        except UserError as error:
            self.problem(about, str(error))
            return None


def check_role(models: Models, name: str, findings: Findings, *, weights: bool) -> RoleCheck:
    """One model. With `weights` it is loaded and examined; the caller lets it go."""
    spec = models.spec(name)
    known: dict[str, Any] = {}
    if weights:
        findings.attempt(name, partial(_load, models, name))
    facts = findings.attempt(name, partial(models.facts, name))
    if facts is not None:
        known = facts.model_dump(exclude={"layers"})
        if facts.path == "reference":
            findings.note(name, f"it takes the slow exact path, one row at a time: {facts.reason}")
        if facts.path == "unknown":
            findings.note(name, f"its path is not known before it is loaded: {facts.reason}")
    tokenizer = findings.attempt(name, partial(models.tokenizer, name))
    if tokenizer is not None:
        known |= _words(tokenizer)
        known["contexts"] = _contexts(spec, tokenizer, name, findings)
    return RoleCheck(
        name=name,
        model=" + ".join(part for part in (spec.model, spec.adapter and f"adapter {spec.adapter}") if part),
        dtype=spec.dtype,
        quantization=spec.quantization,
        chat=spec.chat,
        **known,
    )


def _load(models: Models, name: str) -> None:
    models.check([name])
    models.get(name)


def _words(tokenizer: Tokenizer) -> dict[str, Any]:
    """How many tokens there are, and the special ones."""
    special = {}
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id")
        special[name] = None if index is None else (getattr(tokenizer, f"{name}_token"), index)
    return {"tokens": len(tokenizer.get_vocab()), "special": special}


def _contexts(
    spec: ModelSpec, tokenizer: Tokenizer, name: str, findings: Findings
) -> tuple[ContextShown, ...]:
    """The sample prompt in every form that the role has."""
    expert = name.startswith("expert") and spec.chat != "none"
    forms: tuple[Literal["direct", "in_ensemble"], ...] = ("direct", "in_ensemble") if expert else ("direct",)
    shown = []
    for form in forms:
        found = findings.attempt(name, partial(sample_context, spec, tokenizer, name, form))
        if found is None:
            break
        text, ids = found
        tokens = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))
        shown.append(ContextShown(form=form, text=text, ids=ids, tokens=tokens))
    if shown and shown[0].ids[-1:] == (tokenizer.eos_token_id,):
        findings.note(
            name, "its context ends in an end-of-sequence token: it may have nothing to say after it"
        )
    tuned = name == "tuned" or name.startswith("expert")
    if tuned and spec.chat == "none" and getattr(tokenizer, "chat_template", None):
        findings.note(name, "its tokenizer has a chat template, and `chat: none` sends it plain prompts")
    return tuple(shown)
