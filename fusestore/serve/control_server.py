"""The daemon's side of a store: it alone has it open, and it answers commands.

Who has a store open holds the lock on `STORE/fusestore.lock`.  If that is a
daemon, it listens on `STORE/control.sock` (mode 0600), for root and for its own
user; the protocol is in control_client.py.

A handler runs on the event loop like a file operation does.  It is cancelled
when its client hangs up or the server ends, at any of its awaits; one that ends
the daemon itself has to shield itself, and its answer is then sent.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from .. import __version__
from ..config.store_config import LOCK_NAME, SOCKET_NAME
from ..errors import FusestoreError, StoreBusyError, UsageError
from .control_client import (
    ALIVE_SECONDS,
    ANSWER_BYTES_MAX,
    PEER,
    REQUEST_BYTES_MAX,
    Message,
    Progress,
    encode,
    error_message,
    lock_holder,
    parse_peer,
    socket_address,
)

log = logging.getLogger(__name__)

Handler = Callable[[Message, Progress], Awaitable[Message]]
"""Does a command: takes its arguments and whom to tell of progress, returns the result.

Progress is told without an await, on the event loop; a slow client gets only the newest.
"""


# --- one process a store -----------------------------------------------------


@contextmanager
def lock_store(store: Path) -> Iterator[None]:
    """Hold the store alone; StoreBusyError, with the other's number, when it is in use."""
    file = store / LOCK_NAME
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FusestoreError(f"{file} cannot be opened: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock_holder(store)
            who = f"process {holder}" if holder else "another process"
            raise StoreBusyError(f"{store} is in use by {who}.") from None
        os.truncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
        try:
            yield
        finally:
            os.truncate(fd, 0)
    finally:
        os.close(fd)


# --- the server --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """What a client may take from the daemon."""

    clients: int = 16
    """Connections at a time."""
    request_bytes: int = REQUEST_BYTES_MAX
    request_seconds: float = 10.0
    """In which a client's request has to be there, from its connection on."""
    send_seconds: float = 10.0
    """In which a client has to take a line."""
    alive_seconds: float = ALIVE_SECONDS


class ControlServer:
    """Answers commands on a store's socket."""

    def __init__(
        self, handlers: Mapping[str, Handler], limits: ControlLimits | None = None
    ) -> None:
        self._handlers = dict(handlers)
        self._limits = limits or ControlLimits()
        self._clients = 0

    async def serve(
        self,
        directory: Path,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen in `directory` until cancelled; started once a client can connect.

        A socket that is there already is taken for a dead daemon's: hold the
        store's lock.  FusestoreError when it cannot listen.
        """
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(fd)))
            except OSError as error:
                raise FusestoreError(
                    f"{directory / SOCKET_NAME} cannot be listened on: {error.strerror}."
                ) from error
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(trio.serve_listeners, self._serve_client, [listener])
                    task_status.started()
            finally:
                _forget(fd)
        finally:
            os.close(fd)

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        """Serve one connection; nothing that goes wrong with it leaves here."""
        self._clients += 1
        connection = _Connection(stream, self._limits)
        try:
            if self._clients > self._limits.clients:
                raise FusestoreError(
                    f"The daemon has {self._limits.clients} clients already: try again later."
                )
            _check_peer(stream)
            command, arguments = await connection.request()
            await self._serve_command(connection, command, arguments)
        except FusestoreError as error:
            await connection.send(encode(error_message(error)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except Exception:
            log.exception("a client of the control socket could not be served")
        finally:
            self._clients -= 1
            stream.socket.close()

    async def _serve_command(
        self, connection: _Connection, command: str, arguments: Message
    ) -> None:
        handler = self._handlers.get(command)
        if handler is None:
            raise UsageError(
                f"The daemon (version {__version__}) does not know the command {command!r}."
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.wait_hangup, nursery.cancel_scope)
            nursery.start_soon(connection.talk, nursery.cancel_scope)
            answer = await _outcome(handler, command, arguments, connection.tell)
            # At once and shielded: a cancellation must not lose the answer to what was done.
            await connection.send(answer)
            nursery.cancel_scope.cancel()


async def _outcome(handler: Handler, command: str, arguments: Message, progress: Progress) -> bytes:
    """The last line for a client: what the handler returned or raised."""
    try:
        line = encode({"result": await handler(arguments, progress)})
        if len(line) > ANSWER_BYTES_MAX:
            raise FusestoreError(f"The answer to {command!r} is too long for the control socket.")
        return line
    except Exception as error:
        cause = _single(error)
        if isinstance(cause, FusestoreError):
            return encode(error_message(cause))
        log.exception("the command %r met an unexpected error", command)
        unexpected = f"The daemon met an unexpected error in {command!r}: see its log."
        return encode(error_message(FusestoreError(unexpected)))


def _single(error: Exception) -> Exception:
    """What a nursery wrapped, if it is one exception."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Connection:
    """A client: one request in, lines out.

    Lines are sent whole or the connection is given up: sending is shielded from
    cancellation, under a deadline.
    """

    def __init__(self, stream: trio.SocketStream, limits: ControlLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._sending = trio.Lock()
        self._news = trio.Event()
        self._progress: bytes | None = None

    async def request(self) -> tuple[str, Message]:
        """The command and its arguments; UsageError when they are not what they must be."""
        line = bytearray()
        with trio.move_on_after(self._limits.request_seconds) as scope:
            while b"\n" not in line:
                data = await self._stream.receive_some(1 << 16)
                if not data:
                    raise trio.BrokenResourceError("hung up")
                line += data
                if len(line) > self._limits.request_bytes:
                    raise UsageError(
                        f"A request may have {self._limits.request_bytes} bytes, not more."
                    )
        if scope.cancelled_caught:
            raise UsageError(f"No request came within {self._limits.request_seconds:g} seconds.")
        try:
            message = json.loads(line)
            command, arguments = message["command"], message.get("arguments", {})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UsageError("A request is one line of JSON with a command.") from None
        if not isinstance(command, str) or not isinstance(arguments, dict):
            raise UsageError("A request is a command's name and its arguments by name.")
        return command, arguments

    def tell(self, progress: Message) -> None:
        """Have `talk` send this instead of what it has not yet sent."""
        self._progress = encode({"progress": progress})
        self._news.set()

    async def talk(self, scope: trio.CancelScope) -> None:
        """Send progress as it comes, and a sign of life when none does, until cancelled."""
        while True:
            with trio.move_on_after(self._limits.alive_seconds):
                await self._news.wait()
            self._news = trio.Event()
            news, self._progress = self._progress, None
            if not await self.send(news or encode({"alive": True})):
                scope.cancel()

    async def wait_hangup(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the client hangs up."""
        try:
            while await self._stream.receive_some(1 << 12):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()

    async def send(self, line: bytes) -> bool:
        """Send a line whole; False when the client is gone or does not take it in time."""
        with trio.CancelScope(shield=True), trio.move_on_after(self._limits.send_seconds):
            async with self._sending:
                try:
                    await self._stream.send_all(line)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return False
                return True
        return False


def _listen(directory_fd: int) -> socket.socket:
    """A listening socket in an open directory; OSError when it cannot be."""
    address = socket_address(directory_fd)
    try:
        os.unlink(SOCKET_NAME, dir_fd=directory_fd)
    except FileNotFoundError:
        pass
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the name the mode of the socket, so it never has another one.
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(address)
        listening.listen(16)
    except OSError:
        listening.close()
        raise
    return listening


def _forget(directory_fd: int) -> None:
    try:
        os.unlink(SOCKET_NAME, dir_fd=directory_fd)
    except OSError:
        pass


def _check_peer(stream: trio.SocketStream) -> None:
    """UsageError unless the client is root or has the daemon's user."""
    data = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    _pid, uid = parse_peer(data)
    if uid not in (0, os.geteuid()):
        raise UsageError("Only root and the daemon's own user may give it commands.")
