"""The HTTP server. Clients that send half a request, or do not read the response, lock nobody out."""

import asyncio
import resource
import socket
from typing import Any, ClassVar

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from dpo_jax.errors import UserError

REQUEST_SECONDS = 15.0
"""Time from the first byte of a request (or from connecting) to its last byte."""
RESPONSE_SECONDS = 180.0
"""Time from there until the response is sent and the next request begins. Images over a slow connection take long."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 64
"""File descriptors for everything else: the votes, images."""


class TimeoutProtocol(H11Protocol):
    """Closes connections that take too long and, if there are too many, the one that has been idle longest."""

    _connections: ClassVar[dict["TimeoutProtocol", None]] = {}
    """In the order of their latest progress, the oldest first."""
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._is_receiving = True
        self._whole: RequestResponseCycle | None = None
        self._wait(REQUEST_SECONDS)
        if len(self._connections) > self.max_connections:
            halves = (other for other in self._connections if other._is_receiving)
            next(halves, next(iter(self._connections))).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._receive()
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()
        if self.cycle is not self._whole or self.conn.trailing_data[0]:  # part of the next request has already arrived
            self._receive()

    def _receive(self) -> None:
        if not self._is_receiving:
            self._is_receiving = True
            self._wait(REQUEST_SECONDS)

    def _look(self) -> None:
        """Start the time limit of the response once the request is complete."""
        if self.cycle is not None and self.cycle is not self._whole and not self.cycle.more_body:
            self._whole, self._is_receiving = self.cycle, False
            self._wait(RESPONSE_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._connections.pop(self, None)
        self._connections[self] = None
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)


def make_server(app: Starlette) -> uvicorn.Server:
    """Return a server for as many connections as the operating system allows this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    files = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    TimeoutProtocol.max_connections = max(files - SPARE_FILES, 1)
    # Always the same HTTP parser, whatever else is installed. Nothing here needs web sockets.
    switched_off: dict[str, Any] = {"ws": "none", "lifespan": "off", "server_header": False, "proxy_headers": False}
    config = uvicorn.Config(app, http=TimeoutProtocol, log_level="error", **switched_off)
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address. Raises UserError with the reason if that fails."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address
        raise UserError(f"cannot serve on {host}:{port} ({reason}); choose another --port or --host") from error


def link(listener: socket.socket, path: str) -> str:
    """Return the address of a path, with the name of this machine if it is served on all addresses."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
