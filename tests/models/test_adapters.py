"""Adapters that are loaded are in force: PEFT's own forward is the oracle, on weights of the model's own and
on the antiexpert's; what cannot be in force is refused in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from proxytune.config import ModelSpec, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.errors import UserError
from proxytune.models.adapter_files import adapter_notes, check_adapter, read_adapter
from proxytune.models.in_force import require_untouched
from proxytune.models.roles import Models
from proxytune.records import Prompt
from tests.support import tiny
from tests.support.adapters import fresh
from tests.support.decoders import example, tokens
from tests.support.tiers import slow
from tests.support.tiny import spec

IDS = [7, 5, 40, 90, 200, 31, 5]
TARGETS = ["q_proj", "v_proj", "down_proj"]
GREEDY = Sampling(max_new_tokens=6)


@dataclass(frozen=True)
class World:
    """Two checkpoints that differ in whether the head is the embeddings, and a folder for adapters."""

    root: Path
    plain: Path
    tied: Path

    def adapter(self, config: Any, *, tied: bool = False, train: bool = True, name: str = "adapter") -> Path:
        """An adapter of that configuration, as peft saves it after some training."""
        target = self.root / name
        torch.manual_seed(1)
        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(fresh(self.tied if tied else self.plain), config)
            with torch.no_grad():
                for parameter in model.parameters() if train else ():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            model.save_pretrained(target)
        return target

    def models(self, adapter: Path, way: str, *, tied: bool = False, **more: Any) -> Models:
        """A trio of one checkpoint whose expert has the adapter: on weights of its own, or on the
        antiexpert's."""
        base = spec(self.tied if tied else self.plain)
        changes = {"adapter": str(adapter), **more}
        expert = base.model_copy(update=changes) if way == "own" else ModelSpec(**changes)
        return Models(System(base=base, antiexpert=base, expert=expert))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    plain = tiny.save(root / "plain", tiny.build("llama", 3))
    return plain, tiny.save(root / "tied", tiny.build("llama", 3, tie_word_embeddings=True))


@pytest.fixture
def world(checkpoints: tuple[Path, Path], tmp_path: Path) -> World:
    return World(tmp_path, *checkpoints)


@torch.inference_mode()
def by_peft(folder: Path, adapter: Path) -> torch.Tensor:
    """Logits [V] after IDS by PEFT's own forward."""
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(fresh(folder), str(adapter)).eval()
    logits: torch.Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    return logits


@torch.inference_mode()
def alone(folder: Path) -> torch.Tensor:
    logits: torch.Tensor = fresh(folder).eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    return logits


def lora(**options: Any) -> Callable[[], Any]:
    """Makes a LoRA configuration; peft writes into one when it is used."""
    return lambda: LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **options}
    )


