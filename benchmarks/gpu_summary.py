"""Tables of one GPU day, in Markdown: what goes into benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.stages import ENDS
from benchmarks.tables import as_text, markdown

Line = Mapping[str, Any]
"""One line of day.jsonl."""
NO_FIGURE = ("**A smoke run: the stages in miniature on the CPU. No figure here means anything.**",)
UNKNOWN = {"device": "unknown device", "threads": 0, "python": "?", "packages": {}, "proxytune": "?"}
UNKNOWN |= {"git_commit": None, "copy_gb_per_s": 0.0}
"""Where the stage that tells of the machine was not reached."""


def summary(content: str) -> str:
    """The tables of the last day in the text of a file."""
    lines = last_day([json.loads(line) for line in content.splitlines() if line.strip()])
    day = lines[0]
    environment = {**UNKNOWN, **next(of_kind(lines, "environment"), {})}
    environment["git_commit"] = environment["git_commit"] or day["of"]
    environment["command"] = "gpu_day.py" + (" --smoke" if day["smoke"] else "")
    environment["systems"] = {one["name"]: one for one in of_kind(lines, "system")}
    rows = list(of_kind(lines, "line"))
    found = {"environment": environment, "ratios": ratios(rows), "rows": rows}
    parts = [
        f"## {environment['device']}, {day['begins'][:10]}",
        *(NO_FIGURE if day["smoke"] else ()),
        as_text(found).rstrip("\n"),
        *tests(lines),
        *tokens(lines),
        *(profile(one) for one in of_kind(lines, "profile")),
        ends(lines),
    ]
    return "\n\n".join(parts) + "\n"


def last_day(lines: Sequence[Line]) -> Sequence[Line]:
    """The lines of the last run that was written into the file."""
    first = max((at for at, line in enumerate(lines) if line["kind"] == "day"), default=None)
    if first is None:
        raise ValueError("no line of the kind 'day': not what gpu_day.py writes")
    return lines[first:]


def of_kind(lines: Sequence[Line], kind: str) -> Iterator[Line]:
    """Lines of one kind."""
    return (line for line in lines if line["kind"] == kind)


def ratios(rows: Sequence[Line]) -> dict[str, float]:
    """Tokens per second of one contender by those of another, where both were measured at batch 1."""
    found = dict[str, float]()
    for system in dict.fromkeys(row["system"] for row in rows):
        speed = {
            row["name"]: row["tokens_per_s"] for row in rows if row["system"] == system and row["batch"] == 1
        }
        plain, base = speed.get("plain"), speed.get("base alone")
        others = {name: value for name, value in speed.items() if name not in ("plain", "base alone")}
        for name, value in others.items():
            if plain and name.startswith("speculative"):
                found[f"{system}: {name}, by plain"] = value / plain
                if base:
                    found[f"{system}: {name}, by base alone"] = value / base
            elif plain and "base alone" not in name:
                found[f"{system}: plain, by {name}"] = plain / value
        if plain and base:
            found[f"{system}: base alone, by plain"] = base / plain
    return found


def tests(lines: Sequence[Line]) -> list[str]:
    """How the tests ended, and which did not pass."""
    counts = list(of_kind(lines, "tests"))
    if not counts:
        return []
    names = ("passed", "failed", "skipped")
    shown = ", ".join(f"{counts[-1][name]} {name}" for name in names if name in counts[-1])
    whole = "" if "exit_code" in counts[-1] else " when the stage was ended"
    told = [
        (one["test"], (one["why"].strip() or "?").splitlines()[-1]) for one in of_kind(lines, "failed test")
    ]
    failed = [f"- failed: `{test}`: {why[:200]}" for test, why in told]
    return ["\n".join([f"GPU tests: {shown or 'none was run'}{whole}.", *([""] if failed else []), *failed])]


def tokens(lines: Sequence[Line]) -> list[str]:
    """Comparisons of tokens."""
    rows = []
    for one in of_kind(lines, "tokens"):
        tie = "" if one["widest_tie"] is None else f"{one['widest_tie']:.1e}"
        more = {
            k: v
            for k, v in one.items()
            if k in ("graphs", "refused", "without_memory", "branches_in_parallel")
        }
        graphs = ", ".join(f"{name}: {value}" for name, value in more.items())
        rows.append((one["system"], one["of"], str(one["rows"]), str(one["diverged"]), tie, graphs))
    heads = ("system", "tokens of", "rows", "rows that part", "at margins up to, sd", "graphs")
    return [markdown(heads, rows)] if rows else []


def profile(one: Line) -> str:
    """The kernels of a step."""
    rows = [
        (f"`{name}`", str(count), f"{us:.1f}", f"{100 * share:.1f}") for name, count, us, share in one["top"]
    ]
    return (
        f"One step of {one['system']} ({one['rows']} rows in the graph, k = {one['k']}): "
        f"{one['kernels']} kernels, {one['ms']:.2f} ms in kernels, "
        f"{one['step_ms']:.2f} ms from token to token without the profiler.\n\n"
        + markdown(("kernel", "times", "us", "% of the kernels' time"), rows)
    )


def ends(lines: Sequence[Line]) -> str:
    """Which stages ended how, and why those that were not done were not."""
    rows = []
    for line in (line for line in lines if line["kind"] in ENDS):
        why = line.get("reason") or line.get("error") or line.get("exit_code") or line.get("after_s") or ""
        took = f"{line['seconds']:.1f} s" if "seconds" in line else ""
        rows.append((line["stage"], str(line["kind"]), took, str(why).splitlines()[0][:200] if why else ""))
    return markdown(("stage", "ended", "took", "why"), rows)
