"""What is run first, and whole, on a GPU: tests, bandwidth, tokens and speed, in less than 8 minutes.

    python benchmarks/gpu_day.py --out FOLDER             on a machine with a GPU
    python benchmarks/gpu_day.py --smoke --out FOLDER     the same stages in miniature on the CPU
    python benchmarks/gpu_day.py --summary FOLDER/day.jsonl

Every result is a line of JSON in FOLDER/day.jsonl and on stdout when it is known; what the stages print
besides is in FOLDER/day.log. `stages.py` says what happens to a stage that fails, hangs or comes too late.
--summary makes the tables for benchmarks/README.md. `make gpu-day` prepares what a machine without a network
needs. Exit code 0: every stage was done, or skipped with a reason."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stages import LINES, Day, Stage, run, serve

HERE = Path(__file__).resolve()
DEADLINE = 460.0
"""Seconds in all, with a margin below 8 minutes."""
TESTS, MACHINE, SMALL, LARGE = "tests", "machine", "13b", "70b"
PLAN: tuple[Stage, ...] = (
    Stage(TESTS, "GPU", need=60, limit=150),
    Stage(MACHINE, "bandwidth", need=5, limit=30),
    Stage(MACHINE, "float32", need=15, limit=60),
    Stage(SMALL, "graphs and eager steps", need=30, limit=75),
    Stage(SMALL, "the paper's loop", need=15, limit=45),
    Stage(SMALL, "base alone", need=10, limit=40),
    Stage(SMALL, "synthetic acceptance, k = 1", need=8, limit=30),
    Stage(SMALL, "synthetic acceptance, k = 3", need=8, limit=30),
    Stage(SMALL, "synthetic acceptance, k = 4", need=8, limit=30),
    Stage(SMALL, "batch", need=30, limit=75),
    Stage(SMALL, "one replay", need=8, limit=30),
    Stage(LARGE, "the paper's loop", need=20, limit=60),
    Stage(LARGE, "base alone", need=10, limit=40),
    Stage(LARGE, "synthetic acceptance, k = 3", need=8, limit=30),
    Stage(LARGE, "one replay", need=8, limit=30),
)
"""In order: what the rest relies on comes first. `need` is an estimate and was not measured."""


@dataclass(frozen=True)
class Group:
    """Stages that share a process."""

    start: float
    """Seconds until it can begin: imports, weights. An estimate too."""
    serve: Callable[[bool], None]
    """What that process does, in miniature or not."""


def _tests(smoke: bool) -> None:
    from benchmarks.gpu_tests import tests

    serve(tests(smoke))


def _machine(smoke: bool) -> None:
    from benchmarks.gpu_stages import machine, recover

    serve(machine(smoke), recover)


def _13b(smoke: bool) -> None:
    from benchmarks.gpu_stages import recover, trio_13b

    serve(trio_13b(smoke), recover)


def _70b(smoke: bool) -> None:
    from benchmarks.gpu_stages import recover, trio_70b

    serve(trio_70b(smoke), recover)


GROUPS = {
    TESTS: Group(1, _tests),
    MACHINE: Group(12, _machine),
    SMALL: Group(35, _13b),
    LARGE: Group(50, _70b),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day, or print the summary of one. -> the exit code."""
    options = _parser().parse_args(arguments)
    if options.group is not None:
        GROUPS[options.group].serve(options.smoke)
        return 0
    if options.summary is not None:
        from benchmarks.gpu_summary import summary

        try:
            print(summary(options.summary.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            print(f"error: --summary {options.summary}: {error}; name a {LINES}", file=sys.stderr)
            return 2
        return 0
    if not options.smoke and not _has_gpu():
        print("error: no CUDA device here; --smoke runs the stages on the CPU", file=sys.stderr)
        return 2
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    day = Day(options.out, options.deadline)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    day.say(
        "", "day", {"begins": now, "smoke": options.smoke, "of": options.tree, "deadline_s": day.deadline}
    )
    stages, starts = PLAN, {name: group.start for name, group in GROUPS.items()}
    if options.smoke:  # no estimate holds there
        stages = tuple(replace(stage, need=0, limit=options.deadline) for stage in PLAN)
        starts = dict.fromkeys(GROUPS, 0.0)
    if options.only:
        stages = tuple(stage for stage in stages if stage.group in options.only)
    command = [sys.executable, str(HERE), *(["--smoke"] if options.smoke else []), "--group"]
    run(stages, starts, command, day)
    day.say("", "end", {"failed": day.failed, "left_s": round(day.left)})
    print(f"python {HERE.name} --summary {day.folder / LINES}", file=sys.stderr)
    return 1 if day.failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu-day"), help="folder of the results")
    parser.add_argument("--deadline", type=float, default=DEADLINE, metavar="SECONDS", help="in all")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="stages of these groups alone")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on the CPU: no figure means anything"
    )
    parser.add_argument("--tree", metavar="COMMIT", help="what this tree is, where git cannot say")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="print the tables of a day's results")
    parser.add_argument("--group", choices=list(GROUPS), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
