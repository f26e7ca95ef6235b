"""The server's page at `/`: a prompt, a slider for alpha, and all roles side by side, token by token."""

from __future__ import annotations

from proxytune.server.playground.page import playground

__all__ = ["playground"]
