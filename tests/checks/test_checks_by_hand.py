"""What a check adds up and says of memory, machine and places, on records made by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune import cpu_load
from proxytune.api_spec import ApiSpec
from proxytune.checks import machine as machine_checks
from proxytune.checks import roles as roles_checks
from proxytune.checks import system as system_checks
from proxytune.checks.findings import Finding, MachineCheck, MemoryCheck, RoleCheck, SystemCheck
from proxytune.checks.roles import Findings, _words
from proxytune.config import ModelSpec, System
from proxytune.cpu_load import CpuLoad
from proxytune.errors import UserError
from proxytune.sandbox import Sandbox

MODEL, SMALL = ModelSpec(model="m"), ModelSpec(model="s")


def role(name: str, **known: Any) -> RoleCheck:
    """What is known of a role."""
    return RoleCheck(name=name, model="m", **known)


def models(**specs: ModelSpec) -> Any:
    """Models by their names."""
    return SimpleNamespace(spec=specs.__getitem__, terms=lambda: [("expert", "antiexpert", 1.0)])


def said(findings: Findings) -> list[tuple[str, str, str]]:
    """Findings as plain texts."""
    return [(one.level, one.about, one.text) for one in findings.found]


# Memory


def test_the_memory_of_what_decodes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model is alone; an adapter adds its own bytes; shared weights count once."""
    asked: list[str | None] = []

    def free(where: str | None) -> int:
        asked.append(where)
        return 1000

    monkeypatch.setattr(system_checks, "free_memory", free)
    known = models(
        base=MODEL, expert=ModelSpec(adapter="a"), antiexpert=SMALL, tuned=MODEL, expert2=SMALL, other=MODEL
    )
    base, anti = role("base", weights=100, kv_per_token=5), role("antiexpert", weights=50, kv_per_token=3)
    roles = [
        base, role("expert", weights=7, kv_per_token=3, shared_with="antiexpert"), anti,
        role("expert2", weights=50, kv_per_token=2, shared_with="antiexpert"), role("other"),
        role("tuned", weights=300, kv_per_token=11),
    ]  # fmt: skip
    found = system_checks._memory(known, roles)
    assert found == MemoryCheck(
        weights={"base": 100, "expert": 7, "antiexpert": 50, "tuned": 300}, total=157, kv_per_token=13,
        sequences=32, length=1024, kv_batch=32 * 1024 * 13, free=1000,
    )  # fmt: skip
    alone = system_checks._memory(known, roles[-1:])
    assert (alone.total, alone.kv_per_token) == (300, 11)
    spread = models(base=ModelSpec(model="m", device_map="auto"), antiexpert=SMALL)
    system_checks._memory(spread, [base, anti])
    system_checks._memory(models(base=ModelSpec(model="m", device_map="cpu")), [base])
    assert asked == [None, None, "auto", None]


def judged(free: int, *, weights: bool) -> list[tuple[str, str, str]]:
    """What is said where two GB of weights, and 1000 bytes per token, find so much memory."""
    findings = Findings()
    memory = MemoryCheck(
        weights={},
        total=2 * 10**9,
        kv_per_token=1000,
        sequences=32,
        length=1024,
        kv_batch=32_768_000,
        free=free,
    )
    system_checks._judge_memory(memory, findings, weights=weights)
    return said(findings)


def test_whether_memory_is_enough() -> None:
    assert judged(2 * 10**9 + 32_768_000, weights=True) == []
    room = "2.0 GB of weights leave room for the KV of {} sequences of 1024 tokens; more take turns"
    assert judged(2 * 10**9 + 32_767_999, weights=True) == [("note", "memory", room.format(31))]
    assert judged(2 * 10**9 + 2 * 1_024_000, weights=False) == [("note", "memory", room.format(2))]
    assert judged(2 * 10**9, weights=True) == [("note", "memory", room.format(0))]
    text = "2.0 GB of weights do not fit into the 2.0 GB that are free here"
    assert judged(2 * 10**9 - 1, weights=True) == [("problem", "memory", text)]
    assert judged(2 * 10**9 - 1, weights=False) == [("note", "memory", text)]


