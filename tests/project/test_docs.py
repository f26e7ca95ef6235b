"""README and docs/ are right: blocks marked `demo` are run, in order, in an empty folder; every other command
is parsed; what is named and linked is there; docs/cli.md is what the commands print."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer

from proxytune.cli.app import app
from proxytune.errors import UserError
from proxytune.sandbox import Sandbox
from tests.support.checkout import ROOT
from tests.support.command_line import proxytune
from tests.support.require import require_demo, require_or_skip

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("CONTRIBUTING.md", "benchmarks/README.md", "proxytune/demo/README.md")
GUIDES = [*PAGES, *(ROOT / name for name in OTHERS)]
README = PAGES[0].read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WRITTEN = {"results/demo-report/report.html"}
"""Files that a command writes and the repository does not have."""


def name_of(page: Path) -> str:
    """How a test names a page."""
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block of a page: ```<language> <marks>."""

    language: str
    marks: tuple[str, ...]
    body: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.findall(r"^```(\w+)?([^\n]*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(language, tuple(marks.split()), body) for language, marks, body in found]


def demo_blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run."""
    return [block for block in blocks(page) if "demo" in block.marks]


class Command(NamedTuple):
    """A `proxytune` command of a block: its arguments, and what a pipe writes to it."""

    arguments: list[str]
    stdin: str


def commands(block: Block) -> list[Command]:
    """The `proxytune` commands of a block, as bash reads them."""
    told = r"""printf '%s\0' "$@"; printf '\n\0'; if [ -p /dev/stdin ]; then cat; fi; printf '\0'"""
    done = subprocess.run(
        ["bash", "-eu", "-c", f"proxytune() {{ {told}; }}\n{block.body}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = iter(done.stdout.split("\0")[:-1])
    return [
        Command([first, *takewhile(lambda word: word != "\n", words)], stdin=next(words)) for first in words
    ]


def typed_lines(page: Path) -> Iterator[str]:
    """Every `proxytune` command line of a page that is not run, in a block or in the text."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.language == "bash" and "demo" not in block.marks:
            yield from (line for line in block.body.splitlines() if line.startswith("proxytune "))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (code for code in re.findall(r"`(proxytune [a-z-]+[^`]*)`", prose) if "..." not in code)


def check(arguments: list[str]) -> None:
    """See that these arguments name a command, and options of its own."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    assert command.name or not rest, f"no command {rest[:1]}"
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    known |= {"--help", "-h", "--version", "--install-completion"}
    if (command.context_settings or {}).get("ignore_unknown_options"):  # the others are lm-eval's
        known |= lm_eval_options()
    for word in rest:
        if word.startswith("-") and word != "-":
            assert word.split("=")[0] in known, f"`{' '.join(arguments)}`: no option {word}"


def lm_eval_options() -> set[str]:
    """The options of `lm-eval run`."""
    harness = pytest.importorskip("lm_eval._cli").HarnessCLI()
    parser = harness._subparsers.choices["run"]
    return {name for action in parser._actions for name in action.option_strings}


# What is run

RUN = [
    pytest.param(page, marks=() if name_of(page) in ("README.md", "docs/python.md") else pytest.mark.slow)
    for page in PAGES
    if demo_blocks(page)
]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_demo_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_demo()
    if name_of(page) == "docs/lm-eval.md" and find_spec("lm_eval") is None:
        require_or_skip("lm-eval", "lm-eval is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        for mark in block.marks:
            if mark.startswith("file="):
                Path(mark.removeprefix("file=")).write_text(block.body, encoding="utf-8")
        if "demo" not in block.marks or ("sandbox" in block.marks and not sandboxed()):
            continue
        if block.language == "python":
            exec(compile(block.body, name_of(page), "exec"), {"__name__": "__main__"})
            continue
        run = commands(block)
        assert run and len(run) == len(re.findall(r"(?:^|\| )proxytune ", block.body, re.MULTILINE))
        for arguments, stdin in run:
            done = proxytune(*arguments, stdin=stdin)
            assert done.exit_code == 0 and done.stdout.strip(), (arguments, done.output, done.exception)
            assert all((tmp_path / name).exists() for name in written(arguments)), arguments


def written(arguments: list[str]) -> list[str]:
    """The files and folders that a command writes."""
    if "--dry-run" in arguments:
        return []
    return [value for name, value in pairwise(arguments) if name in ("--out", "--html", "--figures")]


def sandboxed() -> bool:
    """Whether a sandbox that isolates is here; without one the block is left out, or the test fails."""
    try:
        Sandbox.open()
    except UserError as error:
        with pytest.raises(pytest.skip.Exception):
            require_or_skip("sandbox", str(error))
        return False
    return True


def test_the_readme_shows_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    require_demo()
    [block] = [block for block in demo_blocks(PAGES[0]) if block.language == "python"]
    shown = block.body.split("\nrun = ")[0]
    exec(compile(shown, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "The answer is 110." in printed and "The answer is 80." in printed  # 52 - 12 = 40, twice 40 is 80


def test_the_showcase_command_is_right_where_the_base_is_wrong() -> None:
    require_demo()
    [block] = [block for block in demo_blocks(PAGES[0]) if block.language == "bash"]
    shown = proxytune(*commands(block)[0].arguments, "--json").stdout
    roles = json.loads(shown)["roles"]
    assert roles["proxy"]["text"].endswith("The answer is 99.")  # 24 * 4 + 3
    assert not roles["base"]["text"].endswith("The answer is 99.")


# What is named


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_command_parses(page: Path) -> None:
    for line in typed_lines(page):
        words = [word for word in line.removeprefix("proxytune ").split() if word not in ("...", "\\")]
        check(words)
    for block in demo_blocks(page):
        if block.language == "bash":
            for arguments, _ in commands(block):
                check(arguments)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_named_file_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "benchmarks|configs|docs|proxytune|results|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*|[A-Z]+\.md|[a-z-]+\.txt)`", text):
        assert name in WRITTEN or (ROOT / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_make_target_is_there(page: Path) -> None:
    code = "\n".join(
        [*re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")), *(b.body for b in blocks(page))]
    )
    listed = re.findall(r"^\.PHONY: (.*(?:\\\n.*)*)", MAKEFILE, re.MULTILINE)[0].split()
    listed += re.findall(r"\breproduce-[\w-]+", MAKEFILE)
    for target in re.findall(r"^make ([a-z][a-z0-9-]*)", code, re.MULTILINE):
        assert target in listed, target


def test_the_table_of_commands_is_complete() -> None:
    named = set(re.findall(r"`proxytune ([a-z-]+)", (ROOT / "docs" / "README.md").read_text("utf-8")))
    assert set(typer.main.get_command(app).commands) <= named  # type: ignore[attr-defined]


def test_the_readme_is_short_and_links_to_every_page() -> None:
    assert len(README.splitlines()) <= 120
    linked = set(re.findall(r"\]\((docs/[a-z_-]+\.md)", README))
    assert {name_of(page) for page in PAGES[1:]} - {"docs/README.md"} <= linked


# What is generated


def test_the_page_of_commands_is_current() -> None:
    made = script("make_cli").page()
    assert made == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), "run `make docs`"


def test_the_picture_is_drawn_from_a_run(tmp_path: Path) -> None:
    require_demo()
    folder = tmp_path / "picture"
    for role in ("base", "expert", "proxy", "tuned"):
        trace = ["--trace"] if role == "proxy" else []
        done = proxytune("eval", "gsm", "--as", role, "--limit", 24, *trace, "--out", folder / role)
        assert done.exit_code == 0, done.output
    drawn = script("make_picture").picture(folder, "23")
    numbers = re.compile(r"[\d.]+")  # shades and bars follow probabilities, which round by machine
    committed = (ROOT / "docs" / "images" / "token_view.svg").read_text(encoding="utf-8")
    assert numbers.sub("0", drawn) == numbers.sub("0", committed)
    answers = re.compile(r"\b[\d*+=]+\.")
    assert answers.findall(drawn) == answers.findall(committed)


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
