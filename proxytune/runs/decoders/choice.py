"""Which decoder serves a role: that of models that run here, or that of a base behind an API."""

from __future__ import annotations

from collections.abc import Callable

from proxytune.black_box import ApiClient, BlackBoxDecoder
from proxytune.config import Role, RunSpec, System
from proxytune.decoding import Decoder
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import ApiOptions, DecodeOptions
from proxytune.runs.decoders.run_decoder import OpenDecoder, RunDecoder

AnyDecoder = Decoder | BlackBoxDecoder


def client_of(system: System, options: ApiOptions | None = None) -> ApiClient | None:
    """The client of a system's base; None where its weights are here."""
    return None if system.endpoint is None else ApiClient(system.endpoint, options or ApiOptions())


def decoder_for(
    models: Models,
    role: Role,
    how: DecodeOptions,
    *,
    client: ApiClient | None = None,
    defer: float | None = None,
    agreement: bool = False,
) -> AnyDecoder:
    """The decoder of a role. UserError for deferral without a base behind an API."""
    system = models.system
    if system.endpoint is None or role not in ("base", "proxy"):
        if defer is not None and role == "proxy":
            raise UserError(f"--defer is for a base behind an API: that of system '{system.name}' is here")
        return Decoder(models, role, how, agreement=agreement)
    if client is None:  # nobody agreed to what it costs
        system.local_base()
    assert client is not None
    return BlackBoxDecoder(models, role, how, client, defer if role == "proxy" else None)


def decoder_here(models: Models, client: ApiClient | None = None) -> OpenDecoder:
    """Decode in this process; `client` asks the base where it is behind an API."""

    def opened(spec: RunSpec, how: DecodeOptions) -> RunDecoder:
        agreement = spec.trace == "agreement"
        return decoder_for(models, spec.role, how, client=client, defer=spec.defer, agreement=agreement)

    return opened


def consent(client: ApiClient, ask: Callable[[], bool] | None) -> None:
    """UserError unless calls cost nothing or the user agrees to what they cost."""
    if client.agreed or client.options.yes or client.price == (0.0, 0.0):
        return
    if ask is None:
        raise UserError(
            f"the base ({client.spec}) costs money: add --yes to agree (and --max-cost USD for a limit), or "
            "--price 0,0 where it is free"
        )
    if not ask():
        raise UserError("nothing was asked")
    client.agreed = True
