"""The conditions of a run: the machine, its software and its file systems."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..system.mounts import MOUNTINFO, parse_entries
from .workloads import drop_caches


def surroundings() -> dict[str, str]:
    """Return the conditions of a run by name."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "fusestore": __version__,
        "pyfuse3": metadata.version("pyfuse3"),
        "Python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "memory": f"{memory:.1f} GiB",
        "load": f"{os.getloadavg()[0]:.2f} before the start",
        "caches": "dropped before each cold measurement"
        if drop_caches()
        else "NOT dropped (this needs root): cold reads may come from memory",
    }


def processor() -> str:
    """Return the model name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def file_system(path: Path) -> str:
    """Return the type and the device of the file system that contains `path`."""
    resolved = path.resolve()
    best, answer = Path("/"), "unknown"
    for entry in parse_entries(MOUNTINFO.read_bytes()):
        if resolved.is_relative_to(entry.place) and len(entry.place.parts) >= len(best.parts):
            best, answer = entry.place, f"{entry.kind} on {os.fsdecode(entry.source)}"
    return answer
