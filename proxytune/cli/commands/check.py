"""`proxytune check`: what a system is and whether it would run, before any hour of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.cli import console
from proxytune.cli.options import Json, RemoteCode, SystemArgument, Vocab
from proxytune.errors import UserError

if TYPE_CHECKING:
    from proxytune.api_spec import ApiSpec
    from proxytune.checks import Finding, RoleCheck, SystemCheck


def check(
    system: SystemArgument,
    *,
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    no_weights: Annotated[
        bool,
        typer.Option(
            "--no-weights",
            help="Read configurations and tokenizers only. Which path a model takes is then found out on a "
            "small copy with fresh weights.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Check a system before it runs: models and their paths, vocabularies, chat templates, memory, machine.

    Prints everything that was found. Exit code 2, with the first problem as the last line, where something
    keeps the system from running. A base behind an API is sent two requests of one token, unless --no-weights
    is given.

    Example: proxytune check demo --no-weights
    """
    made = console.read_system(system, vocab)

    from proxytune.checks import check_system

    found = check_system(made, weights=not no_weights, trust_remote_code=trust_remote_code)
    if made.endpoint is not None and not no_weights:
        found = found.model_copy(update={"findings": (*found.findings, *_probed(made.endpoint))})
    if json:
        console.print_json({**found.model_dump(mode="json"), "ok": not found.problems})
    else:
        _print(found)
    if found.problems:
        first, more = found.problems[0], len(found.problems) - 1
        raise UserError(f"{first.text}{f' (and {more} more, above)' if more else ''}")


def _probed(spec: ApiSpec) -> list[Finding]:
    """What the endpoint of the base can do: a problem where the route that the system names does not work."""
    from proxytune.black_box import ApiClient, probe
    from proxytune.checks import Finding

    findings = []
    for one in probe(ApiClient(spec)):
        needed = one.route == spec.route and not one.works
        text = f"/{'chat/' * (one.route == 'chat')}completions: {one.text}"
        findings.append(Finding(level="problem" if needed else "note", about="base", text=text))
    return findings


def _print(found: SystemCheck) -> None:
    """Everything, in tables."""
    _print_models(found)
    _print_words(found)
    for role in found.roles:
        for shown in role.contexts:
            form = "" if len(role.contexts) == 1 else f", {shown.form}"
            ends = ", ".join(f"{shown.tokens[at]!r} ({shown.ids[at]})" for at in (0, -1) if shown.ids)
            console.show(f"{role.name}{form}: {len(shown.ids)} tokens, first and last {ends}: {shown.text!r}")
    console.show()
    _print_memory(found)
    machine = found.machine
    busy = f"{machine.threads} threads, {machine.cores} cores, load {machine.load:g}"
    compiler = "found" if machine.compiler is None else "none"
    console.show(
        f"machine     {machine.device}; {busy}; compiler {compiler}; sandbox {machine.sandbox or 'none'}"
    )
    console.show(f"speculation {found.speculation}")
    for finding in found.findings:
        console.show(f"{finding.level:11} {finding.about}: {finding.text}")
    if not found.problems:
        console.show("no problem found")


def _print_models(found: SystemCheck) -> None:
    """The table of models: what they are, and their paths."""
    rows = [
        (
            role.name,
            role.model,
            role.kind or "?",
            "?" if role.parameters is None else _count(role.parameters),
            role.dtype if role.quantization == "none" else f"{role.dtype}, {role.quantization}",
            role.path + (" (by a small copy)" if role.examined == "copy" and role.path != "unknown" else ""),
            "unbounded" if role.window is None and role.kind else role.window or "?",
        )
        for role in found.roles
    ]
    console.print_table(("role", "model", "class", "parameters", "dtype", "path", "window"), rows)
    console.show()


def _print_words(found: SystemCheck) -> None:
    """The table of vocabularies: sizes, special tokens, how they stand to the base's."""
    rows = [
        (
            role.name,
            "?" if role.tokens is None else role.tokens,
            "?" if role.head is None else role.head,
            *(_special(role, name) for name in ("bos", "eos", "pad")),
            role.chat,
            found.vocabulary.get(role.name, ""),
        )
        for role in found.roles
    ]
    console.print_table(("role", "tokens", "head", "bos", "eos", "pad", "chat", "beside the base"), rows)
    console.show()


def _special(role: RoleCheck, name: str) -> str:
    token = role.special.get(name)
    return ("none" if role.special else "?") if token is None else f"{token[0]} ({token[1]})"


def _print_memory(found: SystemCheck) -> None:
    """Weights, KV, and what is free."""
    memory = found.memory
    parts = ", ".join(f"{name} {_size(count)}" for name, count in memory.weights.items())
    shared = [f"{role.name} shares {role.shared_with}'s" for role in found.roles if role.shared_with]
    unknown = [f"{role.name} not known" for role in found.roles if role.weights is None]
    listed = "; ".join(part for part in (parts, *shared, *unknown) if part)
    console.show(f"weights     {_size(memory.total)} of the models that decode together ({listed})")
    batch = f"{_size(memory.kv_batch)} for {memory.sequences} sequences of {memory.length} tokens"
    console.show(f"KV cache    {_size(memory.kv_per_token)} per token; {batch}")
    console.show(f"free        {_size(memory.free)}")


def _size(count: int) -> str:
    """Bytes in powers of ten."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _count(number: int) -> str:
    """A number of parameters."""
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"
