"""How fast proxytune decodes, beside the paper's loop and Hugging Face's `generate`, in one process.

    python benchmarks/decode.py --device cpu            everything, within two hours on 2 cores
    python benchmarks/decode.py --device cpu --quick    smaller workloads, within two minutes
    python benchmarks/decode.py --device cuda --shape 13b+7b+7b
    python benchmarks/decode.py --only dial --json > dial.json

A case's tables are printed when it ends; --lines also puts every row into a file as soon as it is known.
--json prints one object, {"ratios": ..., "rows": ..., "environment": ...}, on stdout at the end and nothing
else; progress goes to stderr. `benchmarks/tables.py` puts such files into benchmarks/README.md."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: this checkout's benchmarks and proxytune, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import cases_cpu, cases_cuda
from benchmarks.cases_cpu import Case
from benchmarks.lab import CUDA, FULL, QUICK, SMOKE, Lab, Size
from benchmarks.record import Line, Report, environment
from benchmarks.shapes import SHAPES
from benchmarks.tables import case_tables, machine, ratio_table
from proxytune.errors import UserError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    options, stdout = _parser().parse_args(arguments), sys.stdout

    def show(case: Report) -> None:
        if not options.json:
            parts = [*case_tables([asdict(line) for line in case.lines])]
            parts += [ratio_table(case.ratios)] if case.ratios else []
            print("\n\n".join(parts) + "\n", file=stdout, flush=True)

    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library may print
            found = measure(options, show)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(found, indent=1) if options.json else machine(found["environment"]))


def measure(options: argparse.Namespace, show: Callable[[Report], None]) -> dict[str, Any]:
    """Run the chosen cases, and show each when it ends. -> the object that --json prints."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: --device cpu")
    size = _size(options)
    known = cases_cpu.CASES if options.device == "cpu" else cases_cuda.cases(size.trio)
    lab = Lab(torch.device(options.device), size)
    if options.lines is not None:
        if not options.lines.absolute().parent.is_dir():
            raise UserError(
                f"--lines {options.lines}: there is no folder '{options.lines.parent}'; make it first"
            )
        lab.heard = partial(_put_down, options.lines)
    torch.manual_seed(0)
    report, names = Report(), chosen(known, options.only)
    lab.tell(f"a copy moves {lab.bandwidth / 1e9:.1f} GB/s")  # before models need the memory
    for name in names:
        lab.tell(name)
        found = known[name][0](lab)
        show(found)
        report.add(found)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return report.as_json(environment(lab.device, lab.bandwidth, lab.systems))


def _put_down(path: Path, line: Line) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(line)) + "\n")


def chosen(known: Mapping[str, tuple[Case, tuple[str, ...]]], only: Sequence[str]) -> list[str]:
    """The cases that `only` names, by their own names or those of their ratios; all of them without."""
    if not only:
        return list(known)
    wanted = {name.strip() for part in only for name in part.split(",")}
    names = {name: case for case, (_, keys) in known.items() for name in (case, *keys)}
    for name in sorted(wanted):
        if name not in names:
            raise did_you_mean("benchmark", name, list(names))
    picked = {names[name] for name in wanted}
    return [case for case in known if case in picked]


def _size(options: argparse.Namespace) -> Size:
    size = SMOKE if options.smoke else QUICK if options.quick else CUDA if options.device == "cuda" else FULL
    if options.shape is not None:
        if options.shape not in SHAPES:
            raise did_you_mean("shape", options.shape, list(SHAPES))
        size = replace(size, trio=options.shape)
    if options.repeats is not None:
        size = replace(size, repeats=options.repeats, long_repeats=options.repeats)
    if options.batches is not None:
        size = replace(size, batches=tuple(options.batches))
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return int(text)


def _batches(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="smaller workloads")
    amount.add_argument(
        "--smoke", action="store_true", help="tiny workloads and a tiny trio: no figure means anything"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases or ratios, comma separated"
    )
    parser.add_argument("--shape", metavar="NAME", help=f"the random trio: {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="timed runs of every contender")
    parser.add_argument(
        "--batches",
        type=_batches,
        metavar="N,N",
        help="batch sizes of the paper's loop to choose its best from",
    )
    parser.add_argument(
        "--lines",
        type=Path,
        metavar="FILE",
        help="append every row to FILE as a line of JSON when it is known",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    return parser


if __name__ == "__main__":
    main()
