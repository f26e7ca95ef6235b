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
        assert words[1] == "demo" or path.stem in words[words.index("--system") + 1]
        assert words[1] != "eval" or words[2] in TASKS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_never_at_hand_is_called_unverified(path: Path) -> None:
    system = load_system(path)
    ships = all(
        spec is None or str(spec.model).startswith("demo://") for spec in (system.base, system.expert)
    )
    assert (
        "# Unverified" in path.read_text() or ". Unverified" in path.read_text().replace("\n#", "")
    ) != ships


TRIOS = {
    "olmo3-32b-chat": ("Olmo-3-1125-32B", "Olmo-3-1025-7B", "Olmo-3-7B-Instruct"),
    "olmo3-32b-think": ("Olmo-3-1125-32B", "Olmo-3-1025-7B", "Olmo-3-7B-Think"),
    "olmo2-13b-chat": ("OLMo-2-1124-13B", "OLMo-2-0425-1B", "OLMo-2-0425-1B-Instruct"),
    "olmo2-32b-chat": ("OLMo-2-0325-32B", "OLMo-2-0425-1B", "OLMo-2-0425-1B-Instruct"),
    "qwen3-14b-chat": ("Qwen3-14B-Base", "Qwen3-1.7B-Base", "Qwen3-1.7B"),
    "qwen3-14b-by-0.6b-chat": ("Qwen3-14B-Base", "Qwen3-0.6B-Base", "Qwen3-0.6B"),
    "qwen2.5-32b-r1": ("Qwen2.5-32B", "Qwen2.5-Math-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B"),
    "qwen2.5-14b-simplerl": ("Qwen2.5-14B", "Qwen2.5-1.5B", "Qwen-2.5-1.5B-SimpleRL-Zoo"),
    "llama3-70b-chat": ("Llama-3.1-70B", "Llama-3.1-8B", "Llama-3.1-8B-Instruct"),
    "gemma3-27b-chat": ("gemma-3-27b-pt", "gemma-3-1b-pt", "gemma-3-1b-it"),
    "smollm2-1.7b-chat": ("SmolLM2-1.7B", "SmolLM2-135M", "SmolLM2-135M-Instruct"),
}
"""The trios of today: base, antiexpert, and the expert that was tuned from that antiexpert."""


@pytest.mark.parametrize("name", TRIOS)
def test_an_antiexpert_is_what_the_expert_was_tuned_from(name: str) -> None:
    system = load_system(name)
    assert system.expert is not None and system.antiexpert is not None and "proxy" in system.roles
    models = [str(spec.model) for spec in (system.base, system.antiexpert, system.expert)]
    assert tuple(model.split("/")[1] for model in models) == TRIOS[name]
    header = load_text(name)
    weights = [float(size) for size in re.findall(r"([\d.]+) GB \(", header)]
    pair = 2 * weights[1] if "+ 2 x " in header else weights[1] + weights[2]
    [total] = re.findall(r"= ([\d.]+) GB of weights", header)
    assert float(total) == pytest.approx(weights[0] + pair, abs=0.11)


def load_text(name: str) -> str:
    """A system's header in one line."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")


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
    path.write_text(
        "base: {model: ./big, adapter: ../on-big}\n"
        "antiexpert: {model: ./small}\n"
        "tuned: {model: owner/name, adapter: ./tuned}\n"
        "experts: [{adapter: ./one}, {model: ./two, antiexpert: {model: ./three, adapter: ./four}}]\n"
    )
    found = load_system(path)
    one, two = found.experts
    specs = (found.base, found.antiexpert, found.tuned, one, two, two.antiexpert)
    places = [(spec.model, spec.adapter) for spec in specs if isinstance(spec, ModelSpec)]
    here = str(tmp_path)
    assert places == [
        (f"{here}/big", f"{tmp_path.parent}/on-big"),
        (f"{here}/small", None),
        ("owner/name", f"{here}/tuned"),
        (None, f"{here}/one"),
        (f"{here}/two", None),
        (f"{here}/three", f"{here}/four"),
    ]
