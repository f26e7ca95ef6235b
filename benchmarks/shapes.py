"""The systems that are timed: the demo, and random Llamas at real shapes made where they run.

A `Bench` holds every model twice on one set of weights: as Hugging Face left it, for the baselines, and as
proxytune runs it. Random weights give right times and meaningless text, so acceptance on them is synthetic
(`ours.SyntheticAcceptance`)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from proxytune.config import ExpertSpec, ModelSpec, Role, System, load_system
from proxytune.decoding.decoder import Decoder
from proxytune.engine.fused import use_device_kernels
from proxytune.engine.kernels.linear import use_row_linears
from proxytune.engine.kernels.norm import use_row_norms
from proxytune.errors import UserError
from proxytune.models.adapters import Adapters
from proxytune.models.checkpoint import resolve
from proxytune.models.roles import Loaded, Models, WeightSource
from proxytune.models.support import examine
from proxytune.models.weight_only import random_int8
from proxytune.options import DecodeOptions

TRIO: tuple[Role, ...] = ("base", "expert", "antiexpert")
CPU = torch.device("cpu")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama without its weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    tied: bool = False
    int8: bool = False
    """8-bit linears in the layers, as `quantization: int8` loads them; embeddings and head stay."""

    def config(self, window: int) -> LlamaConfig:
        """Its configuration; no end-of-sequence id, since lengths are forced."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=window,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )


LLAMA_70B = Shape(8192, 28672, 80, 64, 8)
LLAMA_13B = Shape(5120, 13824, 40, 40, 40)
LLAMA_7B = Shape(4096, 11008, 32, 32, 32)
TINYLLAMA = Shape(2048, 5632, 22, 32, 4)
SMOKE_LARGE = Shape(64, 160, 2, 4, 4, vocabulary=512, tied=True)
SMOKE_SMALL = Shape(32, 96, 2, 2, 2, vocabulary=512, tied=True)
SHAPES: dict[str, tuple[Shape, Shape]] = {
    "13b+7b+7b": (LLAMA_13B, LLAMA_7B),
    "70b-int8+7b+7b": (replace(LLAMA_70B, int8=True), LLAMA_7B),
    "7b+1b+1b": (LLAMA_7B, TINYLLAMA),
    "110m+26m+26m": (Shape(768, 2048, 12, 12, 12, tied=True), Shape(384, 1024, 8, 6, 6, tied=True)),
    "smoke": (SMOKE_LARGE, SMOKE_SMALL),
    "smoke-int8": (replace(SMOKE_LARGE, int8=True), SMOKE_SMALL),
}
"""Name -> the base's shape, and that of expert and antiexpert. Head sizes and grouped queries are the real
models'."""
WINDOW = 4096


@dataclass
class Bench:
    """One system, ready to be timed."""

    name: str
    plain: Mapping[str, PreTrainedModel]
    """The models as Hugging Face runs them, by role."""
    models: Models
    """The same weights as proxytune runs them."""
    max_rows: int
    kv_memory: int | None = None
    """Bytes of KV pools per decoder; None is proxytune's default."""
    trained: bool = False
    """Whether its text means anything."""

    def decoder(self, role: Role) -> Decoder:
        """A decoder of a role, with pools of its own."""
        return Decoder(self.models, role, DecodeOptions(batch=self.max_rows, kv_memory=self.kv_memory))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.plain["base"].device
        return device

    def describe(self) -> dict[str, Any]:
        """Sizes and dtype, for the environment's record."""
        numbers = {role: sum(p.numel() for p in module.parameters()) for role, module in self.plain.items()}
        config = self.plain["base"].config
        return {
            "parameters": numbers,
            "dtype": str(self.plain["base"].dtype).removeprefix("torch."),
            "vocabulary": int(config.vocab_size),
            "weights": "trained" if self.trained else "random",
        }


def demo_bench(max_rows: int) -> Bench:
    """The demo system."""
    return bench_of(load_system("demo"), (*TRIO, "tuned"), max_rows)


def bench_of(system: System, roles: Sequence[Role], max_rows: int, device: torch.device = CPU) -> Bench:
    """Checkpoints, read at once; the baselines load them once more, as Hugging Face does."""
    plain, models = dict[str, PreTrainedModel](), Models(system)
    for role in roles:
        spec = models.spec(role)
        if spec.model is None:
            raise UserError(f"system {system.name} has no {role} of its own")
        module = AutoModelForCausalLM.from_pretrained(
            resolve(spec.model), dtype=getattr(torch, spec.dtype), use_safetensors=True
        )
        plain[role] = module.eval().to(device)
        models.get(role)
    return Bench(system.name, plain, models, max_rows, trained=True)