def test_which_roles_hold_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 7)
    known = models(
        base=MODEL, expert=ModelSpec(adapter=str(tmp_path)), antiexpert=SMALL, tuned=MODEL,
        half=ModelSpec(model="m", dtype="float16"), old=ModelSpec(model="m", revision="r"),
        packed=ModelSpec(model="m", quantization="int8"), there=ModelSpec(model="m", device_map="cpu"),
        tuned2=ModelSpec(model="m", adapter="a"), chat=ModelSpec(model="m", chat="llama2"),
    )  # fmt: skip
    names = ["base", "expert", "antiexpert", "tuned", "half", "old", "packed", "there", "tuned2", "chat"]
    found = system_checks._shared(known, [role(name) for name in names])
    assert {one.name: one.shared_with for one in found if one.shared_with} == {
        "expert": "antiexpert", "tuned": "base", "chat": "base",
    }  # fmt: skip
    assert [one.weights for one in found[:2]] == [None, 7]
    nothing = models(expert=ModelSpec(adapter="nowhere"))
    assert system_checks._shared(nothing, [role("expert")])[0].weights == 0


# Places and speculation


@pytest.mark.parametrize(
    ("world", "over", "each"),
    [(1, "the processes of torchrun", ""), (4, "4 processes", ", about 0.50 GB each")],
)
def test_what_is_split_goes_where(world: int, over: str, each: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_checks, "world", lambda: world)
    split = ModelSpec(model="m", device_map="tensor")
    roles = [role("base", weights=2 * 10**9), role("expert", weights=10**9), role("antiexpert")]
    findings = Findings()
    system_checks._note_places(models(base=split, expert=SMALL, antiexpert=SMALL), roles, findings)
    assert said(findings) == [
        ("note", "base", f"every layer is split over {over}: 2.00 GB of weights together{each}"),
        ("note", "expert", "whole in every process: 1.00 GB of weights each"),
        ("note", "antiexpert", "whole in every process: its weights each"),
    ]
    none = Findings()
    system_checks._note_places(models(base=MODEL, expert=SMALL, antiexpert=SMALL), roles, none)
    assert said(none) == []


def test_whether_the_expert_can_run_ahead() -> None:
    steered = System(base=MODEL, expert=SMALL, antiexpert=SMALL)
    api = steered.model_copy(update={"base": ApiSpec(api="http://h", model="m")})
    packed, slow, unknown = (role("x", path=path) for path in ("packed", "reference", "unknown"))
    tuned = role("tuned", path="reference")
    for system, roles, says in [
        (System(base=MODEL), [packed], "no: the system is not steered"),
        (api, [packed], "no: the base is behind an API"),
        (steered, [packed, packed, tuned], "yes"),
        (steered, [packed, slow, unknown], "no: the state of x cannot be rewound"),
        (steered, [slow, slow.model_copy(update={"name": "y"})], "no: the state of x, y cannot be rewound"),
        (steered, [packed, unknown], "not known"),
    ]:
        assert system_checks._speculation(system, roles) == says


def test_the_order_in_which_models_are_looked_at() -> None:
    names = ["tuned", "expert2", "antiexpert2", "expert", "antiexpert", "base"]
    assert sorted(names, key=system_checks._hosts_first) == [
        "base", "antiexpert2", "antiexpert", "expert2", "expert", "tuned",
    ]  # fmt: skip
    known: Any = None
    bare = System(base=MODEL, expert=SMALL)
    assert system_checks._alone(known, bare) == ["base", "expert"]
    api = System(base=ApiSpec(api="http://h", model="m"), antiexpert=SMALL)
    assert system_checks._alone(known, api) == ["antiexpert"]


def test_what_is_said_of_a_base_behind_an_api() -> None:
    for route, can in (("completions", "generate and deferral"), ("chat", "no free generation as proxy")):
        spec = ApiSpec.model_validate({"api": "http://h", "model": "m", "route": route, "top_logprobs": 7})
        said = system_checks._behind_an_api(spec)
        assert said.startswith(f"it is behind an API (m at http://h, {route}, 7 tokens of a position): ")
        assert f"multiple choice, {can};" in said


# Findings


