"""Who may set the code of a directory, and which: root says it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.mounted_store import Store
from support.processes import in_child

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(os.geteuid() != 0, reason="changes its user"),
]
CODE = "user.fusestore.code"


def as_user(uid: int, path: Path, code: str | None) -> int:
    """Set or clear a directory's code as a user; the errno, 0 for success."""

    def body() -> int:
        os.chdir(path)  # the user may have no access to the directories above
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            if code is None:
                os.removexattr(".", CODE)
            else:
                os.setxattr(".", CODE, code.encode())
        except OSError as error:
            return error.errno or -1
        return 0

    return in_child(body)


def mounted_with(store: Store, key: str) -> tuple[Path, Path, Path]:
    """Mount with a line in fusestore.toml; directories of user 1000, of root for all, of root."""
    config = store.store / "fusestore.toml"
    config.write_text(config.read_text().replace("code =", f"{key}\ncode =", 1))
    store.mount("allow_other")
    found = tuple(store.mountpoint / name for name in ("own", "all", "root"))
    for path, mode, uid in zip(found, (0o755, 0o777, 0o755), (1000, 0, 0), strict=True):
        path.mkdir()
        path.chmod(mode)
        os.chown(path, uid, uid)
    return found  # type: ignore[return-value]


def test_by_default_only_root_sets_codes(make_store: Callable[..., Store]) -> None:
    own, everybodys, roots = mounted_with(make_store(), "")
    for path in (own, everybodys):
        assert as_user(1000, path, "1+63") == errno.EPERM
        assert as_user(1000, path, "2+1") == errno.EPERM
    assert as_user(1000, roots, "2+1") in (errno.EPERM, errno.EACCES)
    os.setxattr(own, CODE, b"4+2")
    assert as_user(1000, own, None) == errno.EPERM
    assert os.getxattr(own, CODE) == b"4+2"


def test_owners_may_choose_among_the_codes_that_root_allows(
    make_store: Callable[..., Store],
) -> None:
    own, everybodys, _ = mounted_with(make_store(), 'user_codes = ["1+2", "2+1"]')
    assert as_user(1000, own, "1+2") == 0
    assert os.getxattr(own, CODE) == b"1+2"
    assert as_user(1000, own, "1+63") == errno.EPERM
    assert as_user(1000, own, "nothing") == errno.EINVAL
    assert as_user(1000, own, None) == 0
    assert as_user(1000, everybodys, "1+2") == errno.EPERM
    os.setxattr(own, CODE, b"4+2")  # what root sets, root clears
    assert as_user(1000, own, "1+2") == errno.EPERM
    assert as_user(1000, own, None) == errno.EPERM
