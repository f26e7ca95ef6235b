"""`proxytune serve`: a system and its roles behind an API in OpenAI's style."""

from __future__ import annotations

from proxytune.cli import console
from proxytune.cli.options import (
    DECODING,
    ENGINE,
    SERVING,
    Alpha,
    NegativeAlpha,
    RemoteCode,
    SystemName,
    Vocab,
    grouped,
)
from proxytune.config import parse_alpha
from proxytune.errors import needs_extra
from proxytune.options import DecodeOptions, EngineOptions, ServeOptions


@grouped(options=SERVING, decode=DECODING, engine=ENGINE)
def serve(
    *,
    system: SystemName = "demo",
    alpha: Alpha = None,
    allow_negative_alpha: NegativeAlpha = False,
    vocab: Vocab = None,
    trust_remote_code: RemoteCode = False,
    options: ServeOptions,
    decode: DecodeOptions,
    engine: EngineOptions,
) -> None:
    """Serve a system in OpenAI's style, until Ctrl-C or SIGTERM.

    The proxy is the model S, each role alone is a model S/base, S/expert ... Every request may set alpha.
    Needs the extra `serve`.

    Example: proxytune serve --system demo --port 8000
    """
    engine.check()
    if engine.engine == "own":
        for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
            needs_extra("proxytune serve", package, "serve")
    made = console.read_system(system, vocab)
    made.require_one_process("serve")
    if alpha is not None:
        made.require("proxy")
        checked = parse_alpha(alpha).check(allow_negative=allow_negative_alpha)
        made = made.model_copy(update={"alpha": checked})

    from proxytune.models import Models

    models = Models(made, trust_remote_code=trust_remote_code, on_load=console.show_loading)
    if engine.engine == "vllm":
        from proxytune.integrations.vllm_plugin import VllmLaunch, serve_vllm
        from proxytune.server import read_key

        role = made.require(options.roles or "proxy")
        launch = VllmLaunch(models, role, made.alpha, decode, engine)
        key = read_key(options)
        serve_vllm(launch, options, key=key, allow_negative_alpha=allow_negative_alpha)
        return
    from proxytune.server import ServeCall
    from proxytune.server import serve as run

    run(ServeCall(models, options, decode, allow_negative_alpha, console.say))
