"""Notifications for the service manager that started a daemon (sd_notify(3)).

Each message is one datagram to the socket in NOTIFY_SOCKET.  Without that variable
nothing is sent.  A task on the event loop sends keep-alive messages.  If the loop
hangs, they stop, and the manager ends the daemon (`WatchdogSec=`).  Opening and closing
a store may take long; during this the same task extends the timeout.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping

import trio

from ..text import printable

logger = logging.getLogger(__name__)

BEAT_SECONDS_MAX = 15.0
"""The longest time between keep-alive messages."""
EXTENSION_SECONDS = 60
"""How much time each message requests while the store is opened or closed."""
SEND_SECONDS_MAX = 1.0
"""How long the manager may take to accept a message; then it is dropped."""

_MORE_TIME = f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}"


class ServiceManager:
    """The service manager of this process, if there is one."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = address.replace("@", "\0", 1) if address[:1] in ("/", "@") else ""
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        try:
            self._watchdog_seconds = int(environment["WATCHDOG_USEC"]) / 1e6 if watched else 0.0
        except (KeyError, ValueError):
            self._watchdog_seconds = 0.0
        self._beat = _MORE_TIME
        self._status: Callable[[], str] = str

    @property
    def listens(self) -> bool:
        """Whether a manager expects messages."""
        return bool(self._address)

    def starting(self, status: str) -> None:
        """Report the daemon's status before it is ready."""
        self._status = lambda: status
        self._say(*self._signs_of_life())

    def ready(self, status: Callable[[], str]) -> None:
        """Report that the mount answers; from now on the watchdog is active."""
        self._beat, self._status = "WATCHDOG=1", status
        self._say("READY=1", *self._signs_of_life())

    def stopping(self, status: str) -> None:
        """Report that the daemon is stopping, and may need time for this."""
        self._beat, self._status = _MORE_TIME, lambda: status
        self._say("STOPPING=1", *self._signs_of_life())

    def _signs_of_life(self) -> tuple[str, str]:
        return self._beat, f"STATUS={self._status()}"

    async def keep_telling(self) -> None:
        """Send keep-alive messages at half the watchdog's interval, until cancelled."""
        seconds = min(BEAT_SECONDS_MAX, (self._watchdog_seconds or BEAT_SECONDS_MAX) / 2)
        while self._address:
            self._say(*self._signs_of_life())
            await trio.sleep(seconds)

    def _say(self, *lines: str) -> None:
        if not self._address:
            return
        message = "\n".join(printable(line.replace("\n", " ")) for line in lines)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(SEND_SECONDS_MAX)
            try:
                manager.sendto(message.encode(errors="replace"), self._address)
            except OSError as error:
                logger.warning("%r could not be sent to the service manager: %s", lines[0], error)
