"""What a daemon tells the service manager that started it, as sd_notify(3) has it.

One datagram a message, to the socket in NOTIFY_SOCKET; without that nothing is
said.  A task on the event loop gives the signs of life, so that a loop that
hangs gives none, and the manager ends it (`WatchdogSec=`).  While the store is
opened or closed, which may take long, the same task asks for more time.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping

import trio

log = logging.getLogger(__name__)

BEAT_SECONDS_MAX = 15.0
"""A sign of life is given at least so often."""
EXTENSION_SECONDS = 60
"""So much time is asked for with each sign while the store is opened or closed."""
SEND_SECONDS_MAX = 1.0
"""A manager that does not take a message in this time does not get it."""

_MORE_TIME = f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1_000_000}"


class ServiceManager:
    """The manager of this process, if one waits to hear from it."""

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
        """Whether there is one."""
        return bool(self._address)

    def starting(self, status: str) -> None:
        """Say what the daemon does before it is ready."""
        self._status = lambda: status
        self._say(*self._signs_of_life())

    def ready(self, status: Callable[[], str]) -> None:
        """Say that the mount answers; from now on the watchdog counts."""
        self._beat, self._status = "WATCHDOG=1", status
        self._say("READY=1", *self._signs_of_life())

    def stopping(self, status: str) -> None:
        """Say that the daemon ends, and may need time for it."""
        self._beat, self._status = _MORE_TIME, lambda: status
        self._say("STOPPING=1", *self._signs_of_life())

    def _signs_of_life(self) -> tuple[str, str]:
        return self._beat, f"STATUS={self._status()}"

    async def keep_telling(self) -> None:
        """Give a sign of life at half the time of the watchdog, until cancelled."""
        seconds = min(BEAT_SECONDS_MAX, (self._watchdog_seconds or BEAT_SECONDS_MAX) / 2)
        while self._address:
            self._say(*self._signs_of_life())
            await trio.sleep(seconds)

    def _say(self, *lines: str) -> None:
        if not self._address:
            return
        message = "\n".join(line.replace("\n", " ") for line in lines)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(SEND_SECONDS_MAX)
            try:
                manager.sendto(message.encode(errors="replace"), self._address)
            except OSError as error:
                log.warning("the service manager cannot be told %r: %s", lines[0], error)
