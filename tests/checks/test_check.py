"""`proxytune check`: systems, good and bad. Every problem is among the findings, and hides no other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxytune.checks import SystemCheck, check_system
from proxytune.config import ModelSpec, System, load_system
from proxytune.provenance import provenance
from proxytune.training_record import TrainingRecord, TuningRequest
from tests.support import adapters, tiny
from tests.support.command_line import proxytune
from tests.support.memory import leave_free
from tests.support.require import require_demo
from tests.support.tiny import spec

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def trio(root: Path) -> System:
    return tiny.trio_of(root)


def an_adapter(root: Path) -> System:
    folders = adapters.save_all(root)
    expert = ModelSpec(adapter=str(folders["lora"]))
    return System(base=spec(folders["base"]), antiexpert=spec(folders["anti"]), expert=expert)


def a_slow_base(root: Path) -> System:
    base = tiny.save(root / "slow", tiny.build("bloom", 1))
    return trio(root).model_copy(update={"base": spec(base)})


def padded_heads(root: Path) -> System:
    return tiny.trio_of(root, (259, 272, 264))


def one_model_thrice(root: Path) -> System:
    folder = tiny.save(root / "model", tiny.build("llama", 1), tiny.tokenizer(TEMPLATE))
    return System(base=spec(folder), antiexpert=spec(folder), expert=spec(folder, "tokenizer"))


def swapped(root: Path) -> System:
    return tiny.trio_of(root, expert=tiny.tokenizer(swapped=("a", "b")))


def swapped_but_intersected(root: Path) -> System:
    return swapped(root).model_copy(update={"vocab": "intersect"})


def a_broken_template(root: Path) -> System:
    system = tiny.trio_of(root, expert=tiny.tokenizer("{% for"))
    return system.model_copy(update={"expert": system.expert.model_copy(update={"chat": "tokenizer"})})  # type: ignore[union-attr]


def no_tokenizer(root: Path) -> System:
    system = trio(root)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "antiexpert" / name).unlink()
    return system


def cut_weights(root: Path) -> System:
    system = trio(root)
    path = root / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return system


def a_million_layers(root: Path) -> System:
    system = trio(root)
    path = root / "expert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**6}))
    return system


def an_absent_folder(root: Path) -> System:
    system = trio(root)
    shutil.rmtree(root / "expert")
    return system


def two_faults(root: Path) -> System:
    (root / "faults").mkdir()
    system = no_tokenizer(root)
    shutil.rmtree(root / "expert")
    return system


@dataclass(frozen=True)
class Case:
    """A system, and what is to be found."""

    make: Callable[[Path], System]
    problems: tuple[str, ...] = ()
    note: str = ""
    speculation: str = "yes"


CASES = (
    Case(trio),
    Case(an_adapter),
    Case(one_model_thrice),
    Case(
        a_slow_base,
        note="one row at a time: it does not use transformers'",
        speculation="no: the state of base",
    ),
    Case(padded_heads),
    Case(swapped_but_intersected, note="2 ids of the expert are matched by token"),
    Case(swapped, (r"base and the expert differ at 2 of 259 ids \(\d+: '[ab]' is '[ab]' there",)),
    Case(a_broken_template, ("the expert: the chat template .* fails on a sample prompt",)),
    Case(no_tokenizer, ("cannot load the tokenizer",)),
    Case(cut_weights, ("model.safetensors is damaged or cut",), speculation="not known"),
    Case(a_million_layers, ("num_hidden_layers in config.json is 1000000",), speculation="not known"),
    Case(an_absent_folder, ("no model folder",), speculation="not known"),
    Case(two_faults, ("no model folder", "cannot load the tokenizer"), speculation="not known"),
)


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
@pytest.mark.every(3)
def test_systems_good_and_bad(case: Case, weights: bool, tmp_path: Path) -> None:
    system = case.make(tmp_path)
    found = check_system(system, weights=weights)
    texts = sorted(problem.text for problem in found.problems)
    assert len(texts) == len(case.problems), texts
    for says in case.problems:
        assert any(re.search(says, text) for text in texts), texts
    assert all("\n" not in finding.text for finding in found.findings)
    assert case.note in " ".join(finding.text for finding in found.findings if finding.level == "note")
    assert found.speculation.startswith(case.speculation)
    assert [role.name for role in found.roles] == ["base", "expert", "antiexpert"]
    if not case.problems:
        assert {role.examined for role in found.roles} == {"weights" if weights else "copy"}
    assert SystemCheck.model_validate_json(found.model_dump_json()) == found


def test_a_slow_tuned_model_is_no_hindrance_to_speculation(tmp_path: Path) -> None:
    """It decodes alone, and has no part in the proxy."""
    slow = tiny.save(tmp_path / "slow", tiny.build("bloom", 1))
    found = check_system(trio(tmp_path).model_copy(update={"tuned": spec(slow)}), weights=False)
    assert [role.path for role in found.roles] == ["packed"] * 3 + ["reference"]
    assert found.speculation == "yes"


def test_what_is_known_of_a_sound_system(tmp_path: Path) -> None:
    system = one_model_thrice(tmp_path)
    found = check_system(system)
    base, expert, antiexpert = found.roles
    assert (base.path, base.tokens, base.head, base.window) == ("packed", 259, 259, 256)
    assert base.special == {"bos": ("<s>", 1), "eos": ("</s>", 2), "pad": ("<pad>", 0)}
    assert [shown.form for shown in expert.contexts] == ["direct", "in_ensemble"]
    assert expert.contexts[0].text == "<s><user>What is 2 + 3?<assistant>"
    assert expert.contexts[0].ids.count(1) == 1 and expert.contexts[0].tokens[0] == "<s>"
    assert base.contexts[0].text == "Question: What is 2 + 3?\nAnswer:" and base.contexts[0].ids[0] == 1
    assert expert.shared_with == antiexpert.shared_with == "base"
    assert found.memory.weights == {"base": base.weights} and found.memory.total == 8 * (base.parameters or 0)
    assert (
        found.memory.kv_per_token == 3 * 2 * 2 * 2 * 8 * 8
    )  # roles, layers, heads, key and value, size, bytes
    assert found.memory.kv_batch == found.memory.kv_per_token * 32 * 1024
    assert set(found.vocabulary.values()) == {"the same"}
    assert found.machine.cores >= 1 and found.machine.threads >= 1


def test_an_adapter_adds_its_own_bytes_to_the_antiexperts(tmp_path: Path) -> None:
    found = check_system(an_adapter(tmp_path))
    expert = found.roles[1]
    assert expert.shared_with == "antiexpert" and expert.path == "packed"
    assert 0 < found.memory.weights["expert"] < found.memory.weights["antiexpert"]
    assert found.memory.total == sum(found.memory.weights.values())


def test_padding_is_said(tmp_path: Path) -> None:
    found = check_system(padded_heads(tmp_path), weights=False)
    assert set(found.vocabulary.values()) == {"the same but for padding"}


def test_what_does_not_fit_is_a_problem_here_and_a_note_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = trio(tmp_path)
    need = check_system(system, weights=False).memory.total
    leave_free(monkeypatch, need - 1)
    elsewhere = check_system(system, weights=False)
    assert not elsewhere.problems and "do not fit" in " ".join(f.text for f in elsewhere.findings)
    assert "do not fit" in " ".join(problem.text for problem in check_system(system).problems)
    leave_free(monkeypatch, need + 1024 * elsewhere.memory.kv_per_token)
    assert "room for the KV of 1 sequences" in " ".join(
        finding.text for finding in check_system(system, weights=False).findings
    )


def test_no_weights_needs_no_file_of_weights(tmp_path: Path) -> None:
    system = trio(tmp_path)
    whole = check_system(system, weights=False)
    for name in ("base", "expert", "antiexpert"):
        (tmp_path / name / "model.safetensors").unlink()
    bare = check_system(system, weights=False)
    assert not bare.problems and bare.roles == whole.roles
    assert "no file named model.safetensors" in check_system(system).problems[0].text


def test_an_eos_that_the_base_lacks_is_said_where_vocabularies_intersect(tmp_path: Path) -> None:
    other = tiny.tokenizer(swapped=("</s>", "b"))
    other.eos_token = "<end>"
    system = tiny.trio_of(tmp_path, (259, 260, 259), expert=other).model_copy(update={"vocab": "intersect"})
    notes = " ".join(finding.text for finding in check_system(system, weights=False).findings)
    said = "the base has no '<end>', with which the expert ends its responses: "
    assert said + "the base's '</s>' stands for it" in notes
    base = tiny.tokenizer()
    base.eos_token = None
    system = tiny.trio_of(tmp_path / "none", (259, 260, 259), base=base, expert=other)
    found = check_system(system.model_copy(update={"vocab": "intersect"}), weights=False).findings
    assert said + "only the base can end one" in " ".join(finding.text for finding in found)


def test_what_an_expert_was_tuned_to_say_and_the_base_has_not_is_counted(tmp_path: Path) -> None:
    """`proxytune tune` stores how often each token is learned."""
    other = tiny.tokenizer(swapped=("</s>", "b"))
    other.eos_token = "<end>"  # which the base's end stands for
    other.add_tokens(["<call>"], special_tokens=True)
    system = tiny.trio_of(tmp_path, (259, 261, 259), expert=other).model_copy(update={"vocab": "intersect"})
    assert system.expert is not None
    record = TrainingRecord(
        status="finished",
        request=TuningRequest(method="full", model="m", settings={}, data_sha256=""),
        result="weights",
        antiexpert=ModelSpec(model="m"),
        examples=1,
        tokens=10,
        learned={"a": 3, "<end>": 3, "<call>": 2},
        parameters=1,
        trainable=1,
        estimated_bytes=0,
        provenance=provenance("0", "cpu", 1),
    )
    record.write(Path(str(system.expert.model)))
    notes = " ".join(finding.text for finding in check_system(system, weights=False).findings)
    assert "25.0% of the tokens that the expert was tuned to say are not in the base's vocabulary" in notes
    assert "'<call>' most" in notes


# The command


def test_the_command_prints_everything_and_ends_with_the_first_problem(tmp_path: Path) -> None:
    system = two_faults(tmp_path)
    path = tmp_path / "system.yaml"
    roles = ("base", "expert", "antiexpert")
    lines = [f"{role}: {{model: {getattr(system, role).model}, dtype: float64}}\n" for role in roles]
    path.write_text("".join(lines))
    shown = proxytune("check", path, "--no-weights")
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ") and len(shown.stderr.splitlines()) == 1
    assert "(and 1 more, above)" in shown.stderr
    for part in (
        "LlamaForCausalLM",
        "packed",
        "KV cache",
        "sandbox",
        "problem     antiexpert",
        "problem     expert",
    ):
        assert part in shown.stdout
    read = proxytune("check", path, "--no-weights", "--json")
    assert read.exit_code == 2 and json.loads(read.stdout)["ok"] is False
    assert len([f for f in json.loads(read.stdout)["findings"] if f["level"] == "problem"]) == 2


def test_the_demo_is_sound() -> None:
    require_demo()
    shown = proxytune("check", "demo", "--json")
    content = json.loads(shown.stdout)
    assert shown.exit_code == 0 and content["ok"] is True and content["speculation"] == "yes"
    assert [role["path"] for role in content["roles"]] == ["packed"] * 4
    assert "no problem found" in proxytune("check", "demo-mid", "--no-weights").stdout
    assert not check_system(load_system("demo"), weights=False).problems


def test_an_unknown_system_is_one_line() -> None:
    shown = proxytune("check", "dem")
    assert shown.exit_code == 2 and shown.stdout == "" and "Did you mean: demo" in shown.stderr
