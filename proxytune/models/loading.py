"""Loads the models of a System: dtype, device, quantisation, adapters. safetensors only; remote code only
when asked.

Every model is loaded once, however many roles need it, and an expert that is an adapter on the antiexpert
shares the antiexpert's weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from proxytune.config import ExpertSpec, ModelSpec, Role, System
from proxytune.engine.attention import Forward
from proxytune.engine.kernels import int4, use_row_linears, use_row_norms
from proxytune.engine.runners import VocabMap
from proxytune.errors import UserError, needs_extra
from proxytune.models import adapters
from proxytune.models.adapters import (
    BAD_CHECKPOINT,
    Adapters,
    AdapterSwitch,
    attach_for_good,
    bytes_of,
    first_line,
)
from proxytune.models.checkpoint import (
    CheckpointSource,
    check_checkpoint,
    load_config,
    locate,
    reading,
)
from proxytune.models.facts import ModelFacts, model_facts
from proxytune.models.finite import refuse_broken_weights
from proxytune.models.memory import (
    GIB,
    SMALLER,
    check_memory,
    free_memory,
    give_back,
)
from proxytune.models.support import UNBOUNDED, Family, examine
from proxytune.models.vocabulary import Difference, Tokenizer, align, difference, size_of
from proxytune.models.weight_only import WeightOnlyConfig

SMALL = GIB
"""Bytes of weights under which loading takes no time worth a progress bar."""


SOME_TEXT = "The water in the kettle was boiling, so she took two cups from the shelf and called her brother."
"""What a model's packed and plain logits are compared on."""


@dataclass(frozen=True)
class Loaded:
    """One model, ready to be given a cache."""

    name: str
    """base, expert, expert2, antiexpert, antiexpert2 or tuned."""
    spec: ModelSpec
    module: PreTrainedModel
    tokenizer: Tokenizer
    family: Family
    adapters: Adapters
    """What sits on the module: adapters, of which this model runs with at most one."""
    adapter: str | None
    """The one that this model runs with."""
    weights: int
    """Bytes that this model adds."""
    shared_with: str | None = None
    virtual: Tensor | None = None
    """Embeddings [n, d] of a soft prompt that precedes every context of this model."""

    @property
    def forward(self) -> Forward:
        """The module's own forward, or LlamaForward, where its adapters act on spans of the tokens (or there
        are none); otherwise its own with this model's adapter, and no other, in force."""
        if self.adapters.peft is None:
            forward: Forward = self.family.llama_forward or self.module
            return forward
        return AdapterSwitch(self.module, self.adapters.peft, self.adapter)

    @property
    def device(self) -> torch.device:
        """Where ids go in."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """Rows of the output head."""
        return int(self.module.config.get_text_config().vocab_size)

    @cached_property
    def size(self) -> int:
        """Ids that it can generate: the head without its padding rows."""
        return size_of(self.tokenizer, self.vocabulary)

    def aligned_with(self, target: Loaded, mode: Literal["strict", "intersect"]) -> VocabMap:
        """The map from the ids of `target` to its own; UserError that names the first ids that differ."""
        if target is self:
            return VocabMap(self.size)
        return align(target.tokenizer, target.size, self.tokenizer, self.vocabulary, self.name, mode)

    @property
    def virtual_ids(self) -> tuple[int, ...]:
        """Ids, beyond the embedding table, that stand for the soft prompt."""
        first = self.module.get_input_embeddings().weight.shape[0]
        return () if self.virtual is None else tuple(range(first, first + self.virtual.shape[0]))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [1, T], virtual ones included, -> embeddings [1, T, d]."""
        table = self.module.get_input_embeddings()
        words = table.weight.shape[0]
        out: Tensor = table(ids.clamp(max=words - 1))
        if self.virtual is None:
            return out
        soft = self.virtual[(ids - words).clamp(min=0)]
        return torch.where((ids >= words)[..., None], soft, out)  # a mask as an index would wait for the GPU


