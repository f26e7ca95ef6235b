"""Loading: adapters on shared weights, soft prompts, dtypes, quantisation, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from proxytune.config import ExpertSpec, ModelSpec, Role, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.request import Segment, Work
from proxytune.engine.runners.runner import ModelRunner, forward_all
from proxytune.engine.speculative.drafter import Speculation
from proxytune.errors import UserError
from proxytune.models.checkpoint import load_config
from proxytune.models.loading import load_module
from proxytune.models.memory import weights_needed
from proxytune.models.roles import Models, WeightSource
from proxytune.options import DecodeOptions
from proxytune.records import Completion
from tests.support import oracle, tiny
from tests.support.adapters import fresh, on_anti, system
from tests.support.decoders import GREEDY, by_id, check, decoder, example, ragged, tokens
from tests.support.memory import leave_free
from tests.support.require import require_or_skip
from tests.support.tiny import spec

ROLES: tuple[Role, ...] = ("base", "expert", "antiexpert", "proxy")


def merged(folders: dict[str, Path], name: str, target: Path) -> Path:
    """The adapter merged into the antiexpert by peft, saved as a checkpoint of its own."""
    return tiny.save(
        target, PeftModel.from_pretrained(fresh(folders["anti"]), str(folders[name])).merge_and_unload()
    )


@pytest.mark.parametrize("name", ["lora", "head"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.every(2)
def test_adapter_on_the_antiexpert_equals_two_models(
    name: str, temperature: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    s = Sampling(max_new_tokens=10, temperature=temperature)
    separate = system(folders, spec(merged(folders, name, tmp_path / "merged")))
    d = decoder(separate)
    check(d, ragged(6, 3), s)  # the oracle, on the merged model
    shared = Decoder(Models(system(folders, on_anti(folders, name))), "proxy")
    assert tokens(shared, s) == tokens(d, s)
    assert tokens(shared, s) != tokens(decoder(separate, "base"), s)
    assert shared.loaded["expert"].module is shared.loaded["antiexpert"].module


@pytest.mark.parametrize("k", [0, 3])
def test_both_small_roles_share_a_forward(
    k: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the pair are read once per step, by one call of the module, and the antiexpert runs
    ahead with the expert."""
    d = Decoder(
        Models(system(folders, on_anti(folders, "lora"))), "proxy", speculation=Speculation(k=k, lookup=False)
    )
    assert d.ensemble.draft_models() == ("expert", "antiexpert")
    calls = {"base": 0, "pair": 0}
    runners = d.ensemble.runners

    def counting(name: str, forward: Any) -> Any:
        def counted(**arguments: Any) -> Any:
            calls[name] += 1
            return forward(**arguments)

        return counted

    base, expert, antiexpert = runners["base"], runners["expert"], runners["antiexpert"]
    assert isinstance(base, ModelRunner) and isinstance(expert, ModelRunner)
    assert isinstance(antiexpert, ModelRunner) and expert.model is antiexpert.model
    monkeypatch.setattr(base, "model", counting("base", base.model))
    pair = counting("pair", expert.model)
    monkeypatch.setattr(expert, "model", pair)
    monkeypatch.setattr(antiexpert, "model", pair)
    (found,) = d.stream(ragged(1, 3), GREEDY)
    prefill = 1 if len(d.contexts(ragged(1, 3)[0].prompt)["base"]) > 1 else 0
    steps = d.stats.row_steps
    assert calls["base"] == steps + prefill
    if k == 0:
        assert calls["pair"] == calls["base"] == len(found.token_ids) + prefill
    else:
        assert d.stats.drafted + prefill <= calls["pair"] <= d.stats.drafted + steps + prefill


