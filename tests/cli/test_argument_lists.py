"""Random argument lists, for every command and every option that the app has: each ends with code 0, or with
code 2 and one line. None is a traceback, and none writes where it was not told to."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from proxytune import hub
from proxytune.cli import app as cli
from proxytune.cli import console
from proxytune.cli.commands import demo
from proxytune.config import load_system
from proxytune.decoding.decoder import Decoder
from proxytune.demo import world
from proxytune.models.roles import Models
from proxytune.runs import evaluation
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import task as tasks
from proxytune.terminal.text import is_suspect
from tests.support import made_runs, public_items, tiny_system
from tests.support.command_line import Result, proxytune
from tests.support.tiers import slow

QUICK, SLOW = 30, 400
"""How many lists each tier tries."""

WORDS = [
    *(
        "",
        " ",
        "0",
        "1",
        "2",
        "3",
        "-1",
        "-0",
        "0.5",
        "1e400",
        "nan",
        "-inf",
        "9" * 30,
        "0x10",
        "1,2",
        "0:1:0.5",
    ),
    *("gsm", "base", "all", "auto", "off", "none", "x=y", "=", ",", ":", "first:2", "4GB", "--", "-", "%s{}"),
    *("é漢字🦊", "\udcff", "\ud800a", "a\nb", "\x1b[31m[/nope]", "\u202egsm", "[bold]", "\\[/x]", "x" * 3000),
    *("nowhere", "nowhere/deeper", "../x", ".", "/dev/null", "~", "nowhere.yaml", "files"),
]
"""For any option: good for some, bad for most."""

NUMBERS = ["0", "1", "2", "0.5"]
GOOD: dict[str, list[str]] = {
    "task": ["gsm", "gsm", "truthfulqa", "truthfulqa_mc", "toxigen", "humaneval", "ds1000", "alpaca_farm"],
    "system": ["tiny.yaml", "tiny.yaml", "tiny.yaml", "demo", "llama2-13b"],
    "as_": ["proxy", "base", "expert", "tuned", "all"],
    "data": ["generated", "plumbing", "files/gsm.jsonl", "hub"],
    "shots_from": ["files/gsm.jsonl"],
    "prompt": ["Ann has", "[/nope] \x1b[2J", "-"],
    "alphas": ["0,1", "0:1:0.5", "first:2"],
    "alpha": ["0.5", "first:2", "linear:0:1:4"],
    "results": ["runs", "results"],
    "run": ["runs/made/gsm/proxy", "runs/made/gsm/base"],
    "first": ["runs/made/gsm/proxy"],
    "second": ["runs/made/gsm/base"],
    "sweep": ["runs/made/gsm/proxy/sweep"],
    "control": ["runs/made/gsm/base"],
    "file": ["runs/made/gsm/proxy/predictions.jsonl", "runs/made/gsm/proxy", "files/gsm.jsonl"],
    "recipe": ["table2", "table3", "table6"],
    "format_": ["alpaca_eval"],
    "out": ["out", "results/o"],
    "html": ["page.html"],
    "figures": ["drawn"],
    "mode": ["generate", "likelihood", "choices"],
    "trace": ["tokens", "agreement", "off"],
    "vocab": ["strict", "intersect"],
    "judge": ["none", "default", "gsm=none"],
    "sandbox": ["auto", "weak"],
    "speculate": ["auto", "off", "3"],
    "drafter": ["expert", "lookup"],
    "kv_memory": ["64MB"],
    "max_new_tokens": ["1", "6"],
}
"""Option -> values that it takes, where no word above is one."""
WRITTEN = {"out", "html", "figures"}
"""Options that name what is written."""
LONG = {("demo",)}
"""Commands that take a second however they are called."""
STARTS = {"my_task.py", "my_items.jsonl", "my_system.yaml"}
"""What `init` writes unless it is told another name."""
BESIDE = {"report": {"results"}, "judge": {"run"}, "export": {"run"}}
"""Command -> its arguments that name a folder to which it adds."""


def commands() -> dict[tuple[str, ...], Any]:
    """Every command of the app by its words."""

    def under(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, command
        for name, one in (inner or {}).items():
            yield from under((*words, name), one)

    return dict(under((), typer.main.get_command(cli.app)))


COMMANDS = commands()


class Draw:
    """One argument list, and which places it names for writing."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        named = sorted(COMMANDS)
        often = [2 if words in LONG else 4 + len(COMMANDS[words].params) for words in named]
        [drawn] = self.draw.choices(named, often)
        self.words = named[seed] if seed < len(named) else drawn  # each of them once
        self.command = COMMANDS[self.words]
        self.may_write = {"results"} | (STARTS if self.words[0] == "init" else set())
        self.rate, self.good = self.draw.choice((0.04, 0.15)), self.draw.choice((0.6, 0.9, 1.0))
        self.given = list(self.words)
        for parameter in self.draw.sample(self.command.params, len(self.command.params)):
            self._add(parameter)

    def _add(self, parameter: Any) -> None:
        """Give a parameter or leave it out: arguments mostly, options now and then."""
        is_argument = parameter.param_type_name == "argument"
        if self.draw.random() > (0.93 if is_argument else self.rate):
            return
        if is_argument:
            self.given.append(self._value(parameter.name))
            return
        for _ in range(self.draw.choice((1, 1, 1, 2))):
            self.given.append(self.draw.choice([*parameter.opts, *parameter.secondary_opts]))
            if not parameter.is_flag and self.draw.random() < 0.97:
                self.given.append(self._value(parameter.name))

    def _value(self, name: str) -> str:
        value = self.draw.choice(GOOD.get(name, NUMBERS) if self.draw.random() < self.good else WORDS)
        if name in WRITTEN | BESIDE.get(self.words[0], set()):
            self.may_write.add(value)
        return value


