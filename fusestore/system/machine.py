"""Which machine and which process this is, and whether a process still runs.

A machine is known by a hash of its machine-id(5), or by its host name where it has none,
and a running kernel by its boot id.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED = 19
"""The start time among the fields of /proc/PID/stat behind the command, from 0."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a machine."""

    machine: str
    """A hash of the machine's id."""
    host: str
    """The name of the machine, for people."""
    boot: str
    """The id of the running kernel; empty where it has none."""
    namespace: int
    """The inode of the namespace in which `number` counts; 0: unknown."""
    number: int
    started: int
    """In the kernel's ticks since the boot; 0: unknown."""

    @classmethod
    def current(cls) -> Process:
        """Return this process."""
        host = re.sub("[^A-Za-z0-9._-]", "?", os.uname().nodename)[:64]
        machine = _text(MACHINE_ID)
        machine = machine if re.fullmatch("[0-9a-f]{32}", machine) else f"host {host}"
        number = os.getpid()
        return cls(
            hashlib.sha256(f"fusestore {machine}".encode()).hexdigest()[:32],
            host,
            _text(BOOT_ID)[:64],
            _namespace(),
            number,
            _started(number),
        )

    def shares_machine(self, other: Process) -> bool:
        """Return whether both are of one machine, be it before and after a boot."""
        return self.machine == other.machine or self._shares_kernel(other)

    def sees_running(self, other: Process) -> bool:
        """Return whether another process is known to run, next to this one."""
        return (
            self._shares_kernel(other)
            and self.namespace == other.namespace != 0
            and self.number != other.number
            and _started(other.number) == other.started != 0
        )

    def _shares_kernel(self, other: Process) -> bool:
        return self.boot == other.boot != ""


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(number: int) -> int:
    """Return when a process began; 0 if it does not run."""
    fields = _text(Path(f"/proc/{number}/stat")).rpartition(")")[2].split()
    if len(fields) <= _STARTED or fields[0] in "ZX":
        return 0
    return int(fields[_STARTED])
