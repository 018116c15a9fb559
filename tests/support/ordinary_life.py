"""The engine of the campaign of ordinary life: events, the operator, and what must hold.

A `Life` is a world (ordinary_world.py), a model of what was acknowledged (ordinary_model.py), and
the causes of trouble that are there now.  Events (ordinary_events.py) add causes.  After a few
events the causes go, the operator does what the messages say, and everything must be well: every
byte that was acknowledged, no wrong one, nothing read-only, and `status`, `fsck`, `risk`
and `scrub` agree with what the model knows.

What is destroyed between two such moments is never more than the code bears.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.mounted_store import sync
from support.ordinary_model import (
    FILLER,
    FOLDERS,
    BrokenPromiseError,
    Client,
    Model,
    in_time,
    tree_of,
)
from support.ordinary_world import Device, World

#: Seconds for a request that no disk holds up, and for the store to be well once causes are gone.
ANSWER_SECONDS = 90
WELL_SECONDS = 150
#: Seconds in which `status` must know that a node is gone.
NOTICED_SECONDS = 30


@dataclass
class Cause:
    """Why the store may be in trouble."""

    what: str
    nodes: frozenset[str] = frozenset()
    """Nodes that cannot be used meanwhile."""
    errors: frozenset[int] = frozenset()
    """What requests may fail with."""
    undo: Callable[[], None] = lambda: None
    destroys: bool = False
    """Whether the nodes lack something when it is gone."""


@dataclass
class Life:
    """A store with its past."""

    world: World
    chance: random.Random
    model: Model = field(default_factory=Model)
    causes: list[Cause] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    """Nodes that lack something until the store is well again."""
    trail: list[str] = field(default_factory=list)
    """What happened, for people."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Copies of earlier moments."""
    patient: bool = False
    """Whether there is time for pauses that are longer than the deadlines of nodes."""
    to_scrub: bool = False
    """Whether bytes were damaged that only a scrub or a read finds."""

    def begin(self) -> None:
        """Make all, mount it, and do some work."""
        self.world.make()
        self.mount()
        for folder in FOLDERS:
            (self.world.store.mountpoint / folder).mkdir()
        sync(self.world.store.mountpoint)
        self.work(20)

    def note(self, text: str) -> None:
        """Note what happens."""
        self.trail.append(text)
        print(f"  {text}", flush=True)

    def abandon(self) -> None:
        """End the daemon and the mount, however it went."""
        with contextlib.suppress(ProcessLookupError, AssertionError):
            self.world.go_on()
        for device in self.world.devices:
            subprocess.run(["fsfreeze", "--unfreeze", device.place], capture_output=True)
        self.world.store._end_by_force()
        with contextlib.suppress(OSError):  # for people, when it failed
            shutil.copy(self.world.store.store / "fusestore.log", self.world.top)

    # --- trouble ----------------------------------------------------------------

    @property
    def hurt(self) -> set[str]:
        """Nodes that cannot be used, or lack something."""
        return self.damaged.union(*(cause.nodes for cause in self.causes))

    def may_lose(self, nodes: frozenset[str]) -> bool:
        """Whether these nodes may be destroyed now."""
        return len(self.hurt | nodes) <= self.world.bears

    @property
    def tolerated(self) -> set[int]:
        """With what requests may fail now."""
        errors = {number for cause in self.causes for number in cause.errors}
        if len(self.hurt) > self.world.bears:
            errors |= {errno.EIO, errno.EROFS}
        return errors

    def add(self, cause: Cause) -> None:
        """There is trouble from now on."""
        self.causes.append(cause)
        if cause.destroys:
            self.damaged |= cause.nodes
        self.note(cause.what)

    def undo_all(self) -> None:
        """All causes go; disks are no longer full first, since commands write there."""
        self.chance.shuffle(self.causes)
        self.causes.sort(key=lambda cause: errno.ENOSPC in cause.errors)
        while self.causes:
            cause = self.causes[-1]
            self.note(f"no more: {cause.what}")
            cause.undo()
            self.causes.pop()

    def pause(self) -> float:
        """Choose for how long something stands still, in seconds."""
        return self.chance.choice([0.1, 1.0, 3.0, 36.0] if self.patient else [0.1, 1.0, 3.0])

    # --- use -------------------------------------------------------------------------

    def work(
        self,
        count: int,
        meanwhile: Callable[[], None] | None = None,
        errors: frozenset[int] = frozenset(),
    ) -> None:
        """Let a client work, and look at how it went; `errors`: what is tolerated besides."""
        client = Client(self.world.store.mountpoint, self.model.choose(self.chance, count))
        if meanwhile is not None:
            meanwhile()
        outcomes, ended = client.outcomes(ANSWER_SECONDS)
        wrong = []
        for operation, outcome in outcomes:
            self.model.follow(operation, outcome)
            if isinstance(outcome, int) and outcome and outcome not in self.tolerated | errors:
                wrong.append(f"{operation} failed with {errno.errorcode[outcome]}")
        if not ended:
            wrong.append(f"{outcomes[-1][0]} hangs for {ANSWER_SECONDS} s")
        if wrong:
            raise BrokenPromiseError("; ".join(wrong))
        if self.model.open and not errors and len(self.hurt) <= self.world.bears:
            self.compare(crashed=False)

    def compare(self, crashed: bool) -> None:
        """Compare all files with the model."""
        tree = in_time(
            ANSWER_SECONDS, "reading all files", lambda: tree_of(self.world.store.mountpoint)
        )
        self.model.found(tree, crashed)

    def open_files(self, device: Device) -> list[str]:
        """What the daemon has open on a file system."""
        found = []
        for entry in Path(f"/proc/{self.world.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry))
        return [path for path in found if path.startswith(f"{device.place}/")]

    # --- the operator -------------------------------------------------------------------

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command, and note how it ended."""
        try:
            done = self.world.store.cli(*arguments, check=False)
        except subprocess.TimeoutExpired as late:
            raise BrokenPromiseError(f"{arguments} hangs") from late
        text = " | ".join((done.stderr or done.stdout).splitlines())
        short = " ".join(arguments).replace(str(self.world.top), "")
        self.note(f"$ {short}: {done.returncode} {text[:600]}")
        if "Traceback" in done.stderr:
            raise BrokenPromiseError(f"{arguments} raised:\n{done.stderr}")
        return done

    def mount(self, *options: str) -> None:
        """Mount; when it is refused, do what the message says until it is not."""
        for _ in range(4):
            done = self.world.store.try_mount(*options)
            said = done.stderr.strip()
            if done.returncode == 0:
                if said:
                    self.note(f"mounted: {said[:600]}")
                return
            self.note(f"mount is refused: {said}")
            if "accept_loss" in said and self.damaged:  # the nodes are gone for good
                options = ("accept_loss",)
            elif not self.obey(said):
                raise BrokenPromiseError(f"it cannot be mounted: {said}")
        raise BrokenPromiseError("it cannot be mounted, whatever one does")

    def obey(self, text: str) -> bool:
        """Do what a message says; whether it says something."""
        did = False
        if re.search(r"[Mm]ove (the metadata|it) away", text):
            old = self.world.store.store / "metadata"
            old.rename(old.with_name(f"metadata.{time.monotonic_ns()}"))
            self.note("the metadata is moved away")
            did = True
        for command in re.findall(r"'(fusestore [^']+)'", text):
            words = shlex.split(command)[1:]
            if words in (["recover"], ["fsck", "--repair"]):
                words.insert(1, str(self.world.store.store))
            done = self.cli(*words)
            if "--accept-loss if they are gone for good" in done.stderr and self.damaged:
                self.cli(*words, "--accept-loss")
            did = True
        return did

    def umount(self) -> None:
        """Unmount; what was not acknowledged is, if that succeeds."""
        done = self.cli("umount", str(self.world.store.mountpoint))
        if done.returncode:
            raise BrokenPromiseError(f"umount failed: {done.stderr}")
        self.world.store.await_end()
        self.model.acknowledged()

    def is_well(self) -> bool:
        """Whether `status` has nothing to report."""
        self.status = self.world.store.status()
        nodes = self.status["nodes"]
        return bool(
            self.status["healthy"]
            and not self.status["read_only"]
            and all(node["state"] == "up" and not node["missing_shards"] for node in nodes)
        )

    def heal(self) -> None:
        """Do what the messages say until all is well; BrokenPromiseError if it never is."""
        began, hurt = time.monotonic(), set(self.damaged)
        told = began + 20
        while not self.is_well():
            now = time.monotonic()
            if now > began + WELL_SECONDS:
                raise BrokenPromiseError(f"the store is not well: {self.trouble()}")
            if now > told or self.damaged:
                told = now + 20
                self.note(f"not well: {self.trouble()}")
                self.care(hurt)
                self.damaged.clear()
            time.sleep(0.5)
        self.damaged.clear()

    def care(self, hurt: set[str]) -> None:
        """Do what the messages say about nodes that are not up."""
        for node in self.status["nodes"]:
            if node["state"] == "foreign":
                if node["name"] not in hurt:
                    raise BrokenPromiseError(f"nothing happened to a node: {self.trouble()}")
                self.obey(node["error"])
            elif node["state"] in ("down", "suspect"):
                done = self.cli("repair", str(self.world.store.store), node["name"], "--quiet")
                if done.returncode == 2:  # it says what to do when the disk is the right one
                    self.obey(done.stderr)

    def trouble(self) -> str:
        """What `status` says, in short."""
        status = self.status
        nodes = [
            f"{node['name']} {node['state']} {node['missing_shards']} {node['error']}"
            for node in status["nodes"]
        ]
        read_only = "read-only: " if status["read_only"] else ""
        return f"{read_only}{status['error']} {status['metadata_error']} {nodes}"

    def must_notice(self, name: str) -> None:
        """Let `status` know in time that a node is not there."""
        until = time.monotonic() + NOTICED_SECONDS
        while True:
            status = self.world.store.status()
            (node,) = (node for node in status["nodes"] if node["name"] == name)
            if node["state"] != "up" and not status["healthy"]:
                return
            if time.monotonic() > until:
                raise BrokenPromiseError(f"{name} is not there, and status says {node}")
            time.sleep(0.5)

    # --- what must hold -----------------------------------------------------------------

    def settle(self) -> None:
        """All causes go; the operator acts; then everything must be well."""
        self.undo_all()
        if not self.world.store.alive():
            self.mount()
            self.compare(crashed=True)
        self.heal()
        (self.world.store.mountpoint / FILLER).unlink(missing_ok=True)
        self.work(8)
        self.compare(crashed=False)
        if self.to_scrub or self.chance.random() < 0.15:
            self.scrub()
        if self.chance.random() < 0.5:
            self.must_agree()

    def must_agree(self) -> None:
        """`fsck` and `risk` must find nothing."""
        store = str(self.world.store.store)
        done = self.world.store.cli("fsck", store, "--json", check=False)
        answer = json.loads(done.stdout)
        mended = self.world.store.status()["rows_mended"]  # those are told, too
        if answer["left"] or answer["unreadable"] or (answer["findings"] and not mended):
            raise BrokenPromiseError(f"fsck says {done.returncode} {answer} {done.stderr}")
        done = self.world.store.cli("risk", store, check=False)
        if done.returncode:
            raise BrokenPromiseError(f"risk says {done.returncode} {done.stdout} {done.stderr}")

    def scrub(self) -> None:
        """Scrub until nothing is found, which must be the second time."""
        store = str(self.world.store.store)
        done = self.cli("scrub", store, "start", "--wait", "--quiet")
        if done.returncode and self.to_scrub:
            self.heal()
            done = self.cli("scrub", store, "start", "--wait", "--quiet")
        self.to_scrub = False
        if done.returncode:
            raise BrokenPromiseError(f"scrub says {done.returncode} {done.stdout} {done.stderr}")
        if not self.is_well():
            self.heal()

    def end(self) -> None:
        """The last look: without a cause, over a mount of its own, and without any one region."""
        self.settle()
        self.must_agree()
        self.umount()
        self.mount()
        self.compare(crashed=False)
        self.umount()
        done = self.cli("fsck", str(self.world.store.store))
        if done.returncode:
            raise BrokenPromiseError(f"fsck says {done.stdout}")
        lost = self.world.node(self.chance.choice(sorted(self.world.nodes)))
        lost.rename(lost.with_name("lost"))
        self.mount()
        self.compare(crashed=False)
        self.umount()


def remove(path: Any) -> None:
    """Remove a directory and all below it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def some_node(life: Life) -> str:
    """Choose a node."""
    return life.chance.choice(sorted(life.world.nodes))


def device_of(life: Life, kinds: tuple[str, ...] = ("ext4", "tmpfs")) -> Device | None:
    """Choose a file system of some kind."""
    devices = [device for device in life.world.devices if device.kind in kinds]
    return life.chance.choice(devices) if devices else None
