"""Where a run's figures come from."""

from __future__ import annotations

import platform
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--key", "a", "b"], "--key '***' b"),
        (["--TOKEN", "a"], "--TOKEN '***'"),
        (["--secret=a", "b"], "'--secret=***' b"),
        (["--password", "a", "--credential", "b"], "--password '***' --credential '***'"),
        (["--max-new-tokens", "8"], "--max-new-tokens 8"),
        (["--api-key-file", "a"], "--api-key-file a"),
        (["--key=", "a"], "'--key=***' a"),
        (["token", "a"], "token a"),
        (["key=a"], "key=a"),
        (["sk-abcdefgh", "sk-abcdefg"], "'***' sk-abcdefg"),
        (["ghp_12345678", "github_pat_12345678", "hf_12345678"], "'***' '***' '***'"),
        (["--url=http://x/hf_12345678/y"], "'--url=http://x/***/y'"),
        (["/a/b"], "/a/b"),
    ],
)
def test_what_is_hidden_of_a_command(words: list[str], shown: str) -> None:
    assert provenance.without_secrets(["/usr/bin/proxytune", *words]) == f"proxytune {shown}"


def test_where_and_with_what_a_run_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.99")
    monkeypatch.setattr(platform, "platform", lambda: "a machine")
    monkeypatch.setattr(sys, "argv", ["/x/proxytune", "eval"])
    monkeypatch.setattr(provenance, "_version", {"torch": "2", "triton": None}.get)
    made = provenance.provenance("1.0", "gpu", 3)
    assert (made.python, made.platform, made.device, made.command) == (
        "3.99",
        "a machine",
        "gpu",
        "proxytune eval",
    )
    assert made.packages == {"torch": "2"}, "those that are there"
    assert set(provenance.PACKAGES) == {
        "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "numpy",
        "bitsandbytes", "triton",
    }  # fmt: skip