def test_the_app_has_the_commands_that_are_tried() -> None:
    assert ("eval",) in COMMANDS and ("analyze", "skip") in COMMANDS and len(COMMANDS) >= 18
    drawn = {Draw(seed).words for seed in range(SLOW)}
    assert drawn == set(COMMANDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a system, files and finished runs."""
    folder = tmp_path_factory.mktemp("arguments") / "here"
    folder.mkdir()
    tiny_system.write(folder)
    (folder / "files").mkdir()
    (folder / "results").mkdir()
    public_items.write("gsm", folder / "files")
    tokens = [made_runs.token(piece, 0.1, 0.4, kl=(0.1, 0.2), top_base="x") for piece in ("1", "=", "1")]
    row = {"question": "\\[/nope] \x1b[31m \ud800", "answer": "3", "scores": {"exact_match": 1.0},
           "responses": made_runs.response("[/b] \x9b2J \u202e 1=1", tokens=3)}  # fmt: skip
    base = {**row, "scores": {"exact_match": 0.0}}
    runs = folder / "runs" / "made" / "gsm"
    made_runs.write(runs / "proxy", [row, row], traces=[tokens, tokens], trace="agreement")
    made_runs.write(runs / "base", [base, base], role="base", forced=" So")
    for alpha in ("0", "first:2", "1"):
        made_runs.write(runs / "proxy" / "sweep" / f"alpha={alpha.replace(':', '-')}", [row], alpha=alpha)
    return folder


@pytest.fixture(autouse=True)
def _short(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two items and three tokens at most, the tiny system in place of the demo's, every model loaded once, no
    hub, nobody's home."""
    stream, load, read, opened = Decoder.stream, Models._load, tasks.read_source, Sandbox.open

    def short(self: Decoder, examples: Any, sampling: Any = None, **options: Any) -> Any:
        few = {"max_new_tokens": min(3, sampling.max_new_tokens), "n": min(2, sampling.n)}
        return stream(self, examples, sampling.model_copy(update=few), **options)

    def two(task: Any, source: str, limit: int | None = None, **options: Any) -> Any:
        return read(task, source, 2 if limit is None else min(limit, 2), **options)

    monkeypatch.setattr(Decoder, "stream", short)
    monkeypatch.setattr(Models, "_load", lambda self, name: loaded(load, self, name))
    for module in (evaluation, tasks):
        monkeypatch.setattr(module, "read_source", two)
    monkeypatch.setattr(Sandbox, "open", functools.cache(opened))
    monkeypatch.setattr(world, "TASKS", ("gsm",))
    for module in (console, demo):
        monkeypatch.setattr(module, "load_system", lambda name: load_system(SMALL.get(name, name)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub, "stored", lambda name, kind="model": False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(place)


SMALL = {"demo": "tiny.yaml", "demo-mid": "tiny.yaml"}
LOADED: dict[tuple[str, str], Any] = {}


def loaded(load: Any, models: Models, name: str) -> Any:
    """A model of these systems, which have no adapters: loaded once."""
    key = name, models.spec(name).model_dump_json()
    if key not in LOADED:
        LOADED[key] = load(models, name)
    return LOADED[key]


def tree(root: Path) -> dict[Path, tuple[int, int]]:
    """Every file and folder under a root with what changes when it is written."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in root.rglob("*")
        if not path.is_symlink()
    }


def judged(found: Result, given: list[str]) -> str | None:
    """What is wrong with how a command ended."""
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        return f"a traceback: {found.exception!r}"
    if found.exit_code not in (0, 2):
        return f"code {found.exit_code}"
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    if found.exit_code == 2 and (len(errors) != 1 or not found.stderr.rstrip("\n").endswith(errors[0])):
        return f"no one line: {found.stderr!r}"
    if any(map(is_suspect, found.stderr)):
        return f"it prints what others wrote: {found.stderr!r}"
    if found.exit_code == 0 and "--json" in given and "--help" not in given:
        json.loads(found.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    return None


def is_file_name(text: str) -> bool:
    """Whether a file may have this name: not too long, and of characters that a disk can hold."""
    try:
        return len(os.fsencode(text)) < 255 and "\0" not in text
    except UnicodeEncodeError:
        return False


def try_lists(seeds: range, place: Path) -> None:
    """Run the lists of these seeds, and tell of all that end badly."""
    bad = []
    root = place.parent
    for seed in seeds:
        case, before = Draw(seed), tree(root)
        found = proxytune(*case.given)
        wrong = judged(found, case.given)
        after = tree(root)
        allowed = [(place / name).resolve() for name in case.may_write if is_file_name(name)]
        strange = [
            path
            for path in after.keys() | before.keys()
            if after.get(path) != before.get(path)
            and not any(
                part in path.resolve().parents or path.resolve() in (part, part.parent) for part in allowed
            )
        ]
        if wrong is not None:
            bad.append(f"{seed} {case.given}: {wrong}")
        if strange:
            bad.append(f"{seed} {case.given}: it wrote {strange}")
        shutil.rmtree(place / "out", ignore_errors=True)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("seeds", [range(QUICK), slow(range(QUICK, SLOW))])
def test_no_list_of_arguments_is_a_traceback(place: Path, seeds: range) -> None:
    try_lists(seeds, place)
