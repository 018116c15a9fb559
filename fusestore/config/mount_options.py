"""The mount options: the values of `-o`, and the options for the kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError

_SWITCHES = {
    "nosuid": "nosuid",
    "suid": "nosuid",
    "nodev": "nodev",
    "dev": "nodev",
    "noexec": "noexec",
    "exec": "noexec",
}
_IGNORED = {"", "defaults", "atime", "noatime"}
_OWN = {
    *("ro", "allow_other", "writeback", "noxattr", "nospin", "nonempty"),
    *("accept_loss", "take_over"),
}
_METRICS = "metrics="

LOOPBACK = "127.0.0.1"
NO_METRICS = "off"

_OF_FSTAB = {
    *("auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group"),
    *("async", "relatime", "norelatime", "nostrictatime", "diratime", "nodiratime"),
    *("lazytime", "nolazytime", "strictatime", "silent", "loud", "nomand"),
}
_OF_FSTAB_WITH_VALUES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


def split(values: Iterable[str]) -> list[str]:
    """Return the options in the values of `-o`, each a list with commas."""
    return [option.strip() for option in ",".join(values).split(",")]


def _is_of_fstab(option: str) -> bool:
    return option in _OF_FSTAB or option.startswith(_OF_FSTAB_WITH_VALUES)


def is_own(option: str) -> bool:
    """Return whether it is an option that other file systems do not have, or `ro`."""
    return option in _OWN or option.startswith(_METRICS)


def is_known(option: str) -> bool:
    """Return whether it is an option of a mount, or one that only mount(8) and systemd use."""
    ours = is_own(option) or option in {*_SWITCHES, *_IGNORED, "rw"}
    return ours or _is_of_fstab(option)


def of_fstab(values: Iterable[str], *, sloppy: bool) -> list[str]:
    """Remove the options that only mount(8) and systemd use; with `sloppy` also unknown options."""
    left = [option for option in split(values) if not _is_of_fstab(option)]
    return [option for option in left if is_known(option)] if sloppy else left


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, `[IPV6]:PORT`, or `PORT` on the loopback, as (host, port); UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon:
        host = LOOPBACK
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise UsageError(
            f"{text!r} is not an address for metrics: use HOST:PORT, or PORT for this machine only."
        )
    return host, int(port)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The options of a mount, as given with `-o`."""

    read_only: bool = False
    allow_other: bool = False
    """Other users than the daemon's may use the mount, as file modes allow."""
    writeback: bool = False
    """The kernel collects small writes; they are lost if the daemon dies."""
    noxattr: bool = False
    """Extended attributes and ACLs are off: small writes cost half as much."""
    nospin: bool = False
    """The daemon sleeps as soon as there is no request."""
    nonempty: bool = False
    """The mount may hide existing files of the directory."""
    accept_loss: bool = False
    """Newer commits that absent nodes may hold are given up permanently."""
    take_over: bool = False
    """Nodes are taken from a mount of another machine that never ended."""
    metrics: str = ""
    """The address of metrics (`parse_address`), or `off`; empty: as the store is configured."""
    switches: tuple[str, ...] = ()
    """The chosen ones of nosuid, nodev and noexec."""

    @classmethod
    def parse(cls, values: Iterable[str]) -> MountOptions:
        """Parse the values of `-o`, each a list with commas; UsageError for unknown options.

        If two options contradict each other, the later one counts.
        """
        chosen: dict[str, bool] = {}
        metrics = ""
        for option in ",".join(values).split(","):
            option = option.strip()
            if option in _OWN:
                chosen[option] = True
            elif option in _SWITCHES:
                switch = _SWITCHES[option]
                chosen[switch] = option == switch
            elif option == "rw":
                chosen["ro"] = False
            elif option.startswith(_METRICS):
                metrics = option.removeprefix(_METRICS)
                if metrics != NO_METRICS:
                    parse_address(metrics)
            elif option not in _IGNORED:
                known = ", ".join(sorted(_OWN | set(_SWITCHES) | {"rw", "noatime", _METRICS}))
                raise UsageError(f"There is no mount option {option!r}; the options are {known}.")
        return cls(
            read_only=chosen.get("ro", False),
            allow_other=chosen.get("allow_other", False),
            writeback=chosen.get("writeback", False),
            noxattr=chosen.get("noxattr", False),
            nospin=chosen.get("nospin", False),
            nonempty=chosen.get("nonempty", False),
            accept_loss=chosen.get("accept_loss", False),
            take_over=chosen.get("take_over", False),
            metrics=metrics,
            switches=tuple(name for name in ("nosuid", "nodev", "noexec") if chosen.get(name)),
        )

    @property
    def once(self) -> str:
        """The name of an option that must not be used at every mount; empty: none is set."""
        return "accept_loss" if self.accept_loss else "take_over" if self.take_over else ""

    @property
    def kernel(self) -> tuple[str, ...]:
        """The options for the kernel; a mount never keeps access times.

        libfuse sets nosuid and nodev by default, unlike other file systems.  Only root can
        turn them off, and does so here.
        """
        switches = list(self.switches)
        if os.geteuid() == 0:
            switches += [name for name in ("suid", "dev") if f"no{name}" not in switches]
        return (
            "noatime",
            *(["ro"] if self.read_only else []),
            *(["allow_other"] if self.allow_other else []),
            *switches,
        )

    def __str__(self) -> str:
        """Format the options for `parse`."""
        own = [("ro", self.read_only), ("allow_other", self.allow_other)]
        own += [("writeback", self.writeback), ("noxattr", self.noxattr)]
        own += [("nospin", self.nospin), ("nonempty", self.nonempty)]
        own += [("accept_loss", self.accept_loss), ("take_over", self.take_over)]
        metrics = [f"{_METRICS}{self.metrics}"] if self.metrics else []
        return ",".join([*(name for name, chosen in own if chosen), *metrics, *self.switches])
