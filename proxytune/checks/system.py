"""The check of a whole system: every role, vocabularies, memory, machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from proxytune.api_spec import ApiSpec
from proxytune.checks.findings import MemoryCheck, RoleCheck, SystemCheck
from proxytune.checks.machine import check_machine
from proxytune.checks.roles import Findings, check_role
from proxytune.config import System
from proxytune.models import Models, free_memory
from proxytune.processes import TENSOR, world
from proxytune.training_record import read_training

SEQUENCES, LENGTH = 32, 1024
"""A typical batch."""


def check_system(system: System, *, weights: bool = True, trust_remote_code: bool = False) -> SystemCheck:
    """Look at every role of a system. With `weights`, one model after the other is loaded and examined;
    without, only configurations and tokenizers are read, and paths are found out on small copies.

    Never a UserError: what is wrong is among the findings."""
    models, findings = Models(system, trust_remote_code=trust_remote_code), Findings()
    names = models.names("proxy") if "proxy" in system.roles else _alone(models, system)
    names += ["tuned"] if system.tuned is not None else []
    looked: dict[str, RoleCheck] = {}
    for name in sorted(names, key=_hosts_first):
        if models.spec(name).model is not None:  # an adapter sits on the one before
            models.release(keep=[])
        alone = models.spec(name).device_map == TENSOR and world() == 1  # its parts are with others
        looked[name] = check_role(models, name, findings, weights=weights and not alone)
    models.release(keep=[])
    roles = _shared(models, [looked[name] for name in names])
    vocabulary = _vocabularies(models, roles, findings)
    memory = _memory(models, roles)
    _note_places(models, roles, findings)
    _judge_memory(memory, findings, weights=weights)
    if system.endpoint is not None:
        findings.note("base", _behind_an_api(system.endpoint))
    machine, notes = check_machine()
    return SystemCheck(
        system=system.name,
        with_weights=weights,
        speculation=_speculation(system, roles),
        vocabulary=vocabulary,
        roles=tuple(roles),
        memory=memory,
        machine=machine,
        findings=(*findings.found, *notes),
    )


def _behind_an_api(spec: ApiSpec) -> str:
    """What can be done with a base of which only the most probable tokens are seen."""
    generate = "generate and deferral" if spec.route == "completions" else "no free generation as proxy"
    return (
        f"it is behind an API ({spec}, {spec.route}, {spec.top_logprobs} tokens of a position): multiple "
        f"choice, {generate}; eval, sweep-alpha and generate work with it, and what needs weights or whole "
        "distributions does not (docs/black-box.md)"
    )


def _hosts_first(name: str) -> tuple[bool, bool, bool]:
    """The base first, and antiexperts before the experts that may sit on them."""
    return name != "base", name == "tuned", not name.startswith("antiexpert")


def _alone(models: Models, system: System) -> list[str]:
    """The models of a system that is not steered."""
    here = [name for name in ("base", "expert", "antiexpert") if name in system.roles]
    return [name for name in here if name != "base" or system.endpoint is None]


def _shared(models: Models, roles: Sequence[RoleCheck]) -> list[RoleCheck]:
    """The roles, with those marked whose weights another holds already."""
    first: dict[tuple[object, ...], str] = {}
    found = []
    for role in roles:
        spec = models.spec(role.name)
        if spec.model is None:
            host = next(anti for expert, anti, _ in models.terms() if expert == role.name)
            weights = Path(spec.adapter or "") / "adapter_model.safetensors"
            own = weights.stat().st_size if weights.is_file() else 0
            found.append(role.model_copy(update={"shared_with": host, "weights": own}))
            continue
        key = spec.model, spec.adapter, spec.revision, spec.dtype, spec.quantization, str(spec.device_map)
        holder = first.setdefault(key, role.name)
        found.append(role.model_copy(update={"shared_with": None if holder == role.name else holder}))
    return found


def _vocabularies(models: Models, roles: Sequence[RoleCheck], findings: Findings) -> dict[str, str]:
    """How every vocabulary stands to the base's."""
    found: dict[str, str] = {}
    first = roles[0].name if roles else ""
    for role in roles[1:]:
        if role.tokens is None or role.head is None or roles[0].tokens is None or roles[0].head is None:
            found[role.name] = "not known"
            continue
        differs = findings.attempt("vocabulary", partial(models.difference, role.name, first))
        if differs is None:
            found[role.name] = "the same" if role.head == roles[0].head else "the same but for padding"
            continue
        found[role.name] = f"{len(differs.ids)} of {differs.of} ids differ"
        if models.system.vocab == "strict":
            findings.problem("vocabulary", str(differs))
            continue
        ids = ", ".join(f"{i} ({token!r}, {other!r} there)" for i, token, other in differs.first)
        findings.note(
            "vocabulary",
            f"{len(differs.ids)} ids of the {role.name} are matched by token, or left to the base: {ids}",
        )
        eos = role.special.get("eos")
        if eos is not None and eos[0] not in models.tokenizer(first).get_vocab():
            own = models.tokenizer(first).eos_token
            means = "only the base can end one" if own is None else f"the base's {own!r} stands for it"
            findings.note(
                "vocabulary",
                f"the base has no {eos[0]!r}, with which the {role.name} ends its responses: {means}",
            )
        _judge_tuned_text(models, role.name, findings)
    return found


