"""The versions of all components, for problem reports."""

from __future__ import annotations

import platform
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..format import erasure, store_rows

LIBRARIES = ("libfuse3", "libisal")
PACKAGES = ("pyfuse3", "lmdb", "trio", "cffi", "reedsolo", "xxhash")


def versions() -> dict[str, str]:
    """Return the versions by name; the version of an absent library is `missing`."""
    import_module("..serve.operations", __package__)  # loads libfuse3
    erasure.self_check(erasure.Code(2, 1))  # loads ISA-L
    found = {"fusestore": __version__, "format": str(store_rows.FORMAT)}
    found |= {"Python": platform.python_version(), "Linux": platform.release()}
    found |= {name: _library(name) for name in LIBRARIES}
    return found | {name: _package(name) for name in PACKAGES}


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _library(name: str) -> str:
    """Read the version from the name of the library file that this process maps."""
    maps = Path("/proc/self/maps").read_text(errors="replace")
    found = re.search(rf"/{name}\.so\.([0-9.]+)$", maps, re.M)
    return found[1] if found else "missing"