@dataclass
class Models:
    """The models of one System, each loaded when it is first needed."""

    system: System
    trust_remote_code: bool = False
    """Allow remote code for every role, beside what the specs allow."""
    on_load: Callable[[str, ModelSpec], None] | None = None
    """Hears of every model before it is loaded: loading is slow, and people want to see what goes on."""
    _loaded: dict[str, Loaded] = field(default_factory=dict)
    _tokenizers: dict[tuple[object, ...], Tokenizer] = field(default_factory=dict)

    def terms(self) -> list[tuple[str, str, float]]:
        """Per expert: its name, its antiexpert's name, its weight."""
        terms = []
        for index, expert in enumerate(self.system.expert_specs):
            suffix = "" if index == 0 else str(index + 1)
            own = f"antiexpert{suffix or 1}" if expert.antiexpert is not None else "antiexpert"
            terms.append((f"expert{suffix}", own, expert.weight))
        return terms

    def names(self, role: Role) -> list[str]:
        """The models that a role needs."""
        self.system.require(role)
        if role != "proxy":
            return [role]
        return list(dict.fromkeys(["base", *(name for e, a, _ in self.terms() for name in (e, a))]))

    def get(self, name: str) -> Loaded:
        """The model of that name, loaded if it was not."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def release(self, keep: Collection[Role]) -> None:
        """Drop the models that none of these roles needs."""
        needed = {name for role in keep for name in self.names(role)}
        shared = {self._loaded[name].shared_with for name in needed if name in self._loaded}
        for name in set(self._loaded) - needed - shared:
            model = self._loaded.pop(name)
            if model.adapter is not None:
                model.adapters.remove(model.adapter)
        give_back()

    def check(self, names: Collection[str]) -> None:
        """UserError, before anything is loaded, if a model is not there or these models do not fit
        together."""
        specs = {name: self.spec(name) for name in names if name not in self._loaded}
        needs: dict[str, float] = {}
        for name, spec in specs.items():
            if spec.adapter is not None:
                _check_adapter(spec.adapter)
            if spec.model is not None:
                remote = spec.trust_remote_code or self.trust_remote_code
                need = check_checkpoint(spec, trust_remote_code=remote)
                if need is not None:
                    needs[name] = need
        self._check_vocabularies(list(names))
        everywhere = "auto" if any(spec.device_map == "auto" for spec in specs.values()) else None
        free = free_memory(everywhere)
        if len(needs) > 1 and sum(needs.values()) > free:
            parts = " + ".join(f"{name} {need / GIB:.1f}" for name, need in needs.items())
            raise UserError(
                f"the weights of {parts} = {sum(needs.values()) / GIB:.1f} GiB do not fit into the "
                f"{free / GIB:.1f} GiB that are free: {SMALLER}"
            )

    def _check_vocabularies(self, names: Sequence[str]) -> None:
        """UserError that names the first ids at which the vocabularies of these models differ."""
        target, *others = names
        first, size = self.tokenizer(target), self._head(target)
        for name in others:
            second = self.tokenizer(name)
            if second is not first:
                align(first, size_of(first, size), second, self._head(name), name, self.system.vocab)

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of the model of that name; it needs no weights. Models of one checkpoint share it."""
        if name in self._loaded:
            return self._loaded[name].tokenizer
        spec = self._own(name)
        key = spec.model, spec.adapter, spec.revision, spec.trust_remote_code
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(spec, trust_remote_code=self.trust_remote_code)
        return self._tokenizers[key]

    def difference(self, name: str, target: str = "base") -> Difference | None:
        """Where the vocabulary of a model differs from that of `target`; it needs no weights."""
        first, size = self.tokenizer(target), self._head(target)
        return difference(first, size_of(first, size), self.tokenizer(name), self._head(name), name)

    def facts(self, name: str) -> ModelFacts:
        """What is known of the model of that name: of the loaded one, or else by its configuration. UserError
        for a checkpoint or an adapter that its small files show to be unfit."""
        spec = self._own(name)
        remote = spec.trust_remote_code or self.trust_remote_code
        if spec.adapter is not None:
            _check_adapter(spec.adapter)
        check_checkpoint(spec, trust_remote_code=remote, may_lack_weights=True)
        config = load_config(spec, trust_remote_code=remote)
        loaded = self._loaded[name].family if name in self._loaded else None
        return model_facts(spec, config, loaded, remote)

    def _head(self, name: str) -> int:
        """Rows of the output head of the model of that name, from its configuration."""
        if name in self._loaded:
            return self._loaded[name].vocabulary
        config = load_config(self._own(name), trust_remote_code=self.trust_remote_code)
        return int(config.get_text_config().vocab_size)

    def _own(self, name: str) -> ModelSpec:
        """The spec of a model with its checkpoint named: an adapter's is the antiexpert's."""
        spec = self.spec(name)
        if spec.model is not None:
            return spec
        host = self.spec(self._host(name, spec))
        return host.model_copy(update={"adapter": spec.adapter, "chat": spec.chat})

    def spec(self, name: str) -> ModelSpec:
        """The spec of the model of that name."""
        for (expert, antiexpert, _), spec in zip(self.terms(), self.system.expert_specs, strict=True):
            if name == expert:
                return spec
            if name == antiexpert and spec.antiexpert is not None:
                return spec.antiexpert
        found = getattr(self.system, name, None)
        if found is None:
            raise UserError(f"system '{self.system.name}' has no {name}")
        return found  # type: ignore[no-any-return]

    def _load(self, name: str) -> Loaded:
        spec = self.spec(name)
        if self.on_load is not None:
            self.on_load(name, spec)
        if spec.model is None:
            return self._load_adapter_on(self._host(name, spec), name, spec)
        tokenizer = self.tokenizer(name)
        module = load_module(spec, trust_remote_code=self.trust_remote_code)
        virtual = None
        if spec.adapter is not None:
            module, virtual = attach_for_good(module, spec)
        refuse_broken_weights(module.named_parameters(), str(spec.model))
        packed = use_row_linears(module)  # after the weights have got their last values
        use_row_norms(module)
        family = examine(module, tokenizer.encode(SOME_TEXT, add_special_tokens=False))
        _refuse_soft_prompt_on_reference(name, family, virtual)
        size = bytes_of(module) + packed + (virtual.nbytes if virtual is not None else 0)
        return Loaded(name, spec, module, tokenizer, family, Adapters(), None, size, virtual=virtual)

    def _host(self, name: str, spec: ModelSpec) -> str:
        own = next((anti for expert, anti, _ in self.terms() if expert == name), None)
        if own is None or not isinstance(spec, ExpertSpec):
            raise UserError(
                f"the {name} has an adapter but no model: only an expert can sit on the antiexpert's weights"
            )
        return own

    def _load_adapter_on(self, host_name: str, name: str, spec: ModelSpec) -> Loaded:
        """An expert as an adapter on its antiexpert: one set of weights for both."""
        host = self.get(host_name)
        attached = host.adapters.attach(host.module, spec, name, packed=host.family.path == "packed")
        refuse_broken_weights(host.adapters.weights(host.module, name), str(spec.adapter))
        virtual = attached.virtual
        _refuse_soft_prompt_on_reference(name, host.family, virtual)
        adapter = None if virtual is not None else name
        return replace(
            host,
            name=name,
            spec=spec,
            adapter=adapter,
            weights=attached.bytes,
            shared_with=host_name,
            virtual=virtual,
        )