def _judge_tuned_text(models: Models, name: str, findings: Findings) -> None:
    """How much of what an expert was tuned to say it cannot say: tokens that the base does not have have no
    logit there. Known of experts that `proxytune tune` made."""
    spec = models.spec(name)
    folder = Path(spec.adapter or spec.model or "").expanduser()
    record = findings.attempt("vocabulary", partial(read_training, folder))
    if record is None or not record.learned:
        return
    known = models.known_to_the_base(name)
    lost = {token: count for token, count in record.learned.items() if token not in known}
    share = sum(lost.values()) / sum(record.learned.values())
    first = ", ".join(repr(token) for token in list(lost)[:5])
    findings.note(
        "vocabulary",
        f"{share:.1%} of the tokens that the {name} was tuned to say are not in the base's vocabulary, so "
        f"that it cannot steer towards them{f': {first} most' if lost else ''}",
    )


def _memory(models: Models, roles: Sequence[RoleCheck]) -> MemoryCheck:
    own = {
        role.name: role.weights
        for role in roles
        if role.weights is not None and (role.shared_with is None or models.spec(role.name).model is None)
    }
    together = [role for role in roles if role.name != "tuned" or len(roles) == 1]
    total = sum(own.get(role.name, 0) for role in together)
    per_token = sum(role.kv_per_token or 0 for role in together)
    anywhere = any(models.spec(role.name).device_map == "auto" for role in roles)
    return MemoryCheck(
        weights=own,
        total=total,
        kv_per_token=per_token,
        sequences=SEQUENCES,
        length=LENGTH,
        kv_batch=SEQUENCES * LENGTH * per_token,
        free=free_memory("auto" if anywhere else None),
    )


def _note_places(models: Models, roles: Sequence[RoleCheck], findings: Findings) -> None:
    """What goes where, in a system of which a model is split over processes."""
    split = {role.name for role in roles if models.spec(role.name).device_map == TENSOR}
    count = world() if world() > 1 else None
    for role in roles if split else ():
        size = "its weights" if role.weights is None else f"{role.weights / 1e9:.2f} GB of weights"
        if role.name not in split:
            findings.note(role.name, f"whole in every process: {size} each")
            continue
        over = f"{count} processes" if count else "the processes of torchrun"
        part = f", about {role.weights / count / 1e9:.2f} GB each" if count and role.weights else ""
        findings.note(role.name, f"every layer is split over {over}: {size} together{part}")


def _judge_memory(memory: MemoryCheck, findings: Findings, *, weights: bool) -> None:
    """Whether the weights, and a typical batch beside them, fit into what is free here."""
    sizes = f"{memory.total / 1e9:.1f} GB of weights"
    if memory.total > memory.free:
        text = f"{sizes} do not fit into the {memory.free / 1e9:.1f} GB that are free here"
        (findings.problem if weights else findings.note)("memory", text)
    elif memory.total + memory.kv_batch > memory.free:
        rows = max(0, memory.free - memory.total) // max(1, memory.kv_per_token * LENGTH)
        findings.note(
            "memory",
            f"{sizes} leave room for the KV of {rows} sequences of {LENGTH} tokens; more take turns",
        )


def _speculation(system: System, roles: Sequence[RoleCheck]) -> str:
    """Whether the expert can run ahead: every model that verifies must be able to go back."""
    if "proxy" not in system.roles:
        return "no: the system is not steered"
    if system.endpoint is not None:
        return "no: the base is behind an API"
    together = [role for role in roles if role.name != "tuned"]
    slow = [role.name for role in together if role.path == "reference"]
    if slow:
        return f"no: the state of {', '.join(slow)} cannot be rewound"
    return "yes" if all(role.path == "packed" for role in together) else "not known"
