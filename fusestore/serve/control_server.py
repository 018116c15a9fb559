"""The lock of a store, and the server of the control socket.

The process that has a store open holds the lock on `STORE/fusestore.lock`.  A
daemon also listens on `STORE/control.sock` (mode 0600).  It obeys root and its own
user.  The protocol is in control_client.py.

A handler runs on the event loop, like a file operation.  When its client hangs up
or the server ends, it is cancelled at any of its awaits.  A handler that ends the
daemon must shield itself; its answer is then sent.
"""

from __future__ import annotations

import contextlib
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
from ..system.beneath import WRONG_KIND, open_file
from .control_client import (
    ALIVE_SECONDS,
    ANSWER_BYTES_MAX,
    NOT_WRITABLE,
    PEER,
    REQUEST_BYTES_MAX,
    Message,
    Progress,
    abstract_address,
    encode,
    error_message,
    lock_holder,
    parse_peer,
    socket_address,
)

logger = logging.getLogger(__name__)

Handler = Callable[[Message, Progress], Awaitable[Message]]
"""Runs a command: takes its arguments and a callback for progress, and returns the result.

The callback runs on the event loop, without an await.  A slow client gets only the
newest progress.
"""


# --- the lock ----------------------------------------------------------------


@contextmanager
def lock_store(store: Path) -> Iterator[None]:
    """Hold the lock of the store; StoreBusyError, with the holder's number, if it is in use.

    A medium that cannot be written to is locked, too, without the number.
    """
    fd, is_written = _open_lock(store)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock_holder(store)
            who = f"process {holder}" if holder else "another process"
            raise StoreBusyError(f"{store} is in use by {who}.") from None
        if is_written:
            os.truncate(fd, 0)
            with contextlib.suppress(OSError):  # a full disk has no room for the number
                os.write(fd, b"%d\n" % os.getpid())
        try:
            yield
        finally:
            if is_written:
                os.truncate(fd, 0)
    finally:
        os.close(fd)


def _open_lock(store: Path) -> tuple[int, bool]:
    """Open the lock file, or else what there is to lock; and whether it can be written to."""
    file = store / LOCK_NAME
    try:
        return open_file(file, os.O_RDWR | os.O_CREAT), True
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            hint = " Move it away." if error.errno in WRONG_KIND else ""
            raise FusestoreError(f"{file} cannot be opened: {error.strerror}.{hint}") from error
    try:
        return open_file(file, os.O_RDONLY), False
    except FileNotFoundError:
        return os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), False


# --- the server --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """Limits on the clients of a daemon."""

    clients: int = 16
    """Requests that are served at a time."""
    silent: int = 64
    """Connections that have not sent their request; one more, and the oldest is ended."""
    request_bytes: int = REQUEST_BYTES_MAX
    request_seconds: float = 10.0
    """How long after it connects a client may take to send its request."""
    send_seconds: float = 10.0
    """How long a client may take to receive a line."""
    alive_seconds: float = ALIVE_SECONDS


