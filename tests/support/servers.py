"""A server of ours in this process, and what to ask it with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, ServeOptions
from proxytune.server.run import GracefulServer, ServeCall, listening, server_of


@dataclass
class Served:
    """A server that runs."""

    url: str
    server: GracefulServer

    def idle(self) -> bool:
        """Whether nothing is under way, and no KV is held."""
        service = self.server.service
        rows = sum(batch.running + batch.waiting for batch in service.batches.values())
        kv = sum(tokens for batch in service.batches.values() for _, tokens, _ in batch.kv())
        return service.open == 0 and rows == 0 and kv == 0

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing is under way."""
        until = time.monotonic() + seconds
        while not self.idle():
            assert time.monotonic() < until, "something is still under way"
            time.sleep(0.02)


@contextmanager
def served(
    models: Models,
    options: ServeOptions | None = None,
    *,
    key: str | None = None,
    decode: DecodeOptions | None = None,
    allow_negative_alpha: bool = False,
) -> Iterator[Served]:
    """A server of these models on a free port, until the end of the block."""
    asked = options or ServeOptions(port=0)
    call = ServeCall(models, asked, decode or DecodeOptions(), allow_negative_alpha, lambda note: None)
    with listening(asked) as listener:
        server = server_of(call, key)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
        finally:
            server.service.drain()
            server.should_exit = True
            thread.join()
