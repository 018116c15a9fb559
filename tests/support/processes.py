"""What a forked process does, also as another user."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_child(body: Callable[[], Result]) -> Result:
    """What `body` returns, or raises, in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer: tuple[bool, Any] = (True, body())
            except BaseException as error:
                error.add_note("in a forked process:\n" + traceback.format_exc())
                answer = (False, error)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        fine, value = pickle.load(pipe)
    os.waitpid(pid, 0)
    if not fine:
        raise value
    return value  # type: ignore[no-any-return]


def as_user(
    place: Path, uid: int, body: Callable[[], Result], gid: int = 0, groups: Iterable[int] = ()
) -> Result:
    """What `body` returns, or raises, as another user (gid: the uid's) with cwd `place`.

    Paths in `body` must be relative: the way to `place` may be closed to that user.
    """

    def child() -> Result:
        os.chdir(place)
        os.setgroups(list(groups))
        os.setresgid(gid or uid, gid or uid, gid or uid)
        os.setresuid(uid, uid, uid)
        return body()

    return in_child(child)
