"""Real file systems for nodes: ext4 on loop devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.mounted_store import COMMAND_SECONDS_MAX, is_mounted


class Disks:
    """File systems on loop devices, below one directory."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self._devices: dict[str, str] = {}

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX
        )
        if done.returncode:
            raise OSError(f"{command[0]}: {done.stderr}")
        return done.stdout.strip()

    def image(self, name: str) -> Path:
        return self.top / f"{name}.image"

    def attach(self, name: str) -> None:
        (self.top / name).mkdir(exist_ok=True)
        self._devices[name] = self.run("losetup", "--find", "--show", self.image(name))
        self.run("mount", "-o", "errors=remount-ro", self._devices[name], self.top / name)

    def detach(self) -> None:
        for name, device in self._devices.items():
            if is_mounted(self.top / name):
                self.run("umount", "--lazy", self.top / name)
            self.run("losetup", "--detach", device)  # at once, or when its last user is gone
        self._devices.clear()

    def make(self, lengths: dict[str, int]) -> None:
        """Make a file system of each name, and mount it."""
        for name, length in lengths.items():
            with self.image(name).open("wb") as file:
                file.truncate(length)
            self.run("mkfs.ext4", "-q", "-F", self.image(name))
            self.attach(name)

    def turn_read_only(self, name: str) -> None:
        """Have the kernel treat a file system as it does after an error of its disk."""
        device = Path(self._devices[name]).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

    def detach_one(self, name: str) -> None:
        """Unmount a file system that nobody uses; OSError if it is in use."""
        self.run("umount", self.top / name)
        self.run("losetup", "--detach", self._devices.pop(name))

    def check(self, name: str) -> None:
        """Unmount a file system, repair it, and mount it again."""
        self.detach_one(name)
        subprocess.run(["e2fsck", "-fy", self.image(name)], capture_output=True, check=False)
        self.attach(name)
