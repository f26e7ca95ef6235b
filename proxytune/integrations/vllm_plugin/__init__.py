"""Proxy-tuning inside an unforked vLLM: a model of several models, which vLLM finds by an entry point.

`register` is that entry point: it runs in the server, the engine and every worker. Here nothing of vLLM is
imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxytune.lazy import door

if TYPE_CHECKING:
    from proxytune.integrations.vllm_plugin.decoder import VllmDecoder, vllm_decoder
    from proxytune.integrations.vllm_plugin.launch import VllmLaunch
    from proxytune.integrations.vllm_plugin.server import serve_vllm

__all__ = ["VllmDecoder", "VllmLaunch", "register", "serve_vllm", "vllm_decoder"]

ARCHITECTURE = "ProxyTunedForCausalLM"
HOME = "proxytune.integrations.vllm_plugin"


def register() -> None:
    """Tell vLLM of the model."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{HOME}.model:{ARCHITECTURE}")


__getattr__ = door(
    __name__,
    {
        "VllmDecoder": "decoder",
        "VllmLaunch": "launch",
        "serve_vllm": "server",
        "vllm_decoder": "decoder",
    },
)
