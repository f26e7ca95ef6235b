"""What vLLM calls in its server, its engine and every worker: the entry point of `vllm.general_plugins`."""

from __future__ import annotations

ARCHITECTURE = "ProxyTunedForCausalLM"
HOME = "proxytune.integrations.vllm_plugin"


def register() -> None:
    """Tell vLLM of the model."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{HOME}.model:{ARCHITECTURE}")