def test_peft_mixed_batch_is_the_oracle_of_the_shared_forward(folders: dict[str, Path]) -> None:
    """One packed forward of both roles gives what PEFT's own per-row adapters give, to 1e-12."""
    models = Models(system(folders, on_anti(folders, "lora")))
    d = Decoder(models, "proxy")
    ids = [5, 9, 100, 7, 31]
    runners = d.ensemble.runners
    for name in ("expert", "antiexpert"):
        rows = runners[name].rows
        rows.admit()
        rows.reserve([len(ids)])
    work = Work([Segment(0, tuple(ids))], range(len(ids)))
    ours = forward_all(runners, {"expert": work, "antiexpert": work})
    peft = PeftModel.from_pretrained(
        fresh(folders["anti"]), str(folders["lora"]), adapter_name="expert"
    ).eval()
    with torch.inference_mode():
        theirs = peft(
            input_ids=torch.tensor([ids, ids]), adapter_names=["expert", "__base__"], use_cache=False
        ).logits
    for name, logits in zip(("expert", "antiexpert"), theirs, strict=True):
        assert (ours[name] - logits).abs().max() < 1e-12, name
    assert (theirs[0] - theirs[1]).abs().max() > 0.1


@pytest.mark.parametrize("k", [0, 1, 4, None])
@pytest.mark.parametrize("name", ["lora", "head", "prompt", "mlp"])
@pytest.mark.every(3)
def test_shared_weights_speculate_as_they_decode(name: str, k: int | None, folders: dict[str, Path]) -> None:
    pair, s = system(folders, on_anti(folders, name)), Sampling(max_new_tokens=14, temperature=0.7, n=2)
    plain = Decoder(Models(pair), "proxy", DecodeOptions(batch=1, speculate="off"))
    assert tokens(Decoder(Models(pair), "proxy", speculation=Speculation(k=k)), s) == tokens(plain, s)


def test_an_adapter_costs_its_own_bytes_only(folders: dict[str, Path]) -> None:
    models = Models(system(folders, on_anti(folders, "lora")))
    memory = Decoder(models, "proxy").memory
    numbers = sum(t.numel() for t in load_file(folders["lora"] / "adapter_model.safetensors").values())
    assert memory["expert"].shared_with == "antiexpert" and memory["antiexpert"].shared_with is None
    assert memory["expert"].weights == numbers * 8
    anti = Decoder(Models(system(folders)), "antiexpert").memory["antiexpert"]
    assert memory["antiexpert"].weights == anti.weights > 10 * memory["expert"].weights


@pytest.mark.parametrize(
    "order", [["antiexpert", "proxy", "expert"], ["expert", "proxy", "antiexpert"], ["proxy"]]
)
def test_the_antiexpert_never_feels_the_adapter(order: list[Role], folders: dict[str, Path]) -> None:
    """Whatever is loaded first, and however the roles take turns, also in the middle of a stream."""
    alone = tokens(Decoder(Models(system(folders)), "antiexpert"))
    models = Models(system(folders, on_anti(folders, "lora")))
    first = {role: Decoder(models, role) for role in order}
    seen = {role: tokens(d) for role, d in first.items()}
    assert {role: tokens(d) for role, d in reversed(first.items())} == seen
    assert tokens(first.get("antiexpert") or Decoder(models, "antiexpert")) == alone
    assert len({str(t) for t in seen.values()}) == len(seen)

    interleaved: dict[Role, list[Completion]] = {role: [] for role in first}
    streams = {role: d.stream(ragged(6, 3), GREEDY) for role, d in first.items()}
    while streams:
        for role, stream in list(streams.items()):
            item = next(stream, None)
            if item is None:
                del streams[role]
            else:
                interleaved[role].append(item)
    assert {r: {k: c.token_ids for k, c in by_id(found).items()} for r, found in interleaved.items()} == seen


