"""The protocol of the control socket, and its client.

A client connects, sends one line of JSON and gets lines of JSON:

    {"command": "repair", "arguments": {"node": "us-east-1"}}
                                        {"progress": {...}}     any number
                                        {"alive": true}         if there is no progress
                                        {"result": {...}}       or, as the last line,
                                        {"error": {"kind": "UsageError", "message": "..."}}

Texts are ASCII with JSON escapes.  Bytes of a path that are not UTF-8 are lone
surrogates, as in `os.fsdecode`.  If the client hangs up, its command is cancelled.

This module imports neither trio nor the store, so that a command starts fast.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .. import errors
from ..config.store_config import LOCK_NAME, SOCKET_NAME
from ..errors import FusestoreError, NotMountedError, UsageError
from ..system.beneath import read_small
from ..typed_json import FieldError, from_json, to_json
from .messages.request import Request, result_of

R = TypeVar("R")
Message = dict[str, Any]
Progress = Callable[[Message], None]

REQUEST_BYTES_MAX = 1 << 20
"""The longest line that a daemon reads."""
ANSWER_BYTES_MAX = 1 << 26
"""The longest line that a client reads; the layout of a large file is long."""
ALIVE_SECONDS = 5.0
"""A daemon that works on a command sends a line at least this often."""
SILENCE_SECONDS = 60.0
"""How long a client waits for a line before it gives up."""

LOCK_BYTES_MAX = 32
"""The lock file has the number of a process."""
NOT_WRITABLE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Why files cannot be made in a store whose files can be read."""
PEER = struct.Struct("3i")
"""The value of SO_PEERCRED: process, user, group."""


class UnansweredError(FusestoreError):
    """A daemon accepted a request and did not answer it."""


def socket_address(directory_fd: int) -> str:
    """Return the address of the socket in an open directory with a path of any length.

    An address has room for 107 bytes only.
    """
    return f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}"


def abstract_address(directory_fd: int) -> bytes:
    """Return the address of a socket without a file, for a directory that cannot be written to.

    Any process may take it first, so the client looks at the user of the daemon.
    """
    found = os.fstat(directory_fd)
    return b"\0fusestore/%d/%d" % (found.st_dev, found.st_ino)


def parse_peer(data: bytes) -> tuple[int, int]:
    """Return the process number and the user of the peer from a value of SO_PEERCRED."""
    pid, uid, _gid = PEER.unpack(data)
    return pid, uid


def _peer_pid(connection: socket.socket) -> int:
    return parse_peer(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[0]


def lock_holder(store: Path) -> int | None:
    """Return the process that holds the store's lock, or crashed while it held the lock."""
    try:
        return int(read_small(store / LOCK_NAME, LOCK_BYTES_MAX))
    except (OSError, ValueError):
        return None


def encode(message: Message) -> bytes:
    """Encode a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def error_message(error: FusestoreError) -> Message:
    """Return the message that makes the client raise `error`."""
    return {"error": {"kind": type(error).__name__, "message": str(error)}}


def error_of(kind: str, message: str) -> FusestoreError:
    """Return the exception of an `error_message`; FusestoreError for an unknown kind."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FusestoreError):
        return found(message)
    return FusestoreError(message)


class ControlClient:
    """A client of a store's daemon; it makes one connection for each command."""

    def __init__(self, store: Path, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._store = store
        self._silence_seconds = silence_seconds

    def daemon(self) -> int:
        """Return the process number of the daemon; NotMountedError if there is none."""
        with self._connect() as connection:
            return _peer_pid(connection)

    def ask(self, request: Request[R], on_progress: Progress | None = None) -> R:
        """Send a typed request, and return its typed result; raises the errors of `request`."""
        answer = self.request(request.command, to_json(request), on_progress)
        try:
            return from_json(result_of(type(request)), answer, exact=False)
        except FieldError as error:
            raise UnansweredError(
                f"The daemon of {self._store} sent an invalid answer: {error}."
            ) from error

    def request(
        self,
        command: str,
        arguments: Message | None = None,
        on_progress: Progress | None = None,
    ) -> Message:
        """Send `command` to the daemon, and return its result.

        Raises the error of the command; NotMountedError if no daemon listens;
        UnansweredError if the daemon is silent, or exits before it answers.
        """
        line = encode({"command": command, "arguments": arguments or {}})
        if len(line) > REQUEST_BYTES_MAX:
            raise UsageError(f"The arguments of {command!r} are too long for a request.")
        with self._connect() as connection:
            pid = _peer_pid(connection)
            try:
                self._send(connection, line)
                for message in self._messages(connection):
                    if "result" in message:
                        result: Message = message["result"]
                        return result
                    if "error" in message:
                        raise error_of(message["error"]["kind"], message["error"]["message"])
                    if "progress" in message and on_progress is not None:
                        on_progress(message["progress"])
            except TimeoutError:
                raise UnansweredError(
                    f"The daemon of {self._store} (process {pid}) did not answer "
                    f"for {self._silence_seconds:.0f} seconds."
                ) from None
            except (OSError, ValueError, TypeError, LookupError) as error:
                raise UnansweredError(
                    f"The daemon of {self._store} (process {pid}) sent an invalid answer: {error}."
                ) from error
        raise UnansweredError(
            f"The daemon of {self._store} (process {pid}) exited without an answer: see its log."
        )

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._silence_seconds)
        try:
            directory = os.open(self._store, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._reach(connection, directory)
            finally:
                os.close(directory)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            connection.close()
            raise NotMountedError(f"The store {self._store} is not mounted.") from None
        except PermissionError:
            connection.close()
            raise FusestoreError(
                f"You may not connect to the daemon of {self._store}: "
                "run the command as the daemon's user, or as root."
            ) from None
        except TimeoutError:
            connection.close()
            raise UnansweredError(
                f"The daemon of {self._store} accepted no connection "
                f"for {self._silence_seconds:.0f} seconds."
            ) from None
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _reach(connection: socket.socket, directory: int) -> None:
        """Connect to the daemon of an open directory; OSError."""
        try:
            connection.connect(socket_address(directory))
        except (FileNotFoundError, ConnectionRefusedError):  # or that of a daemon that died
            connection.connect(abstract_address(directory))
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
            _, uid = parse_peer(data)
            if uid not in (0, os.geteuid(), os.fstat(directory).st_uid):
                raise ConnectionRefusedError from None

    @staticmethod
    def _send(connection: socket.socket, line: bytes) -> None:
        try:
            connection.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon may have sent the reason before it hung up

    @staticmethod
    def _messages(connection: socket.socket) -> Iterator[Message]:
        """Yield the messages up to the end; ValueError if a line is invalid."""
        buffer = bytearray()
        while data := connection.recv(1 << 16):
            start = len(buffer)
            buffer += data
            if b"\n" in data:
                *lines, rest = bytes(buffer).split(b"\n")
                for line in lines:
                    yield json.loads(line)
                buffer = bytearray(rest)
            elif start > ANSWER_BYTES_MAX:
                raise ValueError("a line without end")
