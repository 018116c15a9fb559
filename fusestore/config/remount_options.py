"""The options of `mount -o remount`: the flags that the kernel can change on a mount."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UsageError
from .mount_options import is_known, is_own, split

_BITS = {
    "ro": 1 << 0,
    "nosuid": 1 << 1,
    "nodev": 1 << 2,
    "noexec": 1 << 3,
    "nosymfollow": 1 << 8,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "bind": 1 << 12,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
"""Flags of mount(2)."""
_OPPOSITES = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "symfollow": "nosymfollow",
    "atime": "noatime",
    "diratime": "nodiratime",
    "norelatime": "relatime",
    "nostrictatime": "strictatime",
    "nolazytime": "lazytime",
}
_ONE_OF = {"noatime", "relatime", "strictatime"}
_OF_KERNEL = {"default_permissions", "remount"}
_OF_KERNEL_WITH_VALUES = ("user_id=", "group_id=", "max_read=", "blksize=", "fd=", "rootmode=")


def fixed_options(options: Iterable[str]) -> list[str]:
    """Return those of some options that hold until the end of the mount."""
    return [option for option in options if is_own(option) and option not in _BITS]


def check_fixed(options: Iterable[str], present: str) -> None:
    """UsageError for one of the fixed options that a mount with the options `present` lacks."""
    for option in options:
        if option not in split([present]):
            raise UsageError(
                f"{option} cannot be set while the store is mounted: unmount it, and mount it with "
                f"this option."
            )


def remount_flags(options: Iterable[str], *, sloppy: bool) -> int:
    """Return the flags of mount(2) for the options that mount(8) passes; UsageError.

    They are all that the mount is to have: mount(8) has added those that it has now, or those
    of /etc/fstab.  Options that hold until the end of the mount are left out (`fixed_options`).
    Later options win.
    """
    chosen = set[str]()
    for option in options:
        if option in _BITS:
            chosen -= _ONE_OF if option in _ONE_OF else set()
            chosen.add(option)
        elif option in _OPPOSITES:
            chosen.discard(_OPPOSITES[option])
        elif not (
            sloppy
            or option in _OF_KERNEL
            or option.startswith(_OF_KERNEL_WITH_VALUES)
            or is_known(option)
        ):
            raise UsageError(f"There is no mount option {option!r}.")
    return sum(_BITS[option] for option in chosen)
