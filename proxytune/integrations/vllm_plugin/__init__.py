"""Proxy-tuning inside an unforked vLLM: a model of several models, which vLLM finds by an entry point.

Nothing of vLLM is imported here before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.integrations.vllm_plugin.decoder import VllmDecoder, vllm_decoder
    from proxytune.integrations.vllm_plugin.launch import VllmLaunch
    from proxytune.integrations.vllm_plugin.registration import register
    from proxytune.integrations.vllm_plugin.server import serve_vllm

__all__ = ["VllmDecoder", "VllmLaunch", "register", "serve_vllm", "vllm_decoder"]

__getattr__ = door(
    __name__,
    {
        "VllmDecoder": "decoder",
        "VllmLaunch": "launch",
        "register": "registration",
        "serve_vllm": "server",
        "vllm_decoder": "decoder",
    },
)
