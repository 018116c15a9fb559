"""A small HTTP server in its own threads: fixed paths, only GET and HEAD.

A connection lasts at most CLIENT_SECONDS, and there are at most CLIENTS_MAX: a new one
ends the oldest, so that silent clients keep nobody away.  A
server on the loopback address answers only requests for a name of the loopback.
Otherwise a web page could read it through a browser under a name of its own (DNS
rebinding).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import FusestoreError

logger = logging.getLogger(__name__)

CLIENTS_MAX = 16
CLIENT_SECONDS = 15.0
POLL_SECONDS = 0.1

_ALWAYS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[str], Answer]
"""Answers a request with this Accept header, in any thread.

The answer to a FusestoreError is 503 with its message.
"""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_SECONDS

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        text = b"This server answers only GET and HEAD.\n"
        refused = Answer(text, status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "GET, HEAD"})
        self._send(refused)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST  # noqa: N815

    def _answer(self) -> Answer:
        if self.server.local and not is_loopback(self.headers.get("Host", "")):
            text = b"Use a name of the loopback address, for example localhost.\n"
            return Answer(text, status=HTTPStatus.FORBIDDEN)
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            paths = " ".join(self.server.routes)
            return Answer(f"The paths are: {paths}\n".encode(), status=HTTPStatus.NOT_FOUND)
        try:
            return route(self.headers.get("Accept", ""))
        except FusestoreError as error:
            return Answer(f"{error}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
        except Exception:
            logger.exception("%s could not be answered", self.path)
            text = b"Unexpected error: see the daemon's log.\n"
            return Answer(text, status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        fixed = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        for name, value in {**_ALWAYS, **answer.headers, **fixed}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "fusestore"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = CLIENTS_MAX

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, _, _, _, address = found[0]
        self.routes = routes
        self.local = is_loopback(str(address[0]))
        self._since: dict[socket.socket, float] = {}
        super().__init__(address, _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look up its own name

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._since) >= CLIENTS_MAX:  # the oldest has had the most time
            oldest = min(self._since.items(), key=lambda item: item[1], default=None)
            if oldest is not None:
                self._end(oldest[0])
                self._since.pop(oldest[0], None)
        self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._since.pop(request, None)
        super().close_request(request)

    def service_actions(self) -> None:
        for request, since in list(self._since.items()):
            if time.monotonic() - since > CLIENT_SECONDS:
                self._end(request)

    @staticmethod
    def _end(request: socket.socket) -> None:
        """End a connection; its thread then closes it."""
        with contextlib.suppress(OSError):  # it has just ended
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a client of the status page disconnected: %s", sys.exception())


class WebServer:
    """A server that runs from its creation until it is closed."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        """Listen; port 0 means any free port.  FusestoreError if it cannot listen."""
        try:
            self._server = _Server(host, port, routes)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FusestoreError(
                f"The server cannot listen on {_joined(host, port)}: {reason}."
            ) from error
        self.url = f"http://{_joined(host, self._server.server_address[1])}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_SECONDS,), name="web", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; blocks for at most POLL_SECONDS."""
        self._server.shutdown()
        self._server.server_close()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether a Host header or an address names the loopback of this machine."""
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
