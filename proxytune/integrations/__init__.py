"""proxytune in the tools of others: thin adapters, one file per tool, imported by nobody but the command
line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.integrations.lm_eval import ProxyTunedLM
    from proxytune.integrations.lm_eval_cli import LmEvalCall, run_lm_eval

__all__ = ["LmEvalCall", "ProxyTunedLM", "run_lm_eval"]

__getattr__ = door(
    __name__,
    {"LmEvalCall": "lm_eval_cli", "ProxyTunedLM": "lm_eval", "run_lm_eval": "lm_eval_cli"},
)