def test_two_adapters_on_one_antiexpert(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"lora": 0.6, "lora2": -0.3}
    separate = tuple(
        ExpertSpec(**spec(merged(folders, name, tmp_path / name)).model_dump(), weight=w)
        for name, w in weights.items()
    )
    shared = tuple(ExpertSpec(adapter=str(folders[name]), weight=w) for name, w in weights.items())
    read: list[str] = []
    monkeypatch.setattr(
        "proxytune.models.roles.load_module",
        lambda spec, **more: read.append(spec.model) or load_module(spec, **more),
    )
    heard: list[str] = []
    both = Models(system(folders, experts=shared), on_load=lambda name, _: heard.append(name))
    d = Decoder(both, "proxy")
    assert sorted(heard) == ["antiexpert", "base", "expert", "expert2"]
    assert read == [str(folders["base"]), str(folders["anti"])], "the host of both is read once"
    monkeypatch.undo()
    assert set(d.loaded) == {"base", "expert", "expert2", "antiexpert"}
    assert len({id(d.loaded[name].module) for name in ("expert", "expert2", "antiexpert")}) == 1
    assert tokens(d) == tokens(decoder(system(folders, experts=separate)))


def test_release_and_load_again(folders: dict[str, Path]) -> None:
    """A released adapter leaves the shared weights, and comes back as it was."""
    models = Models(system(folders, on_anti(folders, "lora")))
    before = Decoder(models, "proxy")
    want, memory = tokens(before), before.memory["expert"].weights
    layers = models.get("antiexpert").adapters.layers.values()
    assert layers and all(set(layer.adapters) == {"expert"} for layer in layers)
    models.release(keep=["antiexpert"])
    assert not any(layer.adapters for layer in layers)
    again = Decoder(models, "proxy")
    assert tokens(again) == want and again.memory["expert"].weights == memory
    models.release(keep=["expert"])
    assert tokens(Decoder(models, "antiexpert")) == tokens(Decoder(Models(system(folders)), "antiexpert"))


def test_adapter_with_a_model_of_its_own(folders: dict[str, Path]) -> None:
    own = ModelSpec(model=str(folders["anti"]), adapter=str(folders["lora"]), dtype="float64")
    d = Decoder(Models(system(folders, own)), "proxy")
    assert tokens(d) == tokens(Decoder(Models(system(folders, on_anti(folders, "lora"))), "proxy"))
    assert d.memory["expert"].shared_with is None
    assert d.memory["expert"].weights == d.memory["antiexpert"].weights
    # on a model of its own an adapter may change biases, and any role may have one
    biased = ModelSpec(model=str(folders["qwen"]), adapter=str(folders["bias"]), dtype="float64")
    d = Decoder(Models(System(base=biased)), "base")
    reference = PeftModel.from_pretrained(fresh(folders["qwen"]), str(folders["bias"])).merge_and_unload()
    for e in ragged(3, 1):
        want, _, _ = oracle.generate(reference, [], d.contexts(e.prompt)["base"], [], settings(d))
        assert list(next(iter(d.stream([e], GREEDY))).token_ids) == want


def settings(d: Decoder) -> oracle.Settings:
    return oracle.Settings(max_new=GREEDY.max_new_tokens, eos=frozenset([d.tokenizer.eos_token_id]))


def test_an_adapter_that_changes_biases_cannot_share(folders: dict[str, Path]) -> None:
    """peft would write its biases into the antiexpert's own weights."""
    shared = System(
        base=spec(folders["qwen"]), antiexpert=spec(folders["qwen"]), expert=on_anti(folders, "bias")
    )
    models = Models(shared)
    with pytest.raises(UserError, match="changes biases"):
        models.get("expert")


