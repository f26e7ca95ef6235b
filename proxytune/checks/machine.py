"""The machine on which a system would run: device, cores against load, compiler, sandbox, free memory."""

from __future__ import annotations

import torch

from proxytune import cpu_load
from proxytune.checks.findings import Finding, MachineCheck
from proxytune.engine.kernels import why_not
from proxytune.errors import UserError
from proxytune.sandbox import Sandbox


def check_machine() -> tuple[MachineCheck, list[Finding]]:
    """The machine, and what of it will slow a run down."""
    notes: list[str] = []
    cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if cuda else 0
    device = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "CPU"
    threads, load = torch.get_num_threads(), cpu_load.read()
    if not cuda and (advice := cpu_load.advice(threads, load)) is not None:
        notes.append(advice)
    compiler = why_not()
    if compiler is not None and not cuda:
        notes.append(f"attention on the CPU goes through torch, which is slower: {compiler}")
    try:
        sandbox: str | None = Sandbox.open("auto").backend
    except UserError as error:
        sandbox = None
        notes.append(f"code that a model wrote cannot be run: {error}")
    found = MachineCheck(
        device=device,
        cores=load.cores,
        threads=threads,
        load=round(load.runnable, 2),
        compiler=compiler,
        sandbox=sandbox,
    )
    return found, [Finding(level="note", about="machine", text=text) for text in notes]