class ControlServer:
    """Answers commands on a store's socket."""

    def __init__(
        self, handlers: Mapping[str, Handler], limits: ControlLimits | None = None
    ) -> None:
        self._handlers = dict(handlers)
        self._limits = limits or ControlLimits()
        self._clients = 0
        self._silent: dict[_Connection, trio.CancelScope] = {}
        """The connections without a request, the oldest first."""

    async def serve(
        self,
        directory: Path,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen in `directory` until cancelled; started when a client can connect.

        The caller must hold the store's lock: an existing socket is replaced as that of a
        dead daemon.  FusestoreError if it cannot listen.
        """
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                listening = _listen(fd)
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            except OSError as error:
                raise FusestoreError(
                    f"The socket {directory / SOCKET_NAME} cannot be opened: {error.strerror}."
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
        """Serve one connection; its errors do not leave this function."""
        connection = _Connection(stream, self._limits)
        try:
            _check_peer(stream)
            request = await self._request(connection)
            if request is not None:
                await self._serve_request(connection, *request)
        except FusestoreError as error:
            await connection.send(encode(error_message(error)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except Exception:
            logger.exception("a client of the control socket could not be served")
        finally:
            stream.socket.close()

    async def _request(self, connection: _Connection) -> tuple[str, Message] | None:
        """Receive a request; None if others needed the place of a client that sent none."""
        if len(self._silent) >= self._limits.silent:  # the oldest has had the most time
            next(iter(self._silent.values())).cancel()
            self._silent.pop(next(iter(self._silent)))
        with trio.CancelScope() as scope:
            self._silent[connection] = scope
            try:
                return await connection.request()
            finally:
                self._silent.pop(connection, None)
        return None

    async def _serve_request(
        self, connection: _Connection, command: str, arguments: Message
    ) -> None:
        if self._clients >= self._limits.clients:
            raise FusestoreError(
                f"The daemon already has {self._limits.clients} clients: try again later."
            )
        self._clients += 1
        try:
            await self._serve_command(connection, command, arguments)
        finally:
            self._clients -= 1

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
            # At once and shielded: a cancellation must not lose the answer to a finished command.
            await connection.send(answer)
            nursery.cancel_scope.cancel()


async def _outcome(handler: Handler, command: str, arguments: Message, progress: Progress) -> bytes:
    """Return the last line for a client: the result or the error of the handler."""
    try:
        line = encode({"result": await handler(arguments, progress)})
        if len(line) > ANSWER_BYTES_MAX:
            raise FusestoreError(f"The answer to {command!r} is too long for the control socket.")
        return line
    except Exception as error:
        cause = _single(error)
        if isinstance(cause, FusestoreError):
            return encode(error_message(cause))
        logger.exception("the command %r failed with an unexpected error", command)
        unexpected = f"The command {command!r} failed unexpectedly: see the daemon's log."
        return encode(error_message(FusestoreError(unexpected)))


def _single(error: Exception) -> Exception:
    """Unwrap an exception from the groups of nurseries if it is the only one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Connection:
    """A connection: receives one request, and sends lines.

    A line is sent as a whole, or the connection is given up: sending is shielded from
    cancellation, and has a deadline.
    """

    def __init__(self, stream: trio.SocketStream, limits: ControlLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._sending = trio.Lock()
        self._news = trio.Event()
        self._progress: bytes | None = None

    async def request(self) -> tuple[str, Message]:
        """Receive the command and its arguments; UsageError if they are invalid."""
        line = bytearray()
        with trio.move_on_after(self._limits.request_seconds) as scope:
            while b"\n" not in line:
                data = await self._stream.receive_some(1 << 16)
                if not data:
                    raise trio.BrokenResourceError("hung up")
                line += data
                if len(line) > self._limits.request_bytes:
                    raise UsageError(
                        f"A request may have at most {self._limits.request_bytes} bytes."
                    )
        if scope.cancelled_caught:
            raise UsageError(f"No request came within {self._limits.request_seconds:g} seconds.")
        try:
            message = json.loads(line)
            command, arguments = message["command"], message.get("arguments", {})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UsageError("A request must be one line of JSON with a command.") from None
        if not isinstance(command, str) or not isinstance(arguments, dict):
            raise UsageError("A request must have the name of a command, and arguments by name.")
        return command, arguments

    def tell(self, progress: Message) -> None:
        """Make `talk` send this progress; it replaces progress that is not yet sent."""
        self._progress = encode({"progress": progress})
        self._news.set()

    async def talk(self, scope: trio.CancelScope) -> None:
        """Send progress as it comes, and else a sign of life, until cancelled."""
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
        """Send a line as a whole; False if the client is gone, or too slow."""
        with trio.CancelScope(shield=True), trio.move_on_after(self._limits.send_seconds):
            async with self._sending:
                try:
                    await self._stream.send_all(line)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return False
                return True
        return False


def _listen(directory_fd: int) -> socket.socket:
    """Open a listening socket in an open directory, or without a file; OSError."""
    writable = True
    try:
        os.unlink(SOCKET_NAME, dir_fd=directory_fd)
    except OSError as error:  # binding fails if it is still there
        writable = error.errno not in NOT_WRITABLE
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the name the mode of the socket, so the name never has another mode.
        os.fchmod(listening.fileno(), 0o600)
        try:
            listening.bind(socket_address(directory_fd))
        except OSError as error:
            if writable and error.errno not in NOT_WRITABLE:
                raise
            listening.bind(abstract_address(directory_fd))
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
    """Raise UsageError unless the client is root or the daemon's user."""
    data = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    _pid, uid = parse_peer(data)
    if uid not in (0, os.geteuid()):
        raise UsageError("The daemon obeys only root and its own user.")
