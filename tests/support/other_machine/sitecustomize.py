"""Makes a daemon one of another machine: Python imports this first, if its folder is in PYTHONPATH.

No lock of another daemon is seen by it.  TEST_MACHINE is the machine's name; with
TEST_NETWORK the nodes lie on a network file system as far as it knows.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace

from fusestore.system import linux
from fusestore.system.machine import Process

NAME = os.environ["TEST_MACHINE"]
_real = Process.current

Process.current = staticmethod(  # type: ignore[method-assign, assignment]
    lambda: replace(_real(), machine=NAME, host=NAME, boot=f"boot {NAME}")
)
fcntl.flock = lambda descriptor, operation: None  # type: ignore[assignment]
if os.environ.get("TEST_NETWORK"):
    linux.is_local = lambda descriptor: False