@pytest.mark.parametrize("name", ["prompt", "mlp", "lstm"])
def test_soft_prompts_generate_what_peft_generates(name: str, folders: dict[str, Path]) -> None:
    d = Decoder(Models(system(folders, on_anti(folders, name))), "expert", DecodeOptions(batch=3))
    assert d.loaded["expert"].virtual is not None and d.loaded["expert"].virtual.shape == (5, 32)
    tuned = PeftModel.from_pretrained(fresh(folders["anti"]), str(folders[name])).eval()
    found = by_id(list(d.stream(ragged(6, 3), GREEDY)))
    plain = tokens(Decoder(Models(system(folders)), "antiexpert"))
    assert {k: c.token_ids for k, c in found.items()} != plain
    for e in ragged(6, 3):
        ids = torch.tensor([[1, *(d.contexts(e.prompt)["expert"][6:])]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = tuned.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=GREEDY.max_new_tokens,
                do_sample=False,
                eos_token_id=2,
            )
        assert out[0, ids.shape[1] :].tolist() == list(found[e.id, 0].token_ids)


def test_a_soft_prompt_steers_the_base_and_costs_its_table(folders: dict[str, Path]) -> None:
    d = Decoder(Models(system(folders, on_anti(folders, "prompt"))), "proxy")
    assert d.memory["expert"].shared_with == "antiexpert" and d.memory["expert"].weights <= 5 * 32 * 8
    tuned = PeftModel.from_pretrained(fresh(folders["anti"]), str(folders["prompt"])).eval()
    plain = {name: fresh(folders[name]) for name in ("base", "anti")}

    class Prompted:
        """The soft prompt before every context, by peft; the virtual tokens have logits too."""

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return tuned(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    found = by_id(list(d.stream(ragged(4, 3), GREEDY)))
    for e in ragged(4, 3):
        ids = d.contexts(e.prompt)
        assert ids["expert"][5:] == ids["antiexpert"]
        want, _, _ = oracle.generate(
            plain["base"],
            [(1.0, Prompted(), plain["anti"])],
            ids["base"],
            [(ids["antiexpert"], ids["antiexpert"])],
            settings(d),
        )
        assert list(found[e.id, 0].token_ids) == want
    window = d.loaded["expert"].family.window
    with pytest.raises(UserError, match="for the expert, whose context window is"):
        list(d.stream([example("a" * (window - 3))], GREEDY))


def bad_adapter(folders: dict[str, Path], case: str, target: Path) -> Path:
    if case == "absent":
        return target
    shutil.copytree(folders["lora"], target)
    weights = target / "adapter_model.safetensors"
    match case:
        case "pickled":
            torch.save(load_file(weights), target / "adapter_model.bin")
            weights.unlink()
        case "damaged":
            weights.write_bytes(weights.read_bytes()[:200])
        case "another size":
            save_file(
                {k: torch.ones(t.shape[0], t.shape[1] + 1) for k, t in load_file(weights).items()}, weights
            )
        case "no adapter":
            (target / "adapter_config.json").unlink()
        case "other kind":
            config = json.loads((target / "adapter_config.json").read_text())
            config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
            (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "case, says",
    [
        ("absent", "cannot load the adapter"),
        ("pickled", "pickled weights are not loaded"),
        ("damaged", "cannot load the adapter"),
        ("another size", "size mismatch"),
        ("no adapter", "no adapter_config.json"),
        ("other kind", "PREFIX_TUNING: LoRA and prompt tuning are supported"),
    ],
)
def test_bad_adapters_get_one_line(case: str, says: str, folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = bad_adapter(folders, case, tmp_path / "bad")
    with pytest.raises(UserError, match=says) as caught:
        Models(system(folders, ModelSpec(adapter=str(adapter)))).get("expert")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_only_an_expert_sits_on_the_antiexpert(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="the base has an adapter but no model"):
        Models(System(base=on_anti(folders, "lora"))).get("base")


@pytest.mark.parametrize(
    "dtype, size", [("float64", 8), ("float32", 4), ("bfloat16", 2), ("float16", 2), ("auto", 8)]
)
def test_dtypes(dtype: str, size: int, folders: dict[str, Path]) -> None:
    """auto is the checkpoint's own. Weights and KV shrink with it, and tokens come out."""
    d = Decoder(Models(System(base=ModelSpec(model=str(folders["anti"]), dtype=dtype))), "base")  # type: ignore[arg-type]
    assert {p.element_size() for p in d.loaded["base"].module.parameters()} == {size}
    numbers = sum(p.numel() for p in d.loaded["base"].module.parameters())
    assert numbers * size <= d.memory["base"].weights < numbers * size * 1.02
    assert all(len(t) >= 1 for t in tokens(d).values())
    assert d.memory["base"].kv_peak > 0
    if size == 8:
        check(d, ragged(3, 3), GREEDY)


def test_memory_of_every_role_is_recorded(folders: dict[str, Path]) -> None:
    d = Decoder(Models(system(folders, spec(folders["anti"]))), "proxy")
    assert {name: m.kv_peak for name, m in d.memory.items()} == {"base": 0, "expert": 0, "antiexpert": 0}
    list(d.stream(ragged(6, 3), GREEDY))
    owners = {m.shared_with or name for name, m in d.memory.items()}
    assert owners == {"base", "expert"}  # the antiexpert is the expert's checkpoint
    for name, m in d.memory.items():
        cache = d.ensemble.runners[name].rows
        cached = sum(len(d.contexts(e.prompt)[name]) for e in ragged(6, 3))
        assert m.kv_peak >= cached * cache.spec.bytes_per_token and m.path == "packed"  # type: ignore[attr-defined]
        whole = sum(p.nbytes for p in d.loaded[name].module.parameters()) + buffers(d, name)
        assert m.weights == (whole if m.shared_with is None else 0)


def test_a_checkpoint_is_in_memory_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """However it is named, for as many roles as there are, with the tokens of models of their own."""
    link = tmp_path / "link"
    link.symlink_to(folders["anti"])
    copied = shutil.copytree(folders["anti"], tmp_path / "copy")
    one, same = spec(folders["anti"]), spec(link, chat="llama2")
    shared = Decoder(Models(System(base=one, expert=same, antiexpert=one)), "proxy")
    apart = Decoder(Models(System(base=one, expert=spec(copied, chat="llama2"), antiexpert=one)), "proxy")
    assert len({id(model.module) for model in shared.loaded.values()}) == 1
    assert len({id(model.module) for model in apart.loaded.values()}) == 2
    assert sum(m.weights > 0 for m in shared.memory.values()) == 1
    assert tokens(shared) == tokens(apart)
    check(shared, ragged(3, 3), GREEDY)
    other = ModelSpec(model=str(folders["anti"]), dtype="float32")
    models = Models(System(base=one, expert=other, antiexpert=one.model_copy(update={"dtype": "auto"})))
    loaded = {name: models.get(name) for name in ("base", "expert", "antiexpert")}
    assert loaded["expert"].module is not loaded["base"].module is loaded["antiexpert"].module
    models.release(["antiexpert"])
    assert models.get("base").module is loaded["antiexpert"].module


def test_what_decides_weights_tells_two_models_apart() -> None:
    """Two roles share a module only where all of these agree. A setting that is new has to be put here."""
    one = ModelSpec(model="owner/name", dtype="float64")
    other: dict[str, Any] = {
        "model": "owner/other", "adapter": "a", "dtype": "float32", "device_map": "cpu",
        "quantization": "8bit", "revision": "dev", "trust_remote_code": True,
    }  # fmt: skip
    assert {*other, "chat"} == set(ModelSpec.model_fields)
    specs = [one, *(one.model_copy(update={name: value}) for name, value in other.items())]
    assert len({WeightSource.of(spec, trust_remote_code=False) for spec in specs}) == len(specs)
    chatty = one.model_copy(update={"chat": "llama2"})
    assert WeightSource.of(chatty, trust_remote_code=False) == WeightSource.of(one, trust_remote_code=False)


def test_what_is_shared_counts_once_before_it_is_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = spec(folders["anti"])
    need = weights_needed(one, load_config(one), False)
    leave_free(monkeypatch, int(1.5 * need))
    models = Models(System(base=one, expert=one, antiexpert=one))
    models.check(["base", "expert", "antiexpert"])


def buffers(d: Decoder, name: str) -> int:
    return sum(b.nbytes for b in {b.data_ptr(): b for b in d.loaded[name].module.buffers()}.values())


@pytest.mark.parametrize("quantization, most", [("8bit", 0.6), ("4bit", 0.5)])
def test_quantised(
    quantization: str,
    most: float,
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        require_or_skip("tune", "bitsandbytes is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 128}
    big = tiny.save(tmp_path / "big", tiny.build("llama", 1, **shape).float())
    plain = Models(System(base=ModelSpec(model=str(big), dtype="float32"))).get("base")
    quantised = ModelSpec(model=str(big), dtype="float32", quantization=quantization)  # type: ignore[arg-type]
    d = Decoder(Models(System(base=quantised)), "base")
    assert d.loaded["base"].family.path == "packed"
    assert {torch.int8, torch.uint8} & {p.dtype for p in d.loaded["base"].module.parameters()}
    assert d.memory["base"].weights < most * plain.weights
    together = tokens(d)
    assert all(t for t in together.values())
    for e in ragged(2, 3):
        assert next(iter(d.stream([e], GREEDY))).token_ids == together[e.id, 0]
    assert "inputs will be cast" not in "".join(capfd.readouterr())


def test_four_bits_on_a_cpu_with_bfloat16_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There bitsandbytes packs weights anew for a product in bfloat16. A layer that is no whole number of
    blocks (160 is not) must still run, and a float32 model must stay one."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    shape = {"hidden_size": 64, "intermediate_size": 160}
    folder = tiny.save(tmp_path / "odd", tiny.build("llama", 1, **shape).float())
    found = {}
    for there in (False, True):
        monkeypatch.setattr(modules, "has_avx512bf16", lambda there=there: there)
        spec = ModelSpec(model=str(folder), dtype="float32", quantization="4bit")
        found[there] = Models(System(base=spec)).get("base").logits([1, 5, 7])
    assert torch.equal(found[True], found[False])


def test_quantised_antiexpert_carries_an_adapter(tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        require_or_skip("tune", "bitsandbytes is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks are 64 wide
    folder = tiny.save(tmp_path / "anti", tiny.build("llama", 3, **shape).float())
    adapter = get_peft_model(
        fresh(folder), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.4)
    adapter.save_pretrained(tmp_path / "lora")
    anti = ModelSpec(model=str(folder), dtype="float32", quantization="4bit")
    expert = ModelSpec(adapter=str(tmp_path / "lora"))
    base = ModelSpec(model=str(folder), dtype="float32")
    shared = Models(System(base=base, antiexpert=anti, expert=expert))
    found = {role: tokens(Decoder(shared, role)) for role in ROLES}
    assert len({str(t) for t in found.values()}) == 4
    assert tokens(Decoder(Models(System(base=anti)), "base")) == found["antiexpert"]
    own = anti.model_copy(update={"adapter": str(tmp_path / "lora")})
    assert tokens(Decoder(Models(System(base=own)), "base")) == found["expert"]


def bad_checkpoint(source: Path, case: str, target: Path) -> Path:
    if case == "absent":
        return target
    shutil.copytree(source, target)
    weights, config = target / "model.safetensors", target / "config.json"
    tensors, content = load_file(weights), json.loads(config.read_text())
    match case:
        case "pickled":
            torch.save(tensors, target / "pytorch_model.bin")
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "garbage":
            weights.write_bytes(b"these are not weights" * 20)
        case "empty file":
            weights.write_bytes(b"")
        case "a weight is missing":
            save_file({k: t for k, t in tensors.items() if "q_proj" not in k}, weights, {"format": "pt"})
        case "another shape":
            config.write_text(json.dumps({**content, "intermediate_size": 40}))
        case "bad field":
            config.write_text(json.dumps({**content, "hidden_size": "many"}))
        case "bad json":
            config.write_text("{")
        case "no config":
            config.unlink()
        case "unknown type":
            config.write_text(json.dumps({**content, "model_type": "lama"}))
        case "needs a package":
            config.write_text(
                json.dumps({**content, "quantization_config": {"quant_method": "gptq", "bits": 4}})
            )
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (target / name).unlink()
    return target


@pytest.mark.parametrize(
    "case, says",
    [
        ("absent", "no model folder"),
        ("pickled", "no file named model.safetensors"),
        ("cut", "cannot load the model"),
        ("garbage", "cannot load the model"),
        ("empty file", "cannot load the model"),
        (
            "a weight is missing",
            "lacks 2 weights of its architecture, model.layers.0.self_attn.q_proj.weight",
        ),
        ("another shape", "cannot load the model"),
        ("bad field", "hidden_size"),
        ("bad json", "not a valid JSON file"),
        ("no config", "cannot load the model"),
        ("unknown type", "lama"),
        ("needs a package", "cannot load the model"),
        ("no tokenizer", "cannot load the tokenizer"),
    ],
)
def test_bad_checkpoints_get_one_line(case: str, says: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A weight that is missing among them: transformers would make it up at random and only warn."""
    folder = bad_checkpoint(folders["anti"], case, tmp_path / "bad")
    with pytest.raises(UserError, match=says) as caught:
        Models(System(base=spec(folder))).get("base")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and len(str(caught.value)) < 600


def test_too_large_for_memory_gives_the_numbers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(p.numel() for p in fresh(folders["anti"]).parameters())
    monkeypatch.setattr("proxytune.models.memory.GIB", 1000)
    leave_free(monkeypatch, 2 * numbers)
    anti = ModelSpec(model=str(folders["anti"]), dtype="float32")
    with pytest.raises(UserError) as caught:
        load_module(anti)
    assert f"needs {4 * numbers / 1000:.1f} GiB" in str(caught.value)
    assert f"{2 * numbers / 1000:.1f} GiB are free" in str(caught.value)
    load_module(anti.model_copy(update={"dtype": "bfloat16"}))  # half of that just fits
    load_module(anti.model_copy(update={"device_map": {"": "cpu"}}))  # who places the layers knows the room


REMOTE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_asked_for(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    folder, marker = tmp_path / "own", tmp_path / "marker"
    shutil.copytree(folders["anti"], folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "own-llama",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    one = System(base=spec(folder))
    with pytest.raises(UserError, match="cannot load the model") as caught:
        Models(one).get("base")
    assert not marker.exists() and "\n" not in str(caught.value)
    trusted = one.model_copy(update={"base": one.base.model_copy(update={"trust_remote_code": True})})
    for models in (Models(trusted), Models(one, trust_remote_code=True)):
        assert type(models.get("base").module).__name__ == "OwnModel"
    assert marker.exists()
    assert tokens(Decoder(models, "base")) == tokens(Decoder(Models(system(folders)), "antiexpert"))


def test_own_code_of_a_known_family_is_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint of a family that transformers has brings code along: transformers' own is used."""
    folder, marker = tmp_path / "own", tmp_path / "marker"
    shutil.copytree(folders["anti"], folder)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    assert type(Models(System(base=spec(folder))).get("base").module).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_demo_models_are_known_by_name() -> None:
    with pytest.raises(UserError, match=r"no demo model 'demo://nobody'.*make demo-models"):
        Models(System(base=ModelSpec(model="demo://nobody"))).get("base")


def test_models_load_once_and_are_announced(folders: dict[str, Path]) -> None:
    heard: list[str] = []
    models = Models(system(folders, on_anti(folders, "lora")), on_load=lambda name, spec: heard.append(name))
    for _ in range(2):
        for role in reversed(ROLES):
            Decoder(models, role)
    assert sorted(heard) == ["antiexpert", "base", "expert"]
    models.release(keep=["base"])
    with pytest.raises(UserError, match="has no tuned"):
        models.spec("tuned")
    Decoder(models, "proxy")
    assert len(heard) == 5
