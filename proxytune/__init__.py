"""proxytune: steer a large language model at decoding time with a small tuned one (proxy-tuning).

At every step, logits = base + alpha * (expert - antiexpert). The public names are imported on first use, so
that `import proxytune` and `proxytune --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.config import Sampling, System, load_system
    from proxytune.run import evaluate, generate

__version__ = "0.2.0"
__all__ = ["Sampling", "System", "evaluate", "generate", "load_system"]

_HOMES = {
    "System": "proxytune.config",
    "Sampling": "proxytune.config",
    "load_system": "proxytune.config",
    "generate": "proxytune.run",
    "evaluate": "proxytune.run",
}


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'proxytune' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
