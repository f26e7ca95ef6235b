"""A server in the OpenAI style over one running engine: a system and each of its roles as models that
anything can talk to.

    HTTP -> protocol (what may be asked) -> service (asyncio) -> engine thread -> open batch of a role

The engine thread alone touches models. Handlers hand it jobs, and it hands pieces back after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.server.app import build_app
    from proxytune.server.keys import read_key
    from proxytune.server.run import ServeCall, serve
    from proxytune.server.work.service import Service

__all__ = ["ServeCall", "Service", "build_app", "read_key", "serve"]

__getattr__ = door(
    __name__,
    {"ServeCall": "run", "Service": "work.service", "build_app": "app", "read_key": "keys", "serve": "run"},
)
