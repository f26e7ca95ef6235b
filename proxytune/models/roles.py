"""The models of a System's roles, each loaded when it is first needed.

A checkpoint is in memory once, however many roles run on it, and an expert that is an adapter on the
antiexpert shares the antiexpert's weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxytune.config import ExpertSpec, ModelSpec, Role, System
from proxytune.engine.attention import Forward
from proxytune.engine.fused import use_device_kernels
from proxytune.engine.kernels import use_row_linears, use_row_norms, use_wide_head
from proxytune.engine.runners import VocabMap
from proxytune.errors import UserError
from proxytune.models.adapter_files import adapter_notes, check_adapter, read_adapter, tokenizer_source
from proxytune.models.adapters import Adapters, AdapterSwitch, attach_for_good, bytes_of
from proxytune.models.checkpoint import check_checkpoint, load_config
from proxytune.models.facts import ModelFacts, model_facts
from proxytune.models.finite import refuse_broken_weights
from proxytune.models.in_force import logits_by, probe_text, require_effect, require_untouched
from proxytune.models.loading import load_module, load_tokenizer
from proxytune.models.memory import GIB, SMALLER, free_memory, give_back, leave_the_file, own_parts, place_of
from proxytune.models.support import Family, examine
from proxytune.models.vocabulary import Difference, Tokenizer, align, counterparts, difference, size_of
from proxytune.processes import TENSOR

SOME_TEXT = "The water in the kettle was boiling, so she took two cups from the shelf and called her brother."
"""What a model's packed and plain logits are compared on."""