def _check_adapter(folder: str) -> None:
    """UserError for an adapter whose folder is none that we run; reads no weights."""
    adapters._config(folder)


def load_tokenizer(spec: ModelSpec, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies beside a model."""
    assert spec.model is not None
    source = locate(spec.model)
    with reading(f"the tokenizer of '{spec.model}'"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code or trust_remote_code,
            gguf_file=source.tokenizer_gguf,
        )
        words = len(tokenizer.get_vocab())
    if not words:
        raise UserError(f"cannot load the tokenizer of '{spec.model}': it has no tokens")
    tokenizer.model_max_length = UNBOUNDED  # our own check of the length names the numbers
    return tokenizer


def load_module(spec: ModelSpec, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a spec in evaluation mode. UserError if it cannot be found, is no safetensors or does not
    fit."""
    assert spec.model is not None
    source = locate(spec.model)
    remote = spec.trust_remote_code or trust_remote_code
    quantization = _quantization(spec, source)
    config = load_config(spec, trust_remote_code=trust_remote_code)
    try:
        size = check_memory(spec, config, remote)
        (disable_progress_bar if size < SMALL else enable_progress_bar)()
        module, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            revision=spec.revision,
            gguf_file=source.gguf,
            trust_remote_code=remote,
            use_safetensors=True,
            dtype=spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
            device_map=spec.device_map or {"": "cuda:0" if torch.cuda.is_available() else "cpu"},
            quantization_config=quantization,
            output_loading_info=True,
        )
    except BAD_CHECKPOINT as error:
        raise UserError(f"cannot load the model '{spec.model}': {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and makes them up at random
        raise UserError(
            f"'{spec.model}' lacks {len(missing)} weights of its architecture, {missing[0]} first"
        )
    if spec.dtype == "float64":
        with suppress(
            AttributeError, ValueError
        ):  # only mixtures of experts have it; grouped_mm refuses float64
            module.set_experts_implementation("eager")
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _quantization(spec: ModelSpec, source: CheckpointSource) -> Any:
    """What transformers is told of the weights; None for plain ones."""
    if source.gguf is not None:
        if spec.quantization != "none":
            raise UserError(
                f"'{spec.model}': the weights of a GGUF file are unpacked, so `quantization: "
                f"{spec.quantization}` needs a checkpoint in safetensors"
            )
        # packed blocks would need a kernel that is downloaded, and are no plain layers
        return GgufConfig(dequantize=True)
    if spec.quantization == "none":
        return None
    if spec.quantization == "int8":
        return WeightOnlyConfig(8)
    if spec.quantization == "int4":
        if (reason := int4.why_not()) is not None:
            raise UserError(f"'{spec.model}' cannot be loaded with quantization int4: {reason}")
        return WeightOnlyConfig(4)
    needs_extra(f"quantization {spec.quantization}", "bitsandbytes", "quantized")
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # a warning per layer and forward
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _refuse_soft_prompt_on_reference(name: str, family: Family, virtual: Tensor | None) -> None:
    if virtual is not None and family.path == "reference":
        raise UserError(f"the {name} is a soft prompt on a model that takes the slow path ({family.reason})")
