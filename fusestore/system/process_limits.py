"""The limits that the operating system sets to this process: files, and address space.

Soft limits are raised to the hard ones.  When no descriptor is left, caches of open files
close what they do not need, and the open is retried.  A file that may not become longer counts
as one on a full device: what was accepted waits.  No node is to blame for this.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from ..errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")

OPEN_FILES_WANTED = 65536
"""More open files are never needed, and a higher limit slows some programs."""
RETRY_SECONDS = 5.0
_PAUSE_SECONDS = 0.02
_SHORT = (errno.EMFILE, errno.ENFILE)
_PROCESS_FILES = 64
"""Descriptors that do not belong to nodes: sockets, pipes, the metadata, clients."""
_NODE_FILES = 7
"""Descriptors of a node besides its cached segments: its directory, its lock, its owner record,
its journal, and those that it opens for a moment."""
_NODE_SEGMENTS_MIN = 8
_MAP_BYTES_MIN = 1 << 24


class Cache(Protocol):
    """Keeps files open that it can open again."""

    def close_unused(self) -> None:
        """Close what can be opened again; returns at once; runs in any thread."""


_caches: WeakSet[Cache] = WeakSet()
_guard = threading.Lock()


def register(cache: Cache) -> None:
    """Have a cache close files whenever this process has no descriptor left."""
    with _guard:
        _caches.add(cache)


def raise_limits() -> None:
    """Raise the soft limits of open files and of the size of files as far as permitted."""
    for kind, wanted in (
        (resource.RLIMIT_NOFILE, OPEN_FILES_WANTED),
        (resource.RLIMIT_FSIZE, resource.RLIM_INFINITY),
    ):
        soft, hard = resource.getrlimit(kind)
        to = hard if wanted == resource.RLIM_INFINITY else min(_finite(hard), wanted)
        if _finite(soft) < _finite(to):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, (to, hard))


def _finite(limit: int) -> int:
    return (1 << 63) - 1 if limit == resource.RLIM_INFINITY else limit


def segments_per_node(nodes: int) -> int:
    """Return how many segments each node may keep open; UsageError if there are too few."""
    limit = _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    share = (limit - _PROCESS_FILES) // max(nodes, 1) - _NODE_FILES
    if share < _NODE_SEGMENTS_MIN:
        needed = _PROCESS_FILES + nodes * (_NODE_FILES + _NODE_SEGMENTS_MIN)
        raise UsageError(
            f"This process may open {limit} files, and a store of {nodes} nodes needs {needed}: "
            "raise the limit ('ulimit -n', or LimitNOFILE= of a service)."
        )
    return share


def check_file_size(needed: int) -> None:
    """Raise UsageError if this process may not write files of `needed` bytes."""
    limit = _finite(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    if limit < needed:
        raise UsageError(
            f"This process may write files of {limit >> 20} MiB only, and a store needs files of "
            f"{needed >> 20} MiB: raise the limit ('ulimit -f', or LimitFSIZE= of a service)."
        )


def file_too_large() -> str:
    """Raise the limit again after a write failed with EFBIG; return why it failed.

    No file of a store is as large as a file system permits: the limit was lowered.
    """
    limit = _finite(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    raise_limits()
    return (
        f"this process may write files of {limit >> 20} MiB only ('ulimit -f', or LimitFSIZE= of "
        "a service)"
    )


def mappable(wanted: int) -> int:
    """Return how much address space one map may take: `wanted` bytes, or what there is room for.

    Of a limited address space, a map takes a quarter at most.
    """
    size = min(wanted, _finite(resource.getrlimit(resource.RLIMIT_AS)[0]) // 4)
    size -= size % mmap.PAGESIZE
    while size > _MAP_BYTES_MIN and not can_map(size):
        size //= 2
        size -= size % mmap.PAGESIZE
    return size


def can_map(size: int) -> bool:
    """Return whether the address space has room for `size` more bytes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ).close()
    except (OSError, OverflowError, ValueError):
        return False
    return True


def retried(open_: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call what opens a file; if no descriptor is left, have caches close files, and retry.

    OSError, after RETRY_SECONDS if descriptors are still short.  On the main thread, which
    must not wait, there is one retry.
    """
    until: float | None = None
    while True:
        try:
            return open_(*arguments, **named)
        except OSError as error:
            if error.errno not in _SHORT:
                raise
            now = time.monotonic()
            if until is None:
                waits = threading.get_ident() != threading.main_thread().ident
                until = now + RETRY_SECONDS if waits else now
            elif now >= until:
                raise OSError(error.errno, _shortage(error)) from error
            else:
                time.sleep(_PAUSE_SECONDS)
        _make_room()


def _make_room() -> None:
    raise_limits()
    with _guard:
        caches = list(_caches)
    for cache in caches:
        cache.close_unused()


def _shortage(error: OSError) -> str:
    if error.errno == errno.ENFILE:
        return "this machine has no descriptor left (sysctl fs.file-max)"
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"this process may open {limit} files only ('ulimit -n', or LimitNOFILE= of a service)"