@dataclass(frozen=True)
class WeightSource:
    """What a module's weights follow from: two roles with the same run on the same module."""

    model: str
    adapter: str | None
    """One that is in the weights for good."""
    revision: str | None
    dtype: str
    quantization: str
    device_map: str
    trust_remote_code: bool

    @classmethod
    def of(cls, spec: ModelSpec, trust_remote_code: bool) -> WeightSource:
        """The source of a spec that names a checkpoint."""
        remote = spec.trust_remote_code or trust_remote_code
        dtype: str = spec.dtype
        if dtype == "auto":
            dtype = str(load_config(spec, trust_remote_code=remote).dtype).removeprefix("torch.")
        here = Path(spec.model or "").expanduser()
        return cls(
            str(here.resolve()) if here.exists() else str(spec.model),
            spec.adapter,
            spec.revision,
            dtype,
            spec.quantization,
            repr(spec.device_map),
            remote,
        )


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
    """Bytes of the module, whoever else runs on it."""
    own: int
    """Bytes that this model adds to it: of its adapter or its soft prompt."""
    source: WeightSource
    virtual: Tensor | None = None
    """Embeddings [n, d] of a soft prompt that precedes every context of this model."""
    tokenizer_from: str | None = None
    """The folder of its adapter, where the tokenizer or its template came from there."""
    notes: tuple[str, ...] = ()
    """What a user should know about what was loaded."""

    @property
    def forward(self) -> Forward:
        """The module's own forward, or LlamaForward; with this model's adapter in force where peft switches
        it, and none elsewhere (adapters that act on spans of the tokens are told in every forward)."""
        forward: Forward = self.family.llama_forward or self.module
        if self.adapters.peft is None or self.adapter is None:
            return forward
        return AdapterSwitch(forward, self.adapters.peft, self.adapter)

    def logits(self, ids: list[int]) -> Tensor:
        """Logits [V] after a text, on the path that this model takes."""
        return logits_by(self.forward, self.family, self.device, ids, self.adapters.lora, self.adapter)

    def require_rows(self, ids: Sequence[int]) -> None:
        """UserError for a token that the tokenizer has and the model has not."""
        known = self.module.get_input_embeddings().weight.shape[0]
        if (most := max(ids, default=0)) >= known:
            raise UserError(
                f"a prompt of the {self.name} has token {most} "
                f"({self.tokenizer.convert_ids_to_tokens(most)!r}), and the model has {known} tokens: use "
                "the tokenizer that it was made with, or save its adapter with save_embedding_layers=True"
            )

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
        """The models that a role needs here: a base behind an API is none of them."""
        self.system.require(role)
        if role != "proxy":
            return [role]
        base = ["base"] if self.system.endpoint is None else []
        return list(dict.fromkeys([*base, *(name for e, a, _ in self.terms() for name in (e, a))]))

    def get(self, name: str) -> Loaded:
        """The model of that name, loaded if it was not."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def release(self, keep: Collection[Role]) -> None:
        """Drop the models that none of these roles needs."""
        needed = {name for role in keep for name in self.names(role)}
        for name in set(self._loaded) - needed:
            model = self._loaded.pop(name)
            if model.adapter is not None:
                model.adapters.remove(model.adapter)
        give_back()

    def check(self, names: Collection[str]) -> None:
        """UserError, before anything is loaded, if a model is not there or these models do not fit
        together."""
        specs = {name: self.spec(name) for name in names if name not in self._loaded}
        needs: dict[str, float] = {}
        there = {model.source for model in self._loaded.values()}
        for name, spec in specs.items():
            self._check_adapter(name)
            if spec.model is None:
                continue
            source = WeightSource.of(spec, self.trust_remote_code)
            if source not in there:
                need = check_checkpoint(spec, trust_remote_code=source.trust_remote_code)
                if need is not None:
                    needs[name] = need
                there.add(source)
        self._check_vocabularies(list(names))
        self._check_memory(needs)

    def _check_memory(self, needs: Mapping[str, float]) -> None:
        """UserError if the weights of models that go to one place do not fit into what is free there."""
        places = {name: place_of(self.spec(name)) for name in needs}
        if "auto" in places.values():
            places = dict.fromkeys(needs, "auto")
        for place in dict.fromkeys(places.values()):
            here = {name: need for name, need in needs.items() if places[name] == place}
            free = free_memory(place)
            if len(here) > 1 and sum(here.values()) > free:
                parts = " + ".join(f"{name} {need / GIB:.1f}" for name, need in here.items())
                raise UserError(
                    f"the weights of {parts} = {sum(here.values()) / GIB:.1f} GiB do not fit into the "
                    f"{free / GIB:.1f} GiB that are free: {SMALLER}"
                )

    def _check_adapter(self, name: str) -> None:
        """UserError for an adapter that its small files and headers show not to fit its model."""
        spec = self.spec(name)
        if spec.adapter is not None:
            own = self._own(name)
            remote = own.trust_remote_code or self.trust_remote_code
            config = load_config(own, trust_remote_code=remote)
            check_adapter(spec.adapter, config, shared=spec.model is None, remote=remote)

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
        key = spec.model, tokenizer_source(spec), spec.revision, spec.trust_remote_code
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(spec, trust_remote_code=self.trust_remote_code)
        return self._tokenizers[key]

    def known_to_the_base(self, name: str) -> frozenset[str]:
        """The names of the tokens of a model to which the base has a counterpart under `vocab: intersect`."""
        own, base = self.tokenizer(name), self.tokenizer("base")
        found = set(counterparts(base, base.get_vocab(), own, own.get_vocab()).values())
        return frozenset(token for token, index in own.get_vocab().items() if index in found)

    def difference(self, name: str, target: str = "base") -> Difference | None:
        """Where the vocabulary of a model differs from that of `target`; it needs no weights."""
        first, size = self.tokenizer(target), self._head(target)
        return difference(first, size_of(first, size), self.tokenizer(name), self._head(name), name)

    def size(self, name: str) -> int:
        """Ids that the model of that name can generate: its head without padding rows. It needs no
        weights."""
        return size_of(self.tokenizer(name), self._head(name))

    def facts(self, name: str) -> ModelFacts:
        """What is known of the model of that name: of the loaded one, or else by its configuration. UserError
        for a checkpoint or an adapter that its small files show to be unfit."""
        spec = self._own(name)
        remote = spec.trust_remote_code or self.trust_remote_code
        check_checkpoint(spec, trust_remote_code=remote, may_lack_weights=True)
        self._check_adapter(name)
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
        found: ModelSpec | None = (
            self.system.local_base() if name == "base" else getattr(self.system, name, None)
        )
        if found is None:
            raise UserError(f"system '{self.system.name}' has no {name}")
        return found

    def _load(self, name: str) -> Loaded:
        spec = self.spec(name)
        if self.on_load is not None:
            self.on_load(name, spec)
        if spec.model is None:
            return self._load_adapter_on(self._host(name, spec), name, spec)
        tokenizer = self.tokenizer(name)
        source = WeightSource.of(spec, self.trust_remote_code)
        twin = next((model for model in self._loaded.values() if model.source == source), None)
        if twin is not None:
            return self._load_beside(twin, name, spec)
        module = load_module(spec, trust_remote_code=self.trust_remote_code)
        virtual, notes = None, list[str]()
        if spec.adapter is not None:
            files = read_adapter(spec.adapter)
            module, virtual = attach_for_good(module, files, merge=spec.quantization == "none")
            notes = adapter_notes(name, spec, files, spec.model)
        refuse_broken_weights(own_parts(module), str(spec.model))
        packed = 0 if spec.device_map == TENSOR else _use_own_kernels(module)
        if packed or spec.quantization != "none":
            leave_the_file(module)
        family = examine(module, tokenizer.encode(SOME_TEXT, add_special_tokens=False))
        _refuse_soft_prompt_on_reference(name, family, virtual)
        return Loaded(
            name,
            spec,
            module,
            tokenizer,
            family,
            Adapters(),
            None,
            weights=bytes_of(module) + packed,
            own=0 if virtual is None else virtual.nbytes,
            source=source,
            virtual=virtual,
            tokenizer_from=tokenizer_source(spec),
            notes=tuple(notes),
        )

    def _load_beside(self, twin: Loaded, name: str, spec: ModelSpec) -> Loaded:
        """A role on the module that another of the same source runs on."""
        for_good = twin.source.adapter is not None
        notes = adapter_notes(name, spec, read_adapter(spec.adapter), spec.model) if spec.adapter else []
        return replace(
            twin,
            name=name,
            spec=spec,
            tokenizer=self.tokenizer(name),
            adapter=None,
            own=0,
            virtual=twin.virtual if for_good else None,
            tokenizer_from=tokenizer_source(spec),
            notes=tuple(notes),
        )

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
        assert spec.adapter is not None
        files = read_adapter(spec.adapter)
        ids = probe_text(host.module, files)
        before = host.logits(ids)
        attached = host.adapters.attach(host.module, files, name, packed=host.family.path == "packed")
        refuse_broken_weights(host.adapters.weights(host.module, name), spec.adapter)
        virtual = attached.virtual
        _refuse_soft_prompt_on_reference(name, host.family, virtual)
        found = replace(
            host,
            name=name,
            spec=spec,
            tokenizer=host.tokenizer if tokenizer_source(spec) is None else self.tokenizer(name),
            adapter=None if virtual is not None else name,
            own=attached.bytes,
            virtual=virtual,
            tokenizer_from=tokenizer_source(spec),
            notes=tuple(adapter_notes(name, spec, files, host.spec.model)),
        )
        if virtual is None:
            require_effect(files, before, found.logits(ids))
        require_untouched(files, host_name, before, host.logits(ids))
        return found


def _use_own_kernels(module: PreTrainedModel) -> int:
    """Compute the layers of a model that is whole by our kernels. -> bytes that are packed for them."""
    use_wide_head(module)
    packed = use_row_linears(module)  # after the weights have got their last values
    use_row_norms(module)
    use_device_kernels(module)
    return packed


def _refuse_soft_prompt_on_reference(name: str, family: Family, virtual: Tensor | None) -> None:
    if virtual is not None and family.path == "reference":
        raise UserError(f"the {name} is a soft prompt on a model that takes the slow path ({family.reason})")
