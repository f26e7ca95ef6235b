"""Every system that ships: it parses, and its header gives a command that names it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from proxytune.config import ModelSpec, load_system, system_names
from proxytune.errors import UserError
from proxytune.tasks import TASKS
from tests.support.checkout import ROOT

FOLDER = ROOT / "configs" / "systems"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_system_parses_by_name_and_by_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)  # relative folders: by name from here, by path from beside the file
    system = load_system(path)
    assert system == load_system(path.stem) and system.name == path.stem and system.description
    assert set(system.data) <= set(TASKS)
    named = [system.base, system.expert, system.antiexpert, system.tuned]
    assert all(spec.dtype != "auto" for spec in named if isinstance(spec, ModelSpec))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_says_what_it_is_what_it_needs_and_the_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    commands = re.findall(r"^#   (proxytune .*)$", header, re.MULTILINE)
    assert header.startswith("# ") and commands
    comment = header.replace("\n# ", " ").lower()
    assert "a cpu is enough" in comment or "estimated by arithmetic" in comment
    for command in commands:
        words = shlex.split(command)
        assert words[1] in {"demo", "eval", "generate"}
        assert words[1] == "demo" or words[-1] == path.stem or path.stem in words[words.index("--system") + 1]
        assert words[1] != "eval" or words[2] in TASKS


def test_the_systems_of_the_paper_and_of_today_are_there() -> None:
    chat_and_code = {f"llama2-{size}-{kind}" for size in ("13b", "70b") for kind in ("chat", "code", "gsm")}
    assert {"demo", "demo-mid", "llama2-13b-triviaqa", *chat_and_code} <= set(system_names())


def test_only_chat_models_have_a_chat_form() -> None:
    for name in system_names():
        system = load_system(name)
        expert = system.expert
        if name.endswith("-chat"):
            assert expert is not None and expert.chat == ("llama2" if "llama2" in name else "tokenizer")
            assert system.tuned is not None and system.tuned.chat == expert.chat
        if name.endswith(("-code", "-gsm", "-triviaqa")):
            assert expert is not None and expert.chat == "none"
        assert system.antiexpert is None or system.antiexpert.chat == "none"


def test_an_unknown_system_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean: .*llama2-13b-chat"):
        load_system("llama2-13b-chatt")


def test_relative_folders_of_shipped_systems_are_taken_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = load_system("llama2-13b-gsm").tuned
    assert tuned is not None and tuned.model == str(tmp_path / "models" / "llama2-gsm-13b")


def test_relative_folders_of_a_file_are_taken_from_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: {model: ./big}\n")
    assert load_system(path).base.model == str(tmp_path / "big")
