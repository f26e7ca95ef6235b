"""What every run and every training took, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proxytune.api_spec import ApiSpec
from proxytune.config import ModelSpec, System
from proxytune.records import Run
from proxytune.report import charts
from proxytune.report.charts import Figure, ReportTable, rows_of
from proxytune.report.escape import visible
from proxytune.report.tables import role_rows, size
from proxytune.training_record import TRAINING, TrainingRecord, read_training

Found = Sequence[tuple[Path, Run]]
Trained = Sequence[tuple[Path, TrainingRecord]]
LISTED = 10
"""Runs up to which their table is open."""


def cost_table(root: Path, found: Found) -> ReportTable:
    """One line per run."""
    cells = []
    for folder, run in found:
        row, cost = role_rows([run])[0], run.cost
        speed = cost.tokens_per_second if run.spec.mode == "generate" else None
        cells.append((
            str(folder.relative_to(root)), row.label,
            run.spec.alpha.text if run.spec.role == "proxy" else "", row.examples,
            row.shown, f"{cost.seconds:.1f}",
            f"{cost.prefill_seconds:.1f}", str(cost.generated_tokens),
            "" if speed is None else f"{speed:.0f}",
            "" if cost.acceptance is None else f"{cost.acceptance:.0%}",
            "" if cost.tokens_per_step is None else f"{cost.tokens_per_step:.2f}",
            size(row.memory), size(cost.process_peak) if cost.process_peak else "", str(cost.preemptions),
            str(cost.sessions),
            run.started.replace("T", " ").removesuffix("+00:00"),
        ))  # fmt: skip
    columns = (
        "folder", "as", "alpha", "examples", "score", "seconds", "prefill", "tokens", "tokens / s",
        "drafts accepted", "tokens / step", "memory", "process",
        "preemptions", "sessions", "started (UTC)",
    )  # fmt: skip
    return ReportTable(
        f"{len(found)} runs: cost and speed", columns, rows_of(cells), words=3, folded=len(found) > LISTED
    )


def systems_table(found: Found) -> ReportTable:
    """The models of every system, role by role."""
    systems = {run.spec.system.name: run.spec.system for _, run in found}
    cells = [
        (name, role, *_described(spec)) for name, system in systems.items() for role, spec in _models(system)
    ]
    columns = ("system", "role", "model", "dtype", "quantization", "prompt format")
    return ReportTable("Systems", columns, rows_of(cells), words=len(columns), folded=True)


def notes_table(root: Path, found: Found) -> tuple[ReportTable, ...]:
    """What the runs say beside their figures, where any says something."""
    cells = [
        (str(folder.relative_to(root)), run.spec.role, visible(note))
        for folder, run in found
        for note in run.notes
    ]
    if not cells:
        return ()
    columns = ("folder", "as", "note")
    return (ReportTable("Notes", columns, rows_of(cells), texts=frozenset({2}), words=len(columns)),)


def _described(spec: ModelSpec | ApiSpec) -> tuple[str, str, str, str]:
    """Model, dtype, quantization and prompt format; of an endpoint what is known of it."""
    if isinstance(spec, ApiSpec):
        return str(spec), "behind an API", f"{spec.top_logprobs} tokens visible", spec.route
    return spec.model or f"adapter {spec.adapter}", spec.dtype, spec.quantization, spec.chat


def _models(system: System) -> list[tuple[str, ModelSpec | ApiSpec]]:
    """Roles and their models."""
    experts = [("expert", spec) for spec in system.expert_specs]
    named = [("base", system.base), *experts, ("antiexpert", system.antiexpert), ("tuned", system.tuned)]
    return [(role, spec) for role, spec in named if spec is not None]


def made_table(found: Found) -> tuple[ReportTable, ...]:
    """Who computed the runs: runs of one machine, commit and set of packages share a line; then every run's
    command."""
    groups: dict[tuple[str, ...], int] = {}
    for _, run in found:
        made = run.made
        commit = "not in a checkout" if made.git_commit is None else made.git_commit[:12]
        packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
        key = (
            made.proxytune, commit, made.device, str(made.threads),
            f"Python {made.python} on {made.platform}", packages,
        )  # fmt: skip
        groups[key] = groups.get(key, 0) + 1
    columns = ("runs", "proxytune", "commit", "device", "threads", "platform", "packages")
    lines = rows_of([(str(count), *key) for key, count in groups.items()])
    commands = rows_of([
        (
            run.made.command, run.spec.task, run.spec.role, run.spec.data, run.spec.data_sha256[:12],
            str(run.spec.sampling.seed),
        )
        for _, run in found
    ])  # fmt: skip
    named = ("command", "task", "as", "data", "sha256 of the items", "seed")
    return (
        ReportTable("Provenance", columns, lines, words=len(columns), folded=True),
        ReportTable("Commands", named, commands, words=len(named), folded=True),
    )


# Trainings


def find_trainings(root: Path) -> list[tuple[Path, TrainingRecord]]:
    """Every finished training under `root` with its folder. UserError where one is damaged."""
    found = ((path.parent, read_training(path.parent)) for path in sorted(root.rglob(TRAINING)))
    return [(folder, one) for folder, one in found if one is not None and one.status == "finished"]


def loss_figure(folder: Path, record: TrainingRecord) -> Figure:
    """The loss against the step, and that of held-out examples."""
    x, y = charts.axis("step", "step"), charts.axis("loss", "loss, nats per learned token", zero=False)
    learned = [{"step": p.step, "loss": p.loss} for p in record.curve if p.loss is not None]
    held: list[charts.Datum] = [
        {"step": p.step, "loss": p.held_out, "label": f"held out, step {p.step}: {p.held_out:.4f}"}
        for p in record.curve
        if p.held_out is not None
    ]
    layers = [charts.line(learned, x, y, "expert")]
    if held:
        layers += [charts.line(held, x, y, "proxy", dashed=True), charts.points(held, x, y, "proxy")]
    cells = [
        (
            str(p.step),
            *("" if v is None else f"{v:.4f}" for v in (p.loss, p.held_out)),
            f"{p.learning_rate or 0:.2e}",
        )
        for p in record.curve
    ]
    columns = ("step", "loss", "held out", "learning rate")
    name = visible(folder.name)
    return Figure(
        name=f"loss-{name}", title=f"{name}: loss of {record.request.method}",
        caption=f"{record.examples:,} examples, {record.tokens_seen:,} tokens"
        + (f"; dashed: {record.held_out:,} held-out examples" if held else ""),
        table=ReportTable("Loss by step", columns, rows_of(cells), folded=True),
        layers=tuple(layers),
    )  # fmt: skip


def trainings_table(root: Path, found: Trained) -> ReportTable:
    """One line per training."""
    cells = [
        (
            str(folder.relative_to(root)), record.request.method, record.request.model,
            f"{record.trainable:,}", f"{record.trainable / record.parameters:.1%}", str(record.steps),
            f"{record.tokens_seen:,}", f"{record.seconds:.1f}", size(record.peak_bytes),
            size(int(record.estimated_bytes)), "" if record.best_step is None else str(record.best_step),
        )
        for folder, record in found
    ]  # fmt: skip
    columns = (
        "folder", "method", "model", "trained", "of all", "steps", "tokens", "seconds", "memory",
        "by estimate", "best step",
    )  # fmt: skip
    return ReportTable("Trainings", columns, rows_of(cells), words=3)