TABLES = {
    "head": lora(target_modules=[*TARGETS, "lm_head"]),
    "embeddings": lora(target_modules=[*TARGETS, "embed_tokens"]),
    "both": lora(target_modules=[*TARGETS, "embed_tokens", "lm_head"]),
    "both tied": lora(target_modules=[*TARGETS, "embed_tokens"], ensure_weight_tying=True),
    "dora head": lora(target_modules=[*TARGETS, "lm_head"], use_dora=True),
    "dora embeddings": lora(target_modules=[*TARGETS, "embed_tokens"], use_dora=True),
    "saved head": lora(modules_to_save=["lm_head"]),
    "saved embeddings": lora(modules_to_save=["embed_tokens"]),
    "saved both": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices=[5, 40]),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 40], task_type="CAUSAL_LM"),
}
"""What reaches the embeddings and the head, which may be one tensor."""
LAYERS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias of its own": lora(lora_bias=True),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "every linear layer": lora(target_modules="all-linear"),
    "one layer": lora(layers_to_transform=[1]),
    "saved norm": lora(modules_to_save=["norm"]),
    "a parameter": lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
}
KINDS = {
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "FOURIERFT": lambda: peft.FourierFTConfig(
        n_frequency=20, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "HRA": lambda: peft.HRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "LOHA": lambda: peft.LoHaConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LOKR": lambda: peft.LoKrConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VBLORA": lambda: peft.VBLoRAConfig(
        vector_length=8, num_vectors=8, topk=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
CASES = [
    *((name, make, tied) for name, make in TABLES.items() for tied in (False, True)),
    *((name, make, False) for name, make in {**LAYERS, **KINDS}.items()),
]


@pytest.mark.parametrize("way", ["own", "shared"])
@pytest.mark.parametrize(
    "name, make, tied", CASES, ids=[f"{name}{' (tied model)' * tied}" for name, _, tied in CASES]
)
@pytest.mark.every(3)
def test_logits_are_pefts(name: str, make: Callable[[], Any], tied: bool, way: str, world: World) -> None:
    folder, adapter = world.tied if tied else world.plain, world.adapter(make(), tied=tied)
    want, plain = by_peft(folder, adapter), alone(folder)
    assert (want - plain).abs().max() > 1e-3
    models = world.models(adapter, way, tied=tied)
    antiexpert = models.get("antiexpert")
    early = antiexpert.forward
    expert = models.get("expert")
    assert expert.family.path == "packed"
    assert (expert.logits(IDS) - want).abs().max() < 1e-9, name
    assert (antiexpert.logits(IDS) - plain).abs().max() < 1e-9
    assert (expert.logits(IDS) - want).abs().max() < 1e-9
    assert antiexpert.forward is early  # and so it is right for a role that was there before


MIXTURES = {
    "mixtral": lora(
        target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "deepseek-v3": lora(target_modules=["down_proj"], target_parameters=["experts.down_proj"]),
    "qwen3-moe": lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "gate.weight"]),
    "gpt-oss": lora(target_modules=["o_proj"], target_parameters=["experts.down_proj"]),
}
"""Families with experts: adapters on the experts' weights, on their routers', and on what all tokens see."""


@pytest.mark.parametrize("way", ["own", "shared"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", slow("qwen3-moe"), slow("gpt-oss")])
def test_an_adapter_on_experts_is_pefts(family: str, way: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / family, tiny.build(family, 3))
    world = World(tmp_path, folder, folder)
    adapter = world.adapter(MIXTURES[family]())
    want, plain = by_peft(folder, adapter), alone(folder)
    assert (want - plain).abs().max() > 0.1
    models = world.models(adapter, way)
    expert, antiexpert = models.get("expert"), models.get("antiexpert")
    assert (expert.module is antiexpert.module) == (way == "shared") and expert.family.path == "packed"
    for _ in range(2):
        assert (expert.logits(IDS) - want).abs().max() < 1e-9
        assert (antiexpert.logits(IDS) - plain).abs().max() < 1e-9


@pytest.mark.parametrize("way", ["own", "shared"])
def test_experts_as_modules_of_their_own_see_some_tokens_only(way: str, tmp_path: Path) -> None:
    """A linear layer that gets the tokens of one expert cannot tell whose they are: PEFT's switch serves it,
    and no layer of ours is left behind."""
    folder = tiny.save(tmp_path / "plain", tiny.build("llama", 3))
    world = World(tmp_path, folder, folder)
    adapter = world.adapter(lora(target_modules=["q_proj", "down_proj"])())
    models = world.models(adapter, way)
    host = models.get("antiexpert")
    for layer in host.module.model.layers:
        layer.mlp = Routed(layer.mlp)
    expert = models.get("expert")
    if way == "shared":
        assert expert.adapters.peft is not None and not expert.adapters.layers
    assert (expert.logits(IDS) - by_peft(folder, adapter)).abs().max() < 1e-9
    assert (host.logits(IDS) - alone(folder)).abs().max() < 1e-9


class Routed(torch.nn.Module):
    """Gives every other token to the layer, and then the rest, as a mixture does with its experts."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.down_proj, self.inner = inner.down_proj, inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        for start in (0, 1):
            some, inner = hidden[:, start::2], self.inner
            out[:, start::2] = self.down_proj(inner.act_fn(inner.gate_proj(some)) * inner.up_proj(some))
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_repeated_layers_are_pefts_and_keep_their_own_changes(tied: bool, world: World) -> None:
    """Layers that share a tensor, each with an adapter of its own: on a model of its own only."""
    targets = [*TARGETS, "lm_head"]
    adapter = world.adapter(lora(target_modules=targets, layer_replication=[[0, 2], [1, 2]])(), tied=tied)
    expert = world.models(adapter, "own", tied=tied).get("expert")
    assert len(expert.module.model.layers) == 3 and expert.family.path == "packed"
    want = by_peft(world.tied if tied else world.plain, adapter)
    assert (expert.logits(IDS) - want).abs().max() < 1e-9
    with pytest.raises(UserError, match=r"repeats layers .*: give the expert its own `model`"):
        world.models(adapter, "shared", tied=tied).get("expert")


def test_what_shares_no_tensor_is_merged(world: World) -> None:
    """A tied head keeps its adapter beside it; the layers take theirs up, and cost nothing more per step."""
    from peft.tuners.lora.layer import Linear

    adapter = world.adapter(TABLES["head"](), tied=True)
    module = world.models(adapter, "own", tied=True).get("expert").module
    merged = {path: part.merged for path, part in module.named_modules() if isinstance(part, Linear)}
    assert not merged.pop("lm_head") and len(merged) == 6 and all(merged.values())
    whole = world.models(world.adapter(LAYERS["plain"](), name="plain"), "own").get("expert").module
    assert not any(isinstance(part, Linear) for part in whole.modules())


def test_a_method_that_takes_from_the_weights_is_pefts_on_its_own_model(world: World) -> None:
    """PiSSA begins by taking its part out of the weights, which the antiexpert would lose too."""
    folder = tiny.save(world.root / "single", tiny.build("llama", 3).float())
    torch.manual_seed(1)
    config = lora(init_lora_weights="pissa")()
    model = get_peft_model(fresh(folder).float(), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(world.root / "pissa")
    base = ModelSpec(model=str(folder), dtype="float32")
    own = base.model_copy(update={"adapter": str(world.root / "pissa")})
    with torch.inference_mode():
        tuned = PeftModel.from_pretrained(fresh(folder).float(), str(world.root / "pissa")).eval()
        want = tuned(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    got = Models(System(base=base, expert=own, antiexpert=base)).get("expert").logits(IDS)
    assert (got - want).abs().max() < 1e-3
    shared = System(base=base, antiexpert=base, expert=ModelSpec(adapter=str(world.root / "pissa")))
    with pytest.raises(UserError, match=r"changes the weights below it \(init_lora_weights: pissa\)"):
        Models(shared).get("expert")


def test_an_adapter_that_touches_its_host_is_found_by_the_numbers(world: World) -> None:
    files = read_adapter(str(world.adapter(LAYERS["plain"]())))
    before = torch.randn(50)
    require_untouched(files, "antiexpert", before, before + 1e-4)
    with pytest.raises(UserError, match="changes the antiexpert, whose weights it shares"):
        require_untouched(files, "antiexpert", before, before + torch.randn(50))


def test_release_and_load_again_what_peft_switches(world: World) -> None:
    models = world.models(world.adapter(LAYERS["dora"]()), "shared")
    want, plain = models.get("expert").logits(IDS), alone(world.plain)
    models.release(keep=["antiexpert"])
    assert (models.get("antiexpert").logits(IDS) - plain).abs().max() < 1e-9
    assert torch.equal(models.get("expert").logits(IDS), want)


# what changes nothing


def edited(adapter: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Path:
    """The adapter with other names or values in its file."""
    file = adapter / "adapter_model.safetensors"
    save_file(dict(change(key, tensor) for key, tensor in load_file(file).items()), file)
    return adapter


def configured(adapter: Path, **options: Any) -> Path:
    """The adapter with other options in its configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    return adapter


def wrapped(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("base_model.model.", "base_model.model._orig_mod."), tensor


def halved(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("layers.1.", "layers.7."), tensor


def damaged(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor * float("nan")


def elsewhere(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("lora_A.weight", "lora_C.weight"), tensor


REFUSED: dict[str, tuple[Callable[[World], Path], str]] = {
    "names with a wrapper's prefix": (
        lambda w: edited(w.adapter(LAYERS["plain"]()), wrapped),
        r"does not fit the model: 12 of its 12 weights have no place in it, 'base_model.model._orig_mod",
    ),
    "the same for DoRA": (
        lambda w: edited(w.adapter(LAYERS["dora"]()), wrapped),
        "18 of its 18 weights have no place in it",
    ),
    "names of a larger model": (
        lambda w: edited(w.adapter(LAYERS["plain"]()), halved),
        r"6 of its 12 weights have no place in it, '.*layers\.7\.",
    ),
    "B without A": (
        lambda w: edited(w.adapter(LAYERS["plain"]()), elsewhere),
        "6 of its 12 weights have no place",
    ),
    "a layer without weights": (
        lambda w: configured(w.adapter(lora(target_modules=["q_proj"])()), target_modules=TARGETS),
        r"lacks weights that its configuration promises, '.*down_proj.lora_A.weight' first",
    ),
    "a head without weights": (
        lambda w: configured(w.adapter(LAYERS["plain"]()), modules_to_save=["lm_head"]),
        "lacks weights that its configuration promises, '.*lm_head",
    ),
    "no training": (
        lambda w: w.adapter(LAYERS["plain"](), train=False),
        "changes nothing: its B weights are all zero, as before the first step of training",
    ),
    "no training of DoRA": (
        lambda w: w.adapter(LAYERS["dora"](), train=False),
        "changes no logit of the model: its B weights are all zero",
    ),
    "no training of another kind": (
        lambda w: w.adapter(KINDS["LOHA"](), train=False),
        "changes no logit of the model$",
    ),
    "no numbers": (
        lambda w: edited(w.adapter(LAYERS["plain"]()), damaged),
        "makes logits that are no numbers|has NaN or infinite numbers",
    ),
    "activated LoRA": (
        lambda w: w.adapter(lora(alora_invocation_tokens=[5])()),
        r"is an activated LoRA \(alora_invocation_tokens\), which acts in PEFT's own forward only",
    ),
    "a kind that needs PEFT's own forward": (
        lambda w: _written(w.adapter(LAYERS["plain"]()), json.dumps({"peft_type": "POLY", "r": 4})),
        "is POLY, which is not run here: LoRA and prompt tuning are supported",
    ),
    "a kind that nobody knows": (
        lambda w: configured(w.adapter(LAYERS["plain"]()), peft_type="MYSTERY"),
        r"is of kind 'MYSTERY', which peft [\d.]+ does not know: pip install -U peft",
    ),
    "an option of a newer peft": (
        lambda w: configured(w.adapter(LAYERS["plain"]()), use_mystery=True, no_mystery=False),
        r"asks for use_mystery, which peft [\d.]+ would ignore: pip install -U peft",
    ),
    "a configuration that is a list": (
        lambda w: _written(w.adapter(LAYERS["plain"]()), "[]"),
        "is of kind 'None'",
    ),
    "a configuration that is no JSON": (
        lambda w: _written(w.adapter(LAYERS["plain"]()), "{"),
        "cannot load the adapter",
    ),
    "a token beyond the model's": (
        lambda w: configured(w.adapter(TABLES["tokens"]()), trainable_token_indices=[5, 400]),
        "trains token 400, and the model has 259",
    ),
}


def _written(adapter: Path, text: str) -> Path:
    (adapter / "adapter_config.json").write_text(text)
    return adapter


@pytest.mark.parametrize("way", ["own", "shared"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_in_force_is_refused_in_one_line(case: str, way: str, world: World) -> None:
    make, says = REFUSED[case]
    adapter = make(world)
    with pytest.raises(UserError, match=says) as caught:
        world.models(adapter, way).get("expert")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


@pytest.mark.parametrize("way", ["own", "shared"])
@pytest.mark.parametrize("case", sorted(set(REFUSED) - {"no numbers", *(c for c in REFUSED if "of " in c)}))
def test_it_is_found_without_weights(case: str, way: str, world: World) -> None:
    make, says = REFUSED[case]
    adapter = str(make(world))
    with pytest.raises(UserError, match=says):
        check_adapter(adapter, AutoConfig.from_pretrained(world.plain), shared=way == "shared")


def test_a_good_adapter_passes_without_weights(world: World) -> None:
    for name, make in {"plain": LAYERS["plain"], "both": TABLES["both"], "VERA": KINDS["VERA"]}.items():
        adapter = str(world.adapter(make(), name=name))
        config = AutoConfig.from_pretrained(world.plain)
        assert check_adapter(adapter, config, shared=True).location == adapter
        assert config.num_hidden_layers == 2
    again = str(world.adapter(lora(layer_replication=[[0, 2], [1, 2]])(), name="repeated"))
    check_adapter(again, config, shared=False)
    assert config.num_hidden_layers == 2  # the model's own configuration stays as it was


# added tokens, tokenizers and templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
SHORT = "{{ bos_token }}{% for m in messages %}U:{{ m['content'] }}\n{% endfor %}A:"


def chat_words(template: str = TEMPLATE, added: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Any:
    words = tiny.tokenizer(template)
    words.add_special_tokens({"additional_special_tokens": list(added)})
    return words


def grown(world: World, *, tied: bool, keep: bool = True, **options: Any) -> tuple[Path, Any]:
    """An adapter that was trained after two tokens were added, with its tokenizer; and PEFT's model of it."""
    folder = world.tied if tied else world.plain
    torch.manual_seed(2)
    with warnings.catch_warnings(action="ignore"):
        big = fresh(folder)
        big.resize_token_embeddings(261, mean_resizing=False)
        model = get_peft_model(big, lora(**options)())
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(world.root / "grown", save_embedding_layers=keep)
    chat_words().save_pretrained(world.root / "grown")
    return world.root / "grown", model.eval()


GROWN: dict[str, dict[str, Any]] = {
    "saved tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tables as they were": {},
    "adapters on both": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "new tokens by name": {"trainable_token_indices": [259, 260]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", GROWN)
@pytest.mark.every(3)
def test_added_tokens_are_pefts(how: str, tied: bool, world: World) -> None:
    adapter, tuned = grown(world, tied=tied, **GROWN[how])
    models = world.models(adapter, "own", tied=tied, chat="tokenizer")
    d = Decoder(models, "expert")
    ids = list(d.contexts(Prompt(plain="hi", user="hi"))["expert"])
    assert 259 in ids and 260 in ids
    with torch.inference_mode():
        want = tuned(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    assert models.get("expert").logits(ids).shape == (261,)
    assert (models.get("expert").logits(ids) - want).abs().max() < 1e-9
    assert models.get("expert").size == 261
    proxy = Decoder(models, "proxy")  # what only the expert has is cut
    assert all(max(found) < 259 for found in tokens(proxy, GREEDY).values())
    with pytest.raises(UserError, match="has embeddings of 261 tokens, and the antiexpert's are of 259"):
        world.models(adapter, "shared", tied=tied).get("expert")


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [259, 260]}], ids=["none", "tokens"])
def test_added_tokens_without_their_rows(options: dict[str, Any], world: World) -> None:
    """A tokenizer that grew and rows that were not saved: no row is made up. Other prompts go on."""
    adapter, _ = grown(world, tied=False, keep=False, **options)
    models = world.models(adapter, "shared", chat="tokenizer")
    if options:
        with pytest.raises(
            UserError, match=r"trains token 260, and the model has 259.*save_embedding_layers"
        ):
            models.get("expert")
        return
    with pytest.raises(UserError, match=r"a prompt of the expert has token 260 \('<\|im_end\|>'\)"):
        Decoder(models, "expert").contexts(Prompt(plain="hi", user="hi"))
    assert tokens(Decoder(world.models(adapter, "shared"), "expert"), GREEDY)


def test_half_of_the_tables_is_refused(world: World) -> None:
    adapter, _ = grown(world, tied=False, modules_to_save=["embed_tokens", "lm_head"])
    file = adapter / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "lm_head" not in k}, file)
    with pytest.raises(UserError, match=r"was trained on 261 tokens.*no rows for lm_head"):
        world.models(adapter, "own").get("expert")
    with pytest.raises(UserError, match="no rows for lm_head"):
        check_adapter(str(adapter), AutoConfig.from_pretrained(world.plain), shared=False)


def test_embeddings_saved_beside_an_adapter_never_overwrite_the_antiexperts(world: World) -> None:
    """PEFT would load them into the weights that both run on."""
    adapter = world.adapter(TABLES["head"]())  # PEFT saves the head below it, unasked
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    world.models(adapter, "shared").get("expert")
    edited(adapter, lambda key, tensor: (key, tensor + 1 if "base_layer" in key else tensor))
    with pytest.raises(UserError, match=r"has other embeddings \(lm_head\) than the antiexpert"):
        world.models(adapter, "shared").get("expert")
    want = by_peft(world.plain, adapter)
    assert (world.models(adapter, "own").get("expert").logits(IDS) - want).abs().max() < 1e-9


@pytest.mark.parametrize("way", ["own", "shared"])
def test_the_tokenizer_and_template_beside_an_adapter_are_used_and_said(way: str, world: World) -> None:
    adapter = world.adapter(LAYERS["plain"]())
    plain = Decoder(world.models(adapter, way), "proxy")
    assert plain.notes() == [n for n in plain.notes() if "adapter" not in n]
    assert plain.memory["expert"].tokenizer is None
    (adapter / "chat_template.jinja").write_text(SHORT)
    d = Decoder(world.models(adapter, way, chat="tokenizer"), "proxy")
    assert f"the expert uses the chat template that lies beside its adapter '{adapter}'" in d.notes()
    ids = d.contexts(Prompt(plain="hi", user="hi"))
    assert d.tokenizer.decode(ids["expert"]) == "<s>U:hi\nA:" and d.tokenizer.decode(ids["base"]) == "<s>hi"
    assert d.loaded["antiexpert"].tokenizer.chat_template is None
    tiny.tokenizer(SHORT.replace("U:", "V:")).save_pretrained(adapter)
    d = Decoder(world.models(adapter, way, chat="tokenizer"), "proxy")
    said = f"the expert uses the tokenizer and chat template that lies beside its adapter '{adapter}'"
    assert d.notes().count(said) == 1
    assert d.tokenizer.decode(d.contexts(Prompt(plain="hi", user="hi"))["expert"]) == "<s>V:hi\nA:"
    assert {name: m.tokenizer for name, m in d.memory.items()} == {
        "base": None,
        "expert": str(adapter),
        "antiexpert": None,
    }


@pytest.mark.parametrize("way", ["own", "shared"])
def test_the_vocabulary_beside_an_adapter_is_checked(way: str, world: World) -> None:
    adapter = world.adapter(LAYERS["plain"]())
    tiny.tokenizer(swapped=("a", "b")).save_pretrained(adapter)
    with pytest.raises(UserError, match="the vocabularies of the base and the expert differ at 2 of 259 ids"):
        Decoder(world.models(adapter, way), "proxy")
    system = world.models(adapter, way).system.model_copy(update={"vocab": "intersect"})
    d = Decoder(Models(system), "proxy")
    found = next(iter(d.stream([example("ab")], GREEDY)))
    assert found.token_ids and d.contexts(example("ab").prompt)["expert"] == (
        1,
        *reversed(d.contexts(example("ab").prompt)["antiexpert"][1:]),
    )


def test_a_base_of_another_name_is_said_and_a_moved_folder_is_not(world: World) -> None:
    adapter = world.adapter(LAYERS["plain"]())

    def notes(made_for: str | None, model: str | None) -> list[str]:
        files = read_adapter(str(configured(adapter, base_model_name_or_path=made_for)))
        return adapter_notes("expert", ModelSpec(adapter=str(adapter)), files, model)

    assert notes("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf") == [
        f"the adapter '{adapter}' was made for meta-llama/Llama-2-7b-hf, and sits on "
        "meta-llama/Llama-2-13b-hf"
    ]
    assert not notes("meta-llama/Llama-2-7b-hf", "mirror/llama-2-7b-hf")
    for made_for in ("/home/me/llama", "./llama", "out/checkpoint-3/merged", "llama", "", None):
        assert not notes(made_for, "meta-llama/Llama-2-13b-hf"), made_for
    for model in (str(world.plain), "./llama", "demo://anti", None):
        assert not notes("meta-llama/Llama-2-7b-hf", model), model
