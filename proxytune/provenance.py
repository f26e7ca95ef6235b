"""Where a run's figures come from: code, packages, machine and the command, without its secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from proxytune.records import Provenance

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
    "numpy",
    "bitsandbytes",
    "triton",
)
_SECRET_NAME = re.compile(r"(?i)(key|token|secret|password|credential)$")
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")


def provenance(version: str, device: str, threads: int) -> Provenance:
    """The code, the machine and the command of this process."""
    versions = {name: _version(name) for name in PACKAGES}
    return Provenance(
        proxytune=version,
        git_commit=_git_commit(Path(__file__).parent.parent),
        python=platform.python_version(),
        packages={name: found for name, found in versions.items() if found is not None},
        device=device,
        platform=platform.platform(),
        threads=threads,
        command=without_secrets(sys.argv),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """The checkout's commit, with `+changes` when tracked files differ from it; None for an installed
    package."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "--no-optional-locks"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return (head.stdout.strip() + ("+changes" if changed else "")) if head.returncode == 0 else None


def without_secrets(arguments: Sequence[str]) -> str:
    """A command line with the values of keys, tokens and passwords replaced by ***."""
    shown: list[str] = []
    hide = False
    for place, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        secret = argument.startswith("-") and _SECRET_NAME.search(name) is not None
        text = "***" if hide else f"{name}=***" if secret and equals else _SECRET_VALUE.sub("***", argument)
        hide = secret and not equals
        shown.append(_program(Path(text)) if place == 0 else text)
    return shlex.join(shown)


def _program(path: Path) -> str:
    """The name of a program; that of its package for `python -m`."""
    return path.parent.name if path.name == "__main__.py" else path.name
