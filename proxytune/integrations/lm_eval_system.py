"""What lm-eval's models of a system have in common: what --model_args may hold, the ids of a text, and
what is stored beside the results."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from pydantic import Field, ValidationError

from proxytune import __version__
from proxytune.config import AlphaSchedule, ModelSpec, Role, System, load_system
from proxytune.decoding import opened
from proxytune.errors import UserError
from proxytune.integrations.lm_eval_requests import prefix_of
from proxytune.models import Models
from proxytune.options import DecodeOptions, EngineOptions, Options
from proxytune.schema import explain

LOG = logging.getLogger("proxytune.integrations.lm_eval")
Kind = TypeVar("Kind", bound=Options)


def say_what_loads(name: str, spec: ModelSpec) -> None:
    """Log what is loaded."""
    LOG.info("loading %s: %s", name, spec.model or spec.adapter)


class ModelArguments(EngineOptions, DecodeOptions):
    """What lm-eval's --model_args may hold for a system: how it decodes, and this."""

    pretrained: str
    """A system's name, or a YAML file."""
    role: str = "proxy"
    """base, expert, antiexpert, tuned or proxy."""
    alpha: float | str | None = None
    """As --alpha. Default: the system's."""
    allow_negative_alpha: bool = False
    """Allow alpha below 0."""
    vocab: str | None = None
    """strict or intersect. Default: the system's."""
    max_length: int | None = Field(default=None, ge=2)
    """Contexts are cut to this many tokens. Default: the smallest window of the models."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint."""

    @classmethod
    def read(cls, given: Mapping[str, Any], more: Mapping[str, Any]) -> ModelArguments:
        """From lm-eval's dictionaries; `more` has what lm-eval has options for. UserError for what is wrong.

        A batch size of lm-eval is the most rows at a time; `auto` is what memory allows. Where models go is
        in the system, not in lm-eval's --device."""
        settings = dict(given)
        if "system" in settings:
            settings["pretrained"] = settings.pop("system")
        size, most = more.get("batch_size"), more.get("max_batch_size")
        rows = most if size is None or str(size).startswith("auto") else size
        if rows is not None:
            settings.setdefault("batch", rows)
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            allowed = ", ".join(cls.model_fields)
            raise UserError(f"model_args: {explain(error)}. Known: {allowed}") from None

    def system(self) -> System:
        """The system, with the vocabulary rule that was asked for."""
        found = load_system(self.pretrained)
        if self.vocab is None:
            return found
        if self.vocab not in ("strict", "intersect"):
            raise UserError(f"vocab '{self.vocab}' must be strict or intersect")
        return found.model_copy(update={"vocab": self.vocab})

    def models(self, system: System) -> Models:
        """The models of the system, of which none is loaded yet."""
        return Models(system, trust_remote_code=self.trust_remote_code, on_load=say_what_loads)

    def part(self, kind: type[Kind]) -> Kind:
        """The options of a kind among these."""
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields})


class SystemLM(TemplateLM):  # type: ignore[misc]
    """One role of a system: its texts, ids and settings. Who answers is a subclass's."""

    backend = "causal"

    def __init__(self, models: Models, role: Role, alpha: AlphaSchedule) -> None:
        super().__init__()
        self.models, self.role, self.alpha = models, role, alpha
        self.system = models.system
        self.names = models.names(role)
        self.tokenizer = models.tokenizer(self.names[0])
        self._notes: dict[str, None] = {}

    @property
    def eot_token_id(self) -> int:
        """The end of sequence."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return prefix_of(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The ids of a text, with the special tokens that come before it unless that is switched off."""
        if add_special_tokens is False:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return opened(self.tokenizer, string)

    def _note(self, note: str) -> None:
        """Something that a reader of the figures should know: logged, and stored with the results."""
        if note not in self._notes:
            self._notes[note] = None
            LOG.warning(note)

    @property
    def _specs(self) -> dict[str, ModelSpec]:
        return {name: self.models.spec(name) for name in self.names}

    def _formats(self) -> list[tuple[str, str]]:
        """Every model's chat format."""
        return [
            (name, str(self.models.tokenizer(name).chat_template) if spec.chat == "tokenizer" else spec.chat)
            for name, spec in self._specs.items()
        ]

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests is told apart by: every model and its chat format."""
        parts = [(name, spec.model, spec.adapter, spec.revision) for name, spec in self._specs.items()]
        digest = hashlib.sha256(json.dumps([parts, self._formats()]).encode()).hexdigest()[:12]
        return f"{self.system.name}-{self.role}-{digest}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores beside its settings."""
        info: dict[str, Any] = {
            "version": __version__,
            "system": self.system.model_dump(mode="json"),
            "role": self.role,
            "alpha": self.alpha.text,
            "notes": list(self._notes),
        }
        return {"proxytune": info}
