"""Models behind an API: one client for judges and for bases, what its calls cost, and the replies that are
paid for once.

The client is httpx2 with a deadline over all of a call and a largest reply. The `openai` package has neither,
and it retries on its own, which a limit on the cost cannot allow."""

from __future__ import annotations

from proxytune.endpoints import calls, endpoint, prices
from proxytune.endpoints.calls import Budget, CallQueue
from proxytune.endpoints.endpoint import CallFailed, CallLimits
from proxytune.endpoints.replies import ReplyStore

__all__ = [
    "Budget",
    "CallFailed",
    "CallLimits",
    "CallQueue",
    "ReplyStore",
    "calls",
    "endpoint",
    "prices",
]
