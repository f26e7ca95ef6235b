"""Where a run's figures come from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from proxytune import provenance


def test_secrets_stay_out_of_the_stored_command() -> None:
    command = [
        "/x/proxytune/__main__.py",
        "eval",
        "--api-key",
        "abc",
        "--hf-token=abc",
        "plain",
        "hf_abcdefghijkl",
        "a b",
    ]
    assert (
        provenance.without_secrets(command)
        == "proxytune eval --api-key '***' '--hf-token=***' plain '***' 'a b'"
    )


def test_a_checkout_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "proxytune" / "provenance.py"))

    def committed() -> str | None:
        return provenance.provenance("1.0", "cpu", 1).git_commit

    assert committed() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "x"], check=True)
    commit = committed()
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert committed() == f"{commit}+changes"


def test_what_is_recorded() -> None:
    made = provenance.provenance("1.0", "cpu", 2)
    assert made.proxytune == "1.0" and made.threads == 2 and "torch" in made.packages and made.command
