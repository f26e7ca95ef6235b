"""The leave to run the code of stored rows, the account of it, and how verdicts are settled."""

from __future__ import annotations
