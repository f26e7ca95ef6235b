"""proxytune: steer a large language model at decoding time with a small tuned one (proxy-tuning).

At every step, logits = base + alpha * (expert - antiexpert). The public names are imported on first use, so
that `import proxytune` and `proxytune --help` stay quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.config import Sampling, System, load_system
    from proxytune.errors import UserError
    from proxytune.options import ApiOptions, CodeOptions, DecodeOptions, JudgeOptions, RunOptions
    from proxytune.runs import Chat, evaluate, load
    from proxytune.runs.steered import generate

__version__ = "0.2.0"
__all__ = [
    "ApiOptions",
    "Chat",
    "CodeOptions",
    "DecodeOptions",
    "JudgeOptions",
    "RunOptions",
    "Sampling",
    "System",
    "UserError",
    "evaluate",
    "generate",
    "load",
    "load_system",
]

__getattr__ = door(
    __name__,
    {
        "ApiOptions": "options",
        "Chat": "runs",
        "CodeOptions": "options",
        "DecodeOptions": "options",
        "JudgeOptions": "options",
        "RunOptions": "options",
        "Sampling": "config",
        "System": "config",
        "UserError": "errors",
        "evaluate": "runs",
        "generate": "runs.steered",
        "load": "runs",
        "load_system": "config",
    },
)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*__all__, "__version__"]
