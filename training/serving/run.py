"""A server that runs, until it is interrupted."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmgem.training.loading import load_checkpoint
from mmgem.training.search.index import SearchIndex
from mmgem.training.serving.app import create_app
from mmgem.training.serving.limits import Limits

HEADER_SECONDS = 10  # of a client, from its connection or its last answer to the end of the headers of a request


class Protocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, without the connections of clients that are slow to say what they want."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins a connection."""
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        """Ends an answer; the connection may be used for another."""
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        last = self.cycle

        def close() -> None:
            if self.cycle is last:
                self.transport.close()

        self.loop.call_later(HEADER_SECONDS, close)


def serve(
    model: str,
    index: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits = Limits(),
    allow_urls: bool | list[str] = False,
    allow_origins: Sequence[str] = (),
) -> None:
    """Serves a checkpoint.

    Args:
        model: Folder of a checkpoint, or a name on the Hub. Requests call it by the name of its folder, or on the Hub.
        index: Folder of an index of this model, for `/search`.
        host, port: Where to listen.
        limits: What is taken of a request.
        allow_urls: Whether pictures are fetched, see `load_image`.
        allow_origins: Of pages whose scripts may ask, such as `https://example.org`, or `*` (CORS).

    Raises:
        FileNotFoundError, ValueError: As `load_checkpoint` and `SearchIndex.load`, or if `host` is empty.
        OSError: If the port is taken.
    """
    if not host.strip():  # which would be every address of this machine
        raise ValueError(f"`host` is {host!r}; expected an address, such as 127.0.0.1, or 0.0.0.0 for all.")
    loaded, processor = load_checkpoint(model)
    processor.allow_urls = allow_urls
    opened = None if index is None else SearchIndex.load(index, loaded, processor)
    name = Path(model).resolve().name if Path(model).exists() else model
    app = create_app(name, loaded, processor, opened, limits, allow_origins)
    uvicorn.run(app, host=host, port=port, http=Protocol, timeout_graceful_shutdown=10, log_level="info")