def test_findings_are_kept_once_and_hide_nothing() -> None:
    findings = Findings()

    def fails() -> None:
        raise UserError("lost")

    assert findings.attempt("base", lambda: 7) == 7 and findings.attempt("base", fails) is None
    assert findings.attempt("expert", fails) is None
    findings.note("expert", "lost")
    findings.note("expert", "lost")
    findings.problem("tuned", "other")
    assert said(findings) == [
        ("problem", "base", "lost"), ("note", "expert", "lost"), ("note", "expert", "lost"),
        ("problem", "tuned", "other"),
    ]  # fmt: skip
    machine = MachineCheck(device="CPU", cores=1, threads=1, load=0, compiler=None, sandbox=None)
    memory = MemoryCheck(weights={}, total=0, kv_per_token=0, sequences=1, length=1, kv_batch=0, free=0)
    check = SystemCheck(
        system="s",
        with_weights=True,
        speculation="yes",
        vocabulary={},
        roles=(),
        memory=memory,
        machine=machine,
        findings=tuple(findings.found),
    )
    assert [one.about for one in check.problems] == ["base", "tuned"]


def test_the_words_of_a_tokenizer() -> None:
    tokenizer: Any = SimpleNamespace(
        bos_token_id=0, bos_token="<s>", eos_token_id=2, eos_token="</s>", pad_token_id=None, pad_token=None,
        get_vocab=lambda: {"a": 5, "b": 6, "c": 7},
    )  # fmt: skip
    assert _words(tokenizer) == {"tokens": 3, "special": {"bos": ("<s>", 0), "eos": ("</s>", 2), "pad": None}}


@pytest.mark.parametrize(
    ("name", "chat", "forms"),
    [
        ("base", "llama2", ["direct"]), ("tuned", "llama2", ["direct"]), ("antiexpert", "llama2", ["direct"]),
        ("expert", "llama2", ["direct", "in_ensemble"]), ("expert2", "tokenizer", ["direct", "in_ensemble"]),
        ("expert", "none", ["direct"]), ("tuned", "none", ["direct"]), ("base", "none", ["direct"]),
    ],
)  # fmt: skip
def test_what_a_role_sees_of_a_prompt(
    name: str, chat: Any, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every form that it has; what it may not answer, and a template that is not used, are noted."""
    ends = "its context ends in an end-of-sequence token: it may have nothing to say after it"
    plain = "its tokenizer has a chat template, and `chat: none` sends it plain prompts"
    for last, template in ((2, None), (7, "t"), (7, None)):
        monkeypatch.setattr(
            roles_checks,
            "sample_context",
            lambda spec, words, role, form, at=last: (f"{role} {form}", (1, at)),
        )
        words: Any = SimpleNamespace(
            eos_token_id=2, chat_template=template, convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids]
        )
        findings = Findings()
        shown = roles_checks._contexts(ModelSpec(model="m", chat=chat), words, name, findings)
        assert [(one.form, one.text, one.ids, one.tokens) for one in shown] == [
            (form, f"{name} {form}", (1, last), ("t1", f"t{last}")) for form in forms
        ]
        unused = template is not None and chat == "none" and name != "base"  # which is asked plainly
        assert said(findings) == [("note", name, ends)] * (last == 2) + [("note", name, plain)] * unused


# The machine


def test_what_a_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(choice: str) -> Any:
        raise UserError(f"none of {choice}")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu_load, "read", lambda: CpuLoad(2, 0.0, 1.236, 4))
    monkeypatch.setattr(machine_checks, "why_not", lambda: "no compiler")
    monkeypatch.setattr(Sandbox, "open", refuse)
    found, notes = machine_checks.check_machine()
    assert found == MachineCheck(
        device="CPU", cores=2, threads=3, load=1.24, compiler="no compiler", sandbox=None
    )
    assert notes == [
        Finding(level="note", about="machine", text=text)
        for text in (
            "3 threads share 2 cores and wait for each other: --threads 2 is faster",
            "attention on the CPU goes through torch, which is slower: no compiler",
            "code that a model wrote cannot be run: none of auto",
        )
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"gpu {number}")
    monkeypatch.setattr(Sandbox, "open", lambda choice: SimpleNamespace(backend="bubblewrap"))
    found, notes = machine_checks.check_machine()
    assert (found.device, found.sandbox, found.compiler, notes) == (
        "gpu 0, gpu 1",
        "bubblewrap",
        "no compiler",
        [],
    )