def random_bench(
    name: str, device: torch.device, dtype: torch.dtype, max_rows: int, kv_tokens: int | None = None
) -> Bench:
    """Three random Llamas of the shapes called `name`. `kv_tokens` bounds each pool (needed on CUDA, where
    pools take their memory at once)."""
    large, small = SHAPES[name]
    shapes = {"base": large, "expert": small, "antiexpert": small}
    plain = {
        role: random_llama(shape, device, dtype, seed) for seed, (role, shape) in enumerate(shapes.items())
    }
    return Bench(name, plain, in_memory(plain), max_rows, _kv_bytes(plain, kv_tokens))


def lora_benches(
    name: str, device: torch.device, dtype: torch.dtype, max_rows: int, kv_tokens: int | None = None
) -> tuple[Bench, Bench]:
    """The same trio with expert = antiexpert + LoRA on all linears: as two small models, and on one set of
    weights."""
    large, small = SHAPES[name]
    base = random_llama(large, device, dtype, 0)
    antiexpert = random_llama(small, device, dtype, 2)
    with tempfile.TemporaryDirectory(prefix="proxytune-bench-") as folder:
        expert = _tuned_by_adapter(antiexpert, Path(folder))
        plain = {"base": base, "expert": expert, "antiexpert": antiexpert}
        kv = _kv_bytes(plain, kv_tokens)
        apart = Bench(f"{name}, LoRA merged", plain, in_memory(plain), max_rows, kv)
        own = {role: module for role, module in plain.items() if role != "expert"}
        together = Bench(f"{name}, LoRA shared", plain, in_memory(own, adapter=folder), max_rows, kv)
        together.models.get("expert")  # while the adapter's folder exists
    return apart, together


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A Llama with random weights, made on the device."""
    module: PreTrainedModel
    config = shape.config(WINDOW)
    if shape.int8:  # 70B in bfloat16 fits beside nothing
        module = random_int8(config, device, dtype=dtype, seed=seed)
    else:
        torch.manual_seed(seed)
        with device:
            module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    module.eval().requires_grad_(False)
    return module


def in_memory(plain: Mapping[str, PreTrainedModel], adapter: str | None = None) -> Models:
    """Models that are made rather than loaded, with what loading does to them (`Models.get`). Without
    an expert it is the LoRA in the folder `adapter`."""
    spec = ModelSpec(model="random")
    expert = spec if adapter is None else ExpertSpec(adapter=adapter)
    system = System(name="random", base=spec, expert=expert, antiexpert=spec)
    tokenizer = words(int(plain["base"].config.vocab_size))
    loaded = {}
    for role, module in plain.items():
        own = twin(module)
        use_row_linears(own)
        use_row_norms(own)
        use_device_kernels(own)
        source = WeightSource(role, None, None, str(own.dtype), "none", "None", False)
        size = read_bytes(own)
        loaded[role] = Loaded(role, spec, own, tokenizer, examine(own), Adapters(), None, size, 0, source)
    return Models(system, _loaded=loaded)


def twin(module: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module on the same weights, so that what proxytune does to one leaves the other alone."""
    tensors = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if hasattr(part, "state"):  # where bitsandbytes keeps what belongs to its weights
            tensors += [value for value in vars(part.state).values() if isinstance(value, Tensor)]
    copied: PreTrainedModel = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    return copied


def read_bytes(module: PreTrainedModel) -> int:
    """Bytes of weights that one forward of a few tokens reads: everything but an untied input embedding."""
    unique = {p.data_ptr(): p.nbytes for p in module.parameters()}
    table, head = module.get_input_embeddings().weight, module.get_output_embeddings()
    if head is None or head.weight.data_ptr() != table.data_ptr():
        unique.pop(table.data_ptr(), None)
    return sum(unique.values())


def kv_bytes_per_token(module: PreTrainedModel) -> int:
    """Bytes of keys and values of one token over all layers."""
    config = module.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(numbers) * int(module.dtype.itemsize)


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `size` words that mean nothing: the engine wants ids, the decoder a vocabulary."""
    vocabulary = {"<unk>": 0, **{f"w{index}": index for index in range(1, size)}}
    raw = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def _tuned_by_adapter(module: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A merged copy of the module with a random LoRA, which is saved in the folder."""
    from peft import LoraConfig, get_peft_model  # slow to import, and most runs do without

    settings = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=LINEARS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(copy.deepcopy(module), settings)
    peft.save_pretrained(str(folder))
    merged: PreTrainedModel = peft.merge_and_unload()
    return merged.eval().requires_grad_(False)


def _kv_bytes(plain: Mapping[str, PreTrainedModel], tokens: int | None) -> int | None:
    return None if tokens is None else tokens * sum(map(kv_bytes_per_token, plain.values()))
