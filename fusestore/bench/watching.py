"""Memory and CPU time of a daemon, from /proc/PID (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..limits import KIB


def cpu_seconds(process: int | None) -> float | None:
    """Return the user and system time of a process; None if there is no process."""
    if process is None:
        return None
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(process: int, field: str) -> float | None:
    """Return a field of /proc/PID/status, such as `VmHWM`; None if the process has exited."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) / KIB
    return None


@dataclass(slots=True)
class MemoryWatch:
    """The peak of the observed anonymous memory of a process."""

    process: int | None
    most_mib: float = 0.0

    def look(self) -> None:
        """Observe the process once."""
        if self.process is not None:
            self.most_mib = max(self.most_mib, memory_mib(self.process, "RssAnon") or 0.0)
