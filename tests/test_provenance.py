"""Where a run's figures come from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from proxytune import provenance


def test_secrets_stay_out_of_the_stored_command() -> None:
    command = [
        "/x/proxytune/__main__.py",
        "eval",
        "--api-key",
        "abc",
        "--hf-token=abc",
        "hf_abcdefghijkl",
        "a b",
    ]
    assert (
        provenance.without_secrets(command) == "proxytune eval --api-key '***' '--hf-token=***' '***' 'a b'"
    )


def test_a_checkout_is_named_by_its_commit(tmp_path: Path) -> None:
    assert provenance._git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "x"], check=True)
    commit = provenance._git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert provenance._git_commit(tmp_path) == f"{commit}+changes"


def test_what_is_recorded() -> None:
    made = provenance.provenance("1.0", "cpu", 2)
    assert made.proxytune == "1.0" and made.threads == 2 and "torch" in made.packages and made.command
