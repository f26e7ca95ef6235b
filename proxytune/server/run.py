"""`serve`: bind, load, answer, and end well."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from proxytune.config import Role, System
from proxytune.decoding import Decoder
from proxytune.decoding.open_batch import OpenBatch
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import DecodeOptions, ServeOptions
from proxytune.server.answers.protocol import RANKED
from proxytune.server.app import build_app
from proxytune.server.guards import LOCAL
from proxytune.server.keys import KEY_NAME, read_key
from proxytune.server.playground import playground
from proxytune.server.work.meters import Meters
from proxytune.server.work.service import Service

MOST_CONNECTIONS = 4096
"""Beyond them uvicorn answers 503 by itself."""


@dataclass(frozen=True)
class ServeCall:
    """What is served, and how."""

    models: Models
    options: ServeOptions
    decode: DecodeOptions
    allow_negative_alpha: bool = False
    note: Callable[[str], None] = print
    """Hears what the person who starts the server should know."""

    @property
    def system(self) -> System:
        """The system whose models answer."""
        return self.models.system


def serve(call: ServeCall) -> None:
    """Answer until SIGINT or SIGTERM. UserError, before anything is loaded, for a port in use, a key that
    cannot be read, or a role that the system has not."""
    key = read_key(call.options)
    served_roles(call.system, call.options.roles)
    with listening(call.options) as listener:
        server = server_of(call, key)
        host, port = call.options.host, listener.getsockname()[1]
        if host not in LOCAL and key is None:
            call.note(f"warning: whoever reaches {host}:{port} can use it: set {KEY_NAME} or --api-key-file")
        shown = f"[{host}]" if ":" in host else host
        call.note(f"serving {', '.join(server.service.models)} at http://{shown}:{port}")
        _settle_memory()
        server.run(sockets=[listener])


def _settle_memory() -> None:
    """What is loaded by now stays: the collector leaves it out. Each time that it goes through all of it, no
    stream gets a token (0.3 s with the demo; docs/server.md, Speed)."""
    gc.collect()
    gc.freeze()


def server_of(call: ServeCall, key: str | None) -> GracefulServer:
    """Load what is served -> a server that is ready to run, with the playground at `/`."""
    roles = served_roles(call.system, call.options.roles)
    batches = {role: open_batch(call, role) for role in roles}
    service = Service(call.system, batches, call.options, Meters())
    home = playground(call.system, service.models)
    app = build_app(service, allow_negative_alpha=call.allow_negative_alpha, key=key, home=home)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=int(call.options.shutdown_seconds) + 5,
        server_header=False,
    )
    return GracefulServer(config, service)


class GracefulServer(uvicorn.Server):
    """uvicorn's server, which lets the service know when it is told to end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """`service` is what the configured application answers with."""
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT or SIGTERM: no more requests, and those under way have a while. A second SIGINT ends
        them."""
        self.service.drain()
        super().handle_exit(sig, frame)


def served_roles(system: System, named: str | None) -> tuple[Role, ...]:
    """The roles that are served: the proxy first, as its models load the others'. UserError for one that the
    system has not."""
    if named is None:
        found: tuple[Role, ...] = system.roles
    else:
        found = tuple(dict.fromkeys(system.require(role.strip()) for role in named.split(",")))
    return tuple(sorted(found, key=lambda role: role != "proxy"))


def open_batch(call: ServeCall, role: Role) -> OpenBatch:
    """The batch of a role. Its notes are passed on."""
    decoder = Decoder(call.models, role, call.decode)
    for note in decoder.notes():
        call.note(f"note: {note}")
    return OpenBatch(decoder, RANKED)


def listening(options: ServeOptions) -> socket.socket:
    """A socket that listens. UserError for an address that is in use or is none."""
    where = f"--host {options.host} --port {options.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"{where}: no such address: {error}") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # who takes nothing for so long is cut off by the kernel
            stalled = int(1000 * options.stalled_seconds)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled)
        found.bind(address)
        found.listen(512)
    except OSError as error:
        found.close()
        raise UserError(f"{where}: {error.strerror}: choose another one, or 0 for any free port") from None
    return found
