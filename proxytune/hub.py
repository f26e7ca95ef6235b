"""The Hugging Face hub: what of it is on disk already, and whether it can be reached for the rest.

The hub's own library tries for half a minute before it reports that there is no network. `require` reports
it at once.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from proxytune.errors import UserError

Kind = Literal["model", "dataset"]
SECONDS = 5.0
"""How long the hub may take to answer."""


def stored(name: str, kind: Kind = "model") -> bool:
    """Whether the hub's cache holds files of a repository (not whether it holds all of them)."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


@cache
def reachable() -> bool:
    """Whether the hub answers; asked once per process, through the proxies that the environment names."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS
        ):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, if not a friendly one
    except OSError:
        return False


def require(name: str, kind: Kind = "model") -> None:
    """UserError if a repository is not on disk and the hub cannot be asked for it."""
    if stored(name, kind) or reachable():
        return
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    if kind == "dataset":
        raise UserError(f"cannot load '{name}' from the hub: {why}. Give a file: --data FILE")
    raise UserError(
        f"cannot load '{name}': it is not on disk and {why}. A folder's name begins with ./, ../ or /"
    )
