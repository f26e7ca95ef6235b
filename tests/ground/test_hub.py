"""What of the hub is on disk, whether it answers, and what is said where neither is so."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from proxytune import hub
from proxytune.errors import UserError


def test_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a snapshot in it, of the right kind."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not hub.stored("org/name")
    snapshots = tmp_path / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    assert not hub.stored("org/name"), "nothing was fetched yet"
    (snapshots / "abc").mkdir()
    assert hub.stored("org/name") and not hub.stored("org/name", "dataset") and not hub.stored("org/other")
    (tmp_path / "datasets--org--data" / "snapshots" / "abc").mkdir(parents=True)
    assert hub.stored("org/data", "dataset") and not hub.stored("org/data", "model")


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        (io.BytesIO(), True),
        (urllib.error.HTTPError("u", 404, "no", Message(), None), True),
        (urllib.error.URLError("nobody"), False),
        (TimeoutError(), False),
    ],
)
def test_whether_the_hub_answers(answer: Any, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, float]] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> Any:
        asked.append((request.full_url, request.get_method(), timeout))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    assert hub.reachable.__wrapped__() is reached
    assert asked == [("https://hub.example", "HEAD", 5.0)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.reachable.__wrapped__() is False and len(asked) == 1, "nobody is asked"


@pytest.mark.parametrize(
    ("kind", "offline", "says"),
    [
        (
            "model",
            True,
            "cannot load 'o/n': it is not on disk and HF_HUB_OFFLINE is set. A folder's name begins "
            "with ./, ../ or /",
        ),
        (
            "model",
            False,
            "cannot load 'o/n': it is not on disk and https://hub.example does not answer. A "
            "folder's name begins with ./, ../ or /",
        ),
        ("dataset", True, "cannot load 'o/n' from the hub: HF_HUB_OFFLINE is set. Give a file: --data FILE"),
        (
            "dataset",
            False,
            "cannot load 'o/n' from the hub: https://hub.example does not answer. Give a file: --data FILE",
        ),
    ],
)
def test_what_cannot_be_had(kind: Any, offline: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"stored": False, "reachable": False}
    asked: list[tuple[str, str]] = []

    def stored(name: str, kind: str) -> bool:
        asked.append((name, kind))
        return there["stored"]

    monkeypatch.setattr(hub, "stored", stored)
    monkeypatch.setattr(hub, "reachable", lambda: there["reachable"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    with pytest.raises(UserError) as raised:
        hub.require("o/n", kind)
    assert str(raised.value) == says and asked == [("o/n", kind)]
    for name in there:
        monkeypatch.setitem(there, name, True)
        hub.require("o/n", kind)
        monkeypatch.setitem(there, name, False)
