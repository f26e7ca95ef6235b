"""`proxytune analyze`, `sweep-alpha` and `eval --trace`: what they print, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from tests.support.command_line import proxytune, refused
from tests.support.made_runs import response, token, write

pytestmark = pytest.mark.usefixtures("somewhere_else")

ANALYSES = ("positions", "ngrams", "equations", "skip", "agreement", "failures")
SHORT = ("--limit", 3, "--max-new-tokens", 6)


def made(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Runs for every analysis: its name -> its arguments."""
    text = " So 1+2=3. <b>[red]"
    pieces = [" So", " ", "1", "+", "2", "=", "3", ".", " <b>[red]"]
    tokens = [token(piece, 0.1, 0.4, kl=(0.1, 0.2), top_base="x") for piece in pieces]
    row = {"question": "q", "answer": "3", "scores": {"exact_match": 1.0}}
    rows = [{**row, "responses": response(text, reason="length", tokens=9)}] * 2
    proxy = write(folder / "proxy", rows, traces=[tokens, tokens], trace="agreement")
    wrong = [{**one, "scores": {"exact_match": 0.0}} for one in rows]
    base = write(folder / "base", wrong, role="base", forced=" So")
    for alpha in ("0", "first:4", "1"):
        write(folder / "sweep" / f"alpha={alpha.replace(':', '-')}", rows, alpha=alpha)
    return {
        "positions": (proxy,),
        "ngrams": (proxy, "--min-count", 2),
        "equations": (proxy,),
        "skip": (folder / "sweep", "--control", base),
        "agreement": (proxy,),
        "failures": (base, proxy),
    }


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_prints_a_table_json_and_csv(tmp_path: Path, name: str) -> None:
    arguments = made(tmp_path)[name]
    shown = proxytune("analyze", name, *arguments)
    assert shown.exit_code == 0 and "made gsm" in shown.stdout, shown.output
    printed = json.loads(proxytune("analyze", name, *arguments, "--json").stdout)
    lines = list(csv.DictReader(io.StringIO(proxytune("analyze", name, *arguments, "--csv").stdout)))
    table = printed.get("rows") or printed.get("points") or printed.get("items")
    assert len(lines) == len(table) + (name == "skip") and len(lines) >= 2
    refused(proxytune("analyze", name, *arguments, "--json", "--csv"), "give one of them")


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_help_with_an_example(name: str) -> None:
    shown = proxytune("analyze", name, "--help")
    assert shown.exit_code == 0 and f"Example: proxytune analyze {name} " in " ".join(shown.stdout.split())


def test_what_models_say_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a",
        [{"question": "\x1b[31mq", "scores": {"exact_match": 1.0}, "responses": response("[bold]<b>\r\n2")}],
    )
    other = write(tmp_path / "b", [{"scores": {"exact_match": 0.0}}])
    shown = proxytune("analyze", "failures", folder, other).stdout
    assert (
        "[bold]<b>" in shown
        and "\x1b" not in shown
        and "\u2039U+001B\u203a[31mq" in shown
        and "\r" not in shown
    )


def test_ngrams_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "open.jsonl").write_text('{"output": "Here are some of them."}\n')
    refused(proxytune("analyze", "ngrams", "open.jsonl"), "file of predictions", "--words")
    shown = proxytune("analyze", "ngrams", "open.jsonl", "--words", "Here,them")
    assert "Here are some of 1/1" in shown.stdout and "0 of 1 rows equal the paper's" in shown.stdout
    found = json.loads(proxytune("analyze", "ngrams", "open.jsonl", "--words", "paper", "--json").stdout)
    assert len(found["rows"]) == 20 and found["rows"][0]["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("positions", "nowhere"), ("no run in 'nowhere'",)),
        (("skip", "nowhere"), ("no finished sweep in 'nowhere'", "sweep-alpha")),
        (("ngrams", "nowhere"), ("no run in 'nowhere'",)),
    ],
)
def test_bad_folders(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(proxytune("analyze", *arguments), *parts)


def test_sweep_alpha_prints_and_stores_a_curve(yaml: Path) -> None:
    command = ("sweep-alpha", "gsm", "--system", yaml, *SHORT, "--alphas", "0:1:0.5,first:2")
    shown = proxytune(*command)
    assert shown.exit_code == 0 and "first:2" in shown.stdout and "stored in results/tiny/gsm" in shown.stdout
    printed = json.loads(proxytune(*command, "--json").stdout)
    assert [point["alpha"] for point in printed["points"]] == ["0", "0.5", "1", "first:2"]
    assert all(Path(point["folder"], "run.json").exists() for point in printed["points"])
    skipped = json.loads(
        proxytune("analyze", "skip", Path(printed["points"][0]["folder"]).parent, "--json").stdout
    )
    assert [point["until"] for point in skipped["points"]] == [0, 2, None]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--alphas", "0:2"), ("alpha '0:2' is not a number",)),
        (("--alphas", "0:2:0"), ("no range", "STEP above 0")),
        (("--alphas", "0,99"), ("alpha = 99 is out of range",)),
        (("--alphas", "-1"), ("--allow-negative-alpha",)),
        (("--alphas", "1", "--limit", "0"), ("--limit 0",)),
        (("--alphas", "1", "--mode", "x"), ("--mode 'x'",)),
        (("--alphas", "1", "--batch", "0"), ("--batch 0",)),
    ],
)
def test_bad_sweeps(yaml: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(proxytune("sweep-alpha", "gsm", "--system", yaml, *options), *parts)
    assert not list(Path().rglob("run.json"))


def test_trace_with_and_without_its_value(yaml: Path, tmp_path: Path) -> None:
    kinds = {(): "off", ("--trace",): "tokens", ("--trace", "tokens"): "tokens"}
    kinds |= {("--trace", "agreement"): "agreement", ("--trace", "off"): "off"}
    for number, (option, kind) in enumerate(kinds.items()):
        for before in (False, True):
            out = tmp_path / f"{number}{before}"
            words = (*SHORT, *option) if before else (*option, *SHORT)
            done = proxytune("eval", "gsm", "--system", yaml, "--out", out, *words)
            assert done.exit_code == 0, done.output
            assert results.read_run(out).spec.trace == kind
    refused(
        proxytune("eval", "gsm", "--system", yaml, "--trace=much"),
        "--trace 'much'",
        "'tokens' or 'agreement'",
    )
    wrong = proxytune("eval", "gsm", "--system", yaml, "--as", "base", "--trace", "agreement")
    refused(wrong, "--as proxy or --as tuned")
