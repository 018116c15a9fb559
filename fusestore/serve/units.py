"""The files that make a mount a service of systemd.

    UNITS/fusestore@.service, fusestore-scrub@.service, fusestore-scrub@.timer
                                        the same for all mounts; from fusestore/serve/service/
    UNITS/fusestore@.service.d/*.conf   settings that not every systemd supports
    UNITS/fusestore@INSTANCE.service.d/store.conf, and the same for fusestore-scrub
                                        store, mount point, options, and required mounts

UNITS is /etc/systemd/system, or a directory below ~/.config for a user's own systemd.
INSTANCE is the mount point as systemd-escape(1) writes it.  The paths cannot be in
an environment file: systemd takes the name of such a file for a pattern, in which
the backslashes of INSTANCE have another meaning.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..config.mount_options import MountOptions
from ..config.store_config import StoreConfig
from ..errors import FusestoreError, UsageError

SOURCE = Path(__file__).with_name("service")
SERVICE = "fusestore@.service"
SCRUB_SERVICE = "fusestore-scrub@.service"
SCRUB_TIMER = "fusestore-scrub@.timer"
HARDENING = "fusestore@.service.d/hardening.conf"
BACKOFF = "fusestore@.service.d/backoff.conf"
BACKOFF_SINCE = 254
"""The first version of systemd that supports the settings of BACKOFF."""


@dataclass(frozen=True, slots=True)
class Systemd:
    """An instance of systemd: the system's, or a user's own."""

    units: Path
    user: bool

    @classmethod
    def choose(cls, user: bool) -> Systemd:
        """Return the instance of the user, or that of the system."""
        if not user:
            return cls(Path("/etc/systemd/system"), user)
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return cls(home / "systemd/user", user)

    def control(self, *arguments: str) -> str:
        """Run `systemctl`, and return its output; FusestoreError if it fails."""
        return _output("systemctl", *(["--user"] if self.user else []), *arguments)

    def version(self) -> int:
        """Return the version of systemd."""
        found = re.search(r"\d+", self.control("--version"))
        return int(found[0]) if found else 0

    def own_files(self, instance: str) -> list[Path]:
        """Return the paths of the drop-ins of one mount."""
        names = [name.replace("@", f"@{instance}") for name in (SERVICE, SCRUB_SERVICE)]
        return [self.units / f"{name}.d" / "store.conf" for name in names]


def instance_of(mountpoint: Path) -> str:
    """Return the name of the instance for a mount point."""
    return _output("systemd-escape", "--path", "--", os.fspath(mountpoint)).rstrip("\n")


def files(
    systemd: Systemd, program: Path, config: StoreConfig, mountpoint: Path, options: MountOptions
) -> dict[Path, str]:
    """Return the text of each file that the service needs; UsageError for an unusable path."""
    for path in (program, config.store, mountpoint, config.metadata):
        if re.search(r"[\x00-\x1f\x7f\udc80-\udcff]", os.fspath(path)):
            raise UsageError(
                f"{os.fspath(path)!r} cannot be used in a unit: it has control characters, "
                "or is not UTF-8."
            )
    shared = [SERVICE, SCRUB_SERVICE, SCRUB_TIMER]
    shared += [] if systemd.user else [HARDENING]
    shared += [BACKOFF] if systemd.version() >= BACKOFF_SINCE else []
    start = f"ExecStart={_quoted(os.fspath(program))} "
    texts = {
        systemd.units / name: (SOURCE / name).read_text().replace("ExecStart=fusestore ", start)
        for name in shared
    }
    drop_in = _drop_in(config, mountpoint, options)
    return texts | dict.fromkeys(systemd.own_files(instance_of(mountpoint)), drop_in)


def _drop_in(config: StoreConfig, mountpoint: Path, options: MountOptions) -> str:
    """Return the drop-in of a mount: it requires the store's disk, and waits for those of nodes."""
    needed = (config.store, config.metadata, mountpoint.parent)
    lines = ["[Unit]", "RequiresMountsFor=" + " ".join(_quoted(str(path)) for path in needed)]
    found = dict.fromkeys(_mount_of(node.path) for node in config.nodes)
    mounts = " ".join(_mount_unit(path) for path in found if path != Path("/"))
    if mounts:
        lines += ["# An absent region must not keep the others from use."]
        lines += [f"Wants={mounts}", f"After={mounts}"]
    values = {"STORE": config.store, "MOUNTPOINT": mountpoint, "OPTIONS": options}
    lines += ["", "[Service]"]
    lines += [f"Environment={_quoted(f'{name}={value}')}" for name, value in values.items()]
    return "".join(f"{line}\n" for line in lines)


def _mount_of(path: Path) -> Path:
    """Return the mount point of the file system that contains a path."""
    path = Path(os.path.realpath(path))
    while not os.path.ismount(path):
        path = path.parent
    return path


def _mount_unit(path: Path) -> str:
    arguments = ["--path", "--suffix=mount", "--", os.fspath(path)]
    return _output("systemd-escape", *arguments).rstrip("\n")


def _quoted(text: str) -> str:
    """Quote one word of a setting in a unit file."""
    text = text.replace("%", "%%")
    if re.fullmatch(r"[\w/.,:=+@%-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True
        )
    except FileNotFoundError:
        raise FusestoreError(
            f"The program {command[0]} is missing: services need systemd."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit status {error.returncode}"
        raise FusestoreError(f"`{' '.join(command)}` failed: {reason}.") from None
    return done.stdout
