"""Tables of what `decode.py --json` measured, in Markdown; with --write, in the README beside this file.

    python benchmarks/tables.py benchmarks/results/dial.json
    python benchmarks/tables.py --write benchmarks/results/*.json

Several files (of runs with --only, say) become one set of tables each, in their order."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
PAPER = HERE.parent / "results" / "paper.json"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
GOALS = {
    "mixed_vs_paper_best_batch": 3.5,
    "long_tail_vs_paper_best_batch": 5.0,
    "mixed_trio_vs_paper_best_batch": 2.5,
    "speculative_vs_plain_demo": 1.5,
    "speculative_vs_plain_trio": 1.8,
    "speculative_trio_vs_paper_batch1": 2.5,
    "speculative_trio_vs_base_hf": 1.0,
    "shared_pair_vs_two_models": 1.5,
    "h200_13b_plain_vs_paper_batch1": 4.0,
    "h200_13b_speculative_vs_paper_batch1": 8.0,
    "h200_13b_floor_share": 0.85,
    "h200_13b_shared_speculative_vs_base": 1.0,
    "h200_13b_mixed_vs_paper_batch1": 60.0,
    "h200_13b_mixed_vs_paper_best_batch": 5.0,
    "h200_70b_int8_speculative_vs_base": 1.5,
}
"""Least that a ratio should be."""
LIMITS = {"h200_13b_proxy_tax": 2.2, "h200_13b_shared_proxy_tax": 1.65}
"""Most that a ratio should be."""

Found = Mapping[str, Any]
"""The object that `decode.py --json` prints."""
Line = Mapping[str, Any]


def as_text(found: Found) -> str:
    """All tables of one run."""
    parts = [machine(found["environment"])]
    if found["ratios"]:
        parts.append(ratio_table(found["ratios"]))
    return "\n\n".join([*parts, *case_tables(found["rows"])]) + "\n"


def case_tables(rows: Sequence[Line]) -> list[str]:
    """The table of every case."""
    parts = []
    for case in dict.fromkeys(line["case"] for line in rows):
        lines = [line for line in rows if line["case"] == case]
        shown = {"dial": _synthetic_acceptance, "table12": _table12}.get(case, _lines)
        parts.append(f"### {case}\n\n{shown(lines)}")
    return parts


def machine(environment: Mapping[str, Any]) -> str:
    """Where it was measured, and on which systems."""
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    systems = [
        f"{name}: {' + '.join(f'{count / 1e6:.1f}M' for count in system['parameters'].values())} "
        f"({', '.join(system['parameters'])}), {system['weights']} weights, {system['dtype']}, "
        f"vocabulary {system['vocabulary']}"
        for name, system in environment["systems"].items()
    ]
    return "\n".join(
        [
            f"{environment['device']}, {environment['threads']} threads; "
            f"Python {environment['python']}, {versions}, "
            f"proxytune {environment['proxytune']} at {environment['git_commit']}; "
            f"a copy moves {environment['copy_gb_per_s']:.1f} GB/s.",
            "",
            f"    {environment['command']}",
            "",
            *(f"- {system}" for system in systems),
        ]
    )


def ratio_table(ratios: Mapping[str, float]) -> str:
    """Ratios beside their goals."""
    rows = []
    for name, value in ratios.items():
        goal = f">= {GOALS[name]:g}" if name in GOALS else f"<= {LIMITS[name]:g}" if name in LIMITS else ""
        met = value >= GOALS.get(name, value) and value <= LIMITS.get(name, value)
        rows.append((f"`{name}`", f"{value:.2f}", goal, "" if not goal else "yes" if met else "**no**"))
    return markdown(("ratio of tokens per second", "measured", "goal", "met"), rows)


def _lines(lines: Sequence[Line]) -> str:
    """The contenders of one case; a dagger marks synthetic acceptance."""
    heads = (
        "system", "workload", "", "rows", "tokens/s", "spread", "ms/token p50", "p95", "first token ms",
        "GB/s", "% of copy", "memory MB", "syncs/token", "acceptance", "accepted/step", "x plain",
        "tokens = oracle",
    )  # fmt: skip
    rows = [
        (
            line["system"],
            line["workload"],
            line["name"],
            str(line["batch"]),
            f"{line['tokens_per_s']:.1f}",
            f"{min(line['runs']):.1f}..{max(line['runs']):.1f}",
            f"{line['ms_per_token_p50']:.2f}",
            f"{line['ms_per_token_p95']:.2f}",
            f"{line['first_token_ms']:.1f}",
            _number(line["gb_per_s"], ".1f"),
            _number(line["floor_percent"], ".0f"),
            _number(line["memory_mb"], ".0f"),
            _number(line["syncs_per_token"], ".2f"),
            _number(line["acceptance"], ".2f") + ("†" if line["dial"] is not None else ""),
            _number(line["accepted_per_step"], ".2f"),
            _number(line["versus_plain"], ".2f"),
            _verdict(line),
        )
        for line in lines
    ]
    table = markdown(*_without_empty(heads, rows))
    note = (
        "\n\n† synthetic acceptance (`ours.SyntheticAcceptance`)."
        if any(one["dial"] for one in lines)
        else ""
    )
    return table + note


def _verdict(line: Line) -> str:
    if line["tokens_equal"]:
        return "yes"
    return f"{line['diverged']} rows part, at margins up to {line['widest_tie']:.1e} sd"


def _synthetic_acceptance(lines: Sequence[Line]) -> str:
    """Speed-up of adaptive speculation: acceptance down, batch across."""
    parts = []
    for system in dict.fromkeys(line["system"] for line in lines):
        own = [line for line in lines if line["system"] == system]
        batches = sorted({line["batch"] for line in own})
        plain = {line["batch"]: line["tokens_per_s"] for line in own if line["name"] == "plain"}
        cells = {
            (line["dial"], line["batch"]): line["versus_plain"] for line in own if line["name"] != "plain"
        }
        shares = sorted({line["dial"] for line in own if line["dial"] is not None})
        rows = [("plain, tokens/s", *(f"{plain[batch]:.0f}" for batch in batches))]
        rows += [("plain, again", *(f"{cells[None, batch]:.2f}" for batch in batches))]
        rows += [(f"{share:g}", *(f"{cells[share, batch]:.2f}" for batch in batches)) for share in shares]
        equal = all(line["tokens_equal"] for line in own)
        parts.append(
            f"{system}: adaptive speculation in multiples of plain decoding, by synthetic acceptance and "
            f"the number of rows; tokens {'equal to' if equal else 'NOT always equal to'} plain decoding's."
            "\n\n" + markdown(("acceptance", *map(str, batches)), rows)
        )
    return "\n\n".join(parts)


def _table12(lines: Sequence[Line]) -> str:
    """Seconds per generation by prompt/output length, the paper's own figures first."""
    printed = json.loads(PAPER.read_text(encoding="utf-8"))["tables"]["12"]
    parts, lengths = [], ["8,512", "512,8", "8,8"]
    rows = [_paper_row(row, lengths) for row in printed["rows"]]
    parts.append(
        f"The paper's ({printed['source']}; {printed['note']}). Seconds per generation, and the slow-down "
        "against the tuned large model:\n\n" + markdown(("prompt/output", *_slashed(lengths)), rows)
    )
    for system in dict.fromkeys(line["system"] for line in lines):
        own = [line for line in lines if line["system"] == system]
        heads = list(dict.fromkeys(line["workload"] for line in own))
        seconds = {(line["name"], line["workload"]): line["seconds"] for line in own}
        names = list(dict.fromkeys(line["name"] for line in own))
        rows = [
            (
                name,
                *(
                    f"{seconds[name, at]:.3f} ({seconds[name, at] / seconds[names[0], at]:.2f}x)"
                    for at in heads
                ),
            )
            for name in names
        ]
        parts.append(f"Ours, {system}:\n\n" + markdown(("prompt/output", *heads), rows))
    return "\n\n".join(parts)


def _paper_row(row: Mapping[str, Any], lengths: Sequence[str]) -> tuple[str, ...]:
    slow = row.get("slowdown", {})
    cells = [
        f"{row['seconds'][at]['mean']:.2f}" + (f" ({slow[at]:.2f}x)" if at in slow else "") for at in lengths
    ]
    return (f"{row['size']} {row['role']}, {row['gpus']} A100", *cells)


def _slashed(lengths: Iterable[str]) -> list[str]:
    return [length.replace(",", "/") for length in lengths]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _without_empty(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that hold something."""
    keep = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    return [heads[index] for index in keep], [[row[index] for index in keep] for row in rows]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(text: str) -> None:
    """Put the tables between the README's marks."""
    content = README.read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the files, print or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", type=Path, help="what `decode.py --json` printed")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    options = parser.parse_args(arguments)
    try:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    except (OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    text = "\n".join(as_text(one) for one in found)
    if options.write:
        write(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
