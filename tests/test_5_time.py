"""A daemon whose time stops: killed clients."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.mounted_store import Store

pytestmark = pytest.mark.mounted

LOOKS_UP = "import os, sys\nwhile True: os.path.exists(f'{sys.argv[1]}/{os.urandom(8).hex()}')"
LISTS = "import os, sys\nwhile True: os.listdir(sys.argv[1])"
WRITES = """\
import os, sys
file = os.open(f"{sys.argv[1]}/{os.getpid()}", os.O_CREAT | os.O_WRONLY)
while True: os.pwrite(file, b"x", 0)
"""


def answers(store: Store, seconds: float = 6) -> bool:
    """Whether the event loop answers, asked without a request to the mount."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(seconds)
        client.connect(str(store.store / "control.sock"))
        client.sendall(b'{"command":"status","arguments":{}}\n')
        try:
            return client.recv(100) != b""
        except TimeoutError:
            return False


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    """Whether a condition becomes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.parametrize(
    ("processes", "doing"),
    [(1, LOOKS_UP), (2, LOOKS_UP), (4, LOOKS_UP), (3, LISTS), (2, WRITES)],
    ids=["1-looks-up", "2-look-up", "4-look-up", "3-list", "2-write"],
)
def test_the_daemon_goes_on_when_those_who_use_it_are_killed(
    make_store: Callable[..., Store], processes: int, doing: str
) -> None:
    store = make_store()
    store.mount()
    random.seed(f"{processes} {doing}")
    for _ in range(25):
        command = [sys.executable, "-E", "-S", "-c", doing, store.mountpoint]
        users = [subprocess.Popen(command) for _ in range(processes)]
        time.sleep(random.uniform(0.1, 0.2))
        number = random.choice([signal.SIGTERM, signal.SIGKILL])
        for user in users:
            user.send_signal(number)
        for user in users:
            assert user.wait() == -number
        assert answers(store)
    subprocess.run(["touch", store.mountpoint / "file"], check=True)
    made_at = time.time()
    users = [subprocess.Popen(command) for _ in range(processes)]
    time.sleep(0.2)
    for user in users:
        user.kill()
        user.wait()
    assert within(6, lambda: (store.status()["last_commit_at"] or 0) > made_at)
