"""The power is cut: a machine that keeps a record of its disks, and any disk a cut may leave.

A `Machine` opens a store in this process.  Below the log every node is wrapped: what reaches
the directory is also written down, in order, on the machine's tape.  From the tape `disks`
makes the directories as they might be found when the power came back, for a cut at any event.

**The fault model.**  A cut is an instant in the one order of all events of all nodes, of the
metadata, and of what the caller was told.  What had ended by then has ended; one event may be
under way; nothing later has begun.  Then, for each node on its own:

- Bytes written are sure to be there once a flush of their segment, begun after the write,
  has returned without an error (`read_back` is a flush, too).  What is sure is never hurt.
- Of the bytes written and not flushed any part may be there: all, none, the first or the last
  so many, or any set of sectors of 512 bytes or of pages of 4096, chosen for each write on
  its own.  What is lost reads as it was before: old bytes, or zeros where there were none
  (room allocated ahead), or the segment is shorter, by any number of bytes.
- A truncation or a punch that no flush followed may have happened or not.
- A flush that failed does nothing for certain, ever: what it was to flush may be lost
  although later flushes succeed, and although it can still be read until the cut (as the page
  cache of Linux does).
- A segment and its name are there from before its first byte: `DirectoryNode` syncs both.
  That syncs the deletions before it in the same folder.  A deletion that no creation followed
  may have happened or not; if not, the segment comes back with what it had.
- A wiped node is empty at once and for good (another disk was put in).  Its `node.toml` is
  there when `write_identity` has returned, and may be there before.  What was not acknowledged
  may depend on it: a mount may then refuse until it is told to accept the loss.

A *kill* of the process ends it in the same ways, but the page cache stays: the next mount sees
all that was written, flushed or not, and only a later cut takes away what nobody flushed.

The metadata is what LMDB promises: `data.mdb` is as the last transaction left it that
returned; the cut of one under way leaves the file before it, the file after it, or the file
before it with any of the pages that the new one wrote anew (but not the page that makes them
count).  Before the first transaction there is no file, or an empty one.

Not in the model: disks that lie about a flush, or lose what they had kept; a node that is lost
by the same cut (a test may hold one back, which is that).  `fusestore.toml` and the nodes'
`node.toml` are kept by mkfs, before the tape begins.

**Order.**  Blocking calls run in threads one at a time: a thread stops before each operation of
a node or of the metadata, and goes on when its turn comes, so the event loop and the threads are
interleaved by chance, and the chance comes from a seed.  Time is a mock clock that jumps when
nothing can run.  So a run comes again from its seed, as far as the program itself is the same.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import pytest
import trio
import trio.testing
from typing_extensions import Buffer

from fusestore.config.node_identity import IDENTITY_NAME, write_identity
from fusestore.config.store_config import CONFIG_NAME, NodeConfig, StoreConfig, load
from fusestore.errors import NodeError
from fusestore.format.records import Run
from fusestore.members import member
from fusestore.members import opening as node_opening
from fusestore.metadata.engine import Engine
from fusestore.nodes.base import Node, Space
from fusestore.nodes.directory import segment_path
from fusestore.repair import comeback, repairer
from fusestore.store import opening

SECTOR_BYTES = 512
PAGE_BYTES = 4096
META_PAGES = 2
"""The first pages of `data.mdb`; one of them says which of the others count."""

HANG_SECONDS = 50_000.0
"""Of the mock clock, which passes them only while nothing can run."""

Result = TypeVar("Result")
Key = tuple[Run, int]
"""A segment of a node."""


# --- the tape ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""


@dataclass(frozen=True, slots=True)
class OfSegment(Event):
    """Something that happened to a segment of a node."""

    node: str
    key: Key


@dataclass(frozen=True, slots=True)
class Created(OfSegment):
    """A segment was made, and its name synced."""


@dataclass(frozen=True, slots=True)
class Written(OfSegment):
    """Bytes were written."""

    offset: int
    data: bytes = field(repr=False)

    @property
    def end(self) -> int:
        """The first byte behind them."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Replaced(OfSegment):
    """A segment got another file in its place, which was durable before."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Truncated(OfSegment):
    """The size was set."""

    size: int


@dataclass(frozen=True, slots=True)
class Punched(OfSegment):
    """Room was given back."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Flushed(OfSegment):
    """A flush returned, or failed."""

    failed: bool


@dataclass(frozen=True, slots=True)
class Deleted(OfSegment):
    """A segment's name was removed."""


@dataclass(frozen=True, slots=True)
class Wiped(Event):
    """A node lost all that it had."""

    node: str


@dataclass(frozen=True, slots=True)
class Claimed(Event):
    """A node got its identity."""

    node: str
    identity: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Checkpointed(Event):
    """A transaction of the metadata returned, and left this file."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Possible(Event):
    """From here on the store may be seen in the state of this number."""

    state: int


@dataclass(frozen=True, slots=True)
class Promised(Event):
    """It was acknowledged: no older state than this may ever be seen again."""

    state: int


@dataclass(frozen=True, slots=True)
class Health(Event):
    """A node began to be ill, or is well again: it holds all that it should."""

    node: str
    well: bool


@dataclass(slots=True)
class File:
    """A segment as it may be on the disk: what is sure, and what came after."""

    sure: bytearray = field(default_factory=bytearray)
    limbo: list[OfSegment] = field(default_factory=list)

    def settle(self) -> None:
        """A flush has returned: all is sure."""
        for event in self.limbo:
            _apply(self.sure, event)
        self.limbo.clear()

    def seen(self) -> bytes:
        """What reads show while the power is on."""
        data = bytearray(self.sure)
        for event in self.limbo:
            _apply(data, event)
        return bytes(data)

    def copy(self) -> File:
        """One that can be changed."""
        return File(self.sure[:], self.limbo[:])

    def doubt(self, chance: random.Random) -> None:
        """A flush has failed: what is lost now stays lost."""
        self.sure = bytearray(survivors(self, chance, "mixed"))
        self.limbo.clear()


@dataclass(slots=True)
class Disk:
    """A node's disk."""

    identity: bytes | None
    files: dict[Key, File] = field(default_factory=dict)
    ghosts: dict[Key, File] = field(default_factory=dict)
    """Segments whose deletion may not have happened."""

    def copy(self) -> Disk:
        """One that can be changed."""
        files = {key: file.copy() for key, file in self.files.items()}
        return Disk(self.identity, files, {key: file.copy() for key, file in self.ghosts.items()})


def _apply(data: bytearray, event: OfSegment) -> None:
    """Let an event happen as a whole."""
    if isinstance(event, Written):
        _put(data, event.offset, event.data)
    elif isinstance(event, Truncated):
        del data[event.size :]
        data.extend(bytes(event.size - len(data)))
    elif isinstance(event, Punched):
        start = -(-event.offset // PAGE_BYTES) * PAGE_BYTES
        end = min((event.offset + event.length) // PAGE_BYTES * PAGE_BYTES, len(data))
        if end > start:
            data[start:end] = bytes(end - start)


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(piece)] = piece


MOODS = ("all", "none", "mixed", "mixed", "early")


def survivors(file: File, chance: random.Random, mood: str) -> bytes:
    """The bytes of a segment after a cut; the mood says how much a node loses."""
    data = bytearray(file.sure)
    longest = len(data)
    stop = chance.randrange(len(file.limbo) + 1)
    for number, event in enumerate(file.limbo):
        if isinstance(event, Written):
            longest = max(longest, event.end)
        if mood == "all" or (mood == "early" and number < stop):
            _apply(data, event)
        elif mood == "none" or (mood == "early" and number > stop):
            continue
        elif isinstance(event, Written):
            for start, piece in _torn(event, chance):
                _put(data, start, piece)
        elif chance.random() < 0.5:
            _apply(data, event)
    if mood != "all":
        _resize(data, len(file.sure), longest, chance)
    return bytes(data)


def _resize(data: bytearray, sure: int, longest: int, chance: random.Random) -> None:
    """Let the size be another than the one that the bytes ask for, if it was not sure."""
    fate = chance.random()
    if fate < 0.2 and longest > len(data):
        data.extend(bytes(longest - len(data)))
    elif fate < 0.4 and len(data) > sure:
        del data[chance.randint(sure, len(data)) :]


def _torn(event: Written, chance: random.Random) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what is left of a write."""
    fate = chance.choice(("whole", "nothing", "start", "end", "any", "any"))
    unit = chance.choice((SECTOR_BYTES, PAGE_BYTES))
    first, last = event.offset // unit, (event.end - 1) // unit
    edge = chance.randint(first, last + 1)
    share = chance.choice((0.1, 0.5, 0.9))
    for place in range(first, last + 1):
        there = {
            "whole": True,
            "nothing": False,
            "start": place < edge,
            "end": place >= edge,
            "any": chance.random() < share,
        }[fate]
        if there:
            start, end = max(place * unit, event.offset), min((place + 1) * unit, event.end)
            yield start, event.data[start - event.offset : end - event.offset]


# --- the disks after a cut -------------------------------------------------------


@dataclass(slots=True)
class Tape:
    """What the disks held at the start, and all that happened."""

    disks: dict[str, Disk]
    metadata: bytes | None
    events: list[Event] = field(default_factory=list)

    def bounds(self, cut: int) -> tuple[int, int]:
        """The oldest state and the newest that may be seen after a cut under event `cut`."""
        oldest = [e.state for e in self.events[:cut] if isinstance(e, Promised)]
        newest = [e.state for e in self.events[: cut + 1] if isinstance(e, Possible)]
        return max(oldest, default=0), max(newest, default=0)

    def ill(self, cut: int) -> set[str]:
        """Nodes that lacked something at that time."""
        found: set[str] = set()
        for event in self.events[: cut + 1]:
            if isinstance(event, Health):
                (found.discard if event.well else found.add)(event.node)
        return found

    def around(self, cut: int) -> str:
        """The events before a cut, for people."""
        first = max(0, cut - 25)
        lines = [f"{i:6} {event}" for i, event in enumerate(self.events[first : cut + 1], first)]
        return "\n".join([*lines, "       the power is cut under the last one"])

    def choose(self, chance: random.Random) -> int:
        """An event to cut the power under: any, or one of a kind chosen first."""
        if chance.random() < 0.3:
            return chance.randrange(len(self.events))
        kinds = sorted({type(event).__name__ for event in self.events})
        kind = chance.choice(kinds)
        places = [i for i, event in enumerate(self.events) if type(event).__name__ == kind]
        return min(chance.choice(places) + chance.randrange(2), len(self.events) - 1)

    def cut(self, cut: int, chance: random.Random) -> Tape:
        """A tape that begins with the disks as a cut under event `cut` may leave them."""
        tape = self.kill(cut, chance)
        for disk in tape.disks.values():
            self._lose(disk, chance)
        return tape

    def kill(self, at: int, chance: random.Random) -> Tape:
        """A tape that begins with the disks as a kill under event `at` leaves them."""
        disks = {name: disk.copy() for name, disk in self.disks.items()}
        for event in self.events[:at]:
            self._happen(disks, event, chance)
        self._begin(disks, self.events[at], chance)
        return Tape(disks, self._metadata(at, chance))

    @staticmethod
    def _happen(disks: dict[str, Disk], event: Event, chance: random.Random) -> None:
        """An event has ended before the cut."""
        if isinstance(event, Wiped):
            disks[event.node] = Disk(None)
        elif isinstance(event, Claimed):
            disks[event.node].identity = event.identity
        elif isinstance(event, OfSegment):
            disk = disks[event.node]
            file = disk.files.get(event.key)
            if isinstance(event, Created):
                disk.files[event.key] = File()
                for key in [key for key in disk.ghosts if key[0] is event.key[0]]:
                    del disk.ghosts[key]
            elif isinstance(event, Replaced):
                disk.files[event.key] = File(bytearray(event.data))
            elif file is None:
                pass  # through a descriptor of what was removed by others
            elif isinstance(event, Deleted):
                disk.ghosts[event.key] = disk.files.pop(event.key)
            elif isinstance(event, Flushed):
                if event.failed:
                    file.doubt(chance)
                else:
                    file.settle()
            else:
                file.limbo.append(event)

    def _begin(self, disks: dict[str, Disk], event: Event, chance: random.Random) -> None:
        """An event was under way."""
        if isinstance(event, Written | Truncated | Punched | Deleted):
            self._happen(disks, event, chance)  # still in limbo
        elif isinstance(event, Wiped | Claimed | Created | Replaced) and chance.random() < 0.5:
            self._happen(disks, event, chance)

    @staticmethod
    def _lose(disk: Disk, chance: random.Random) -> None:
        """Take away what is not sure."""
        mood = chance.choice(MOODS)
        for key, ghost in disk.ghosts.items():
            if key not in disk.files and chance.random() < 0.5:
                disk.files[key] = ghost
        disk.ghosts.clear()
        for file in disk.files.values():
            file.sure = bytearray(survivors(file, chance, mood))
            file.limbo.clear()

    def _metadata(self, cut: int, chance: random.Random) -> bytes | None:
        data = self.metadata
        for event in self.events[:cut]:
            if isinstance(event, Checkpointed):
                data = event.data
        event = self.events[cut]
        if isinstance(event, Checkpointed):
            fate = chance.randrange(3)
            if fate == 0:
                return event.data
            if fate == 1 and data:
                return _torn_metadata(data, event.data, chance)
        if data is None and chance.random() < 0.3:
            return b""
        return data


def _torn_metadata(old: bytes, new: bytes, chance: random.Random) -> bytes:
    """The file before a transaction, with some of the pages that the transaction wrote."""
    data = bytearray(old)
    for start in range(META_PAGES * PAGE_BYTES, len(new), PAGE_BYTES):
        page = new[start : start + PAGE_BYTES]
        if page != old[start : start + PAGE_BYTES] and chance.random() < 0.5:
            _put(data, start, page)
    return bytes(data)


def read_disks(config: StoreConfig) -> Tape:
    """A tape that begins with what is there now."""
    disks = {}
    for node in config.nodes:
        identity = node.path / IDENTITY_NAME
        disk = disks[node.name] = Disk(identity.read_bytes() if identity.exists() else None)
        for run in Run:
            folder = (node.path / segment_path(run, 1)).parent
            for path in folder.glob("*.[ls][oe]g") if folder.exists() else ():
                disk.files[run, int(path.stem)] = File(bytearray(path.read_bytes()))
    metadata = config.metadata / "data.mdb"
    return Tape(disks, metadata.read_bytes() if metadata.exists() else None)


def write_disks(tape: Tape, origin: StoreConfig, to: Path) -> StoreConfig:
    """A store in the directory `to`, with the disks that the tape begins with."""
    to.mkdir(parents=True)
    shutil.copy(origin.store / CONFIG_NAME, to / CONFIG_NAME)
    config = replace(load(to), limits=origin.limits)
    config.metadata.mkdir()
    if tape.metadata is not None:
        (config.metadata / "data.mdb").write_bytes(tape.metadata)
    for node in config.nodes:
        disk = tape.disks[node.name]
        node.path.mkdir()
        if disk.identity is None:
            continue
        (node.path / IDENTITY_NAME).write_bytes(disk.identity)
        for run in Run:
            (node.path / segment_path(run, 1)).parent.mkdir()
        for (run, segment), file in disk.files.items():
            (node.path / segment_path(run, segment)).write_bytes(file.seen())
    return config


# --- threads, one at a time --------------------------------------------------------


class _Job:
    """A blocking call in a thread that runs only when it is its turn."""

    current = threading.local()

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = False
        self._done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def step(self) -> bool:
        """Let it go on to its next pause; whether it has ended."""
        if self._done:
            return True
        if self._started:
            self._turn.release()
        else:
            self._started = True
            self._thread.start()
        self._back.acquire()
        return self._done

    def result(self) -> Any:
        """What the call returned, or raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        self.current.job = self
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        self._done = True
        self._back.release()

    def pause(self) -> None:
        """In the thread: let others go on."""
        self._back.release()
        self._turn.acquire()


def pause() -> None:
    """Let others go on, if this is a thread that takes turns."""
    job = getattr(_Job.current, "job", None)
    if job is not None:
        job.pause()


# --- the machine ---------------------------------------------------------------------


class RecordedNode:
    """A node whose operations go on the tape, and which can be ill."""

    def __init__(self, machine: Machine, name: str, node: Node) -> None:
        self.node = node
        self.name = name
        self._machine = machine
        self._life = machine.lives.get(name, 0)

    def _note(self, *events: Event) -> None:
        if self._life == self._machine.lives.get(self.name, 0):
            self._machine.tape.events += events

    def _operate(self, kind: str) -> None:
        """Let others go on; then fail, if that is to be."""
        pause()
        error = self._machine.operate(self.name, kind)
        if error is not None:
            raise error

    def _exists(self, run: Run, segment: int) -> bool:
        path: Path = self.node.path  # type: ignore[attr-defined]
        return (path / segment_path(run, segment)).exists()

    def write(self, run: Run, segment: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write; an ill node writes a part, or nothing."""
        pause()
        data = b"".join(bytes(buffer) for buffer in buffers)
        error = self._machine.operate(self.name, "write")
        if error is not None:
            data = data[: self._machine.chance.randrange(len(data) + 1)]
        there = self._exists(run, segment)
        if data:
            self.node.write(run, segment, offset, [data])
            if not there and self._exists(run, segment):
                self._note(Created(self.name, (run, segment)))
            self._note(Written(self.name, (run, segment), offset, data))
        if error is not None:
            raise error

    def flush(self, run: Run, segments: Sequence[int]) -> None:
        """Flush, one segment after the other."""
        for segment in segments:
            self._flush(run, segment)

    def _flush(self, run: Run, segment: int) -> None:
        pause()
        error = self._machine.operate(self.name, "flush")
        if error is not None:
            self._note(Flushed(self.name, (run, segment), failed=True))
            raise error
        self.node.flush(run, [segment])
        self._note(Flushed(self.name, (run, segment), failed=False))

    def read_back(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Flush, and read."""
        self._flush(run, segment)
        return self.node.read_back(run, segment, offset, length)

    def truncate(self, run: Run, segment: int, size: int) -> None:
        """Set the size."""
        self._operate("truncate")
        self.node.truncate(run, segment, size)
        self._note(Truncated(self.name, (run, segment), size))

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give room back."""
        self._operate("punch")
        self.node.punch(segment, offset, length)
        self._note(Punched(self.name, (Run.SHARDS, segment), offset, length))

    def replace(self, run: Run, segment: int, content: Buffer) -> None:
        """Put another file in a segment's place."""
        self._operate("write")
        self.node.replace(run, segment, content)
        self._note(Replaced(self.name, (run, segment), bytes(content)))

    def set_aside(self, run: Run, segment: int) -> None:
        """Take a segment away."""
        self._operate("delete")
        self.node.set_aside(run, segment)
        self._note(Deleted(self.name, (run, segment)))

    def drop_aside(self) -> None:
        """Remove what was set aside, which is not on the tape."""
        self._operate("delete")
        self.node.drop_aside()

    def delete(self, run: Run, segment: int) -> None:
        """Remove a segment."""
        self._operate("delete")
        self.node.delete(run, segment)
        self._note(Deleted(self.name, (run, segment)))

    def read(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Read."""
        self._operate("read")
        return self.node.read(run, segment, offset, length)

    def read_now(self, run: Run, segment: int, offset: int, length: int) -> bytes | None:
        """Read from memory, or not: both happen."""
        if self._machine.chance.random() < 0.5:
            return None
        return self.node.read_now(run, segment, offset, length)

    def opened(self, run: Run, segment: int) -> None:
        """See Node: here everything is asked for."""

    def check(self) -> None:
        """See Node."""
        self._operate("check")
        self.node.check()

    def segments(self, run: Run) -> list[int]:
        """See Node."""
        self._operate("segments")
        return self.node.segments(run)

    def size(self, run: Run, segment: int) -> int:
        """See Node."""
        self._operate("size")
        return self.node.size(run, segment)

    def space(self) -> Space:
        """See Node."""
        self._operate("space")
        return self.node.space()

    def bytes_used(self) -> int:
        """See Node."""
        return self.node.bytes_used()

    def close(self) -> None:
        """See Node."""
        self.node.close()


class Machine:
    """Opens a store and keeps a record of its disks; use as a context manager."""

    def __init__(
        self, config: StoreConfig, chance: random.Random, disks: Tape | None = None
    ) -> None:
        """`disks`: those that were written to the store's place, with what is not sure there."""
        self.config = config
        self.chance = chance
        self.tape = Tape(disks.disks, disks.metadata) if disks is not None else read_disks(config)
        self.lives: dict[str, int] = {}
        """How often a node was wiped; what goes through older descriptors is gone."""
        self._ills: dict[str, tuple[str, int]] = {}
        self._patches = pytest.MonkeyPatch()
        self._abandoned: list[_Job] = []
        """Calls that nobody waits for any more; they end sooner or later."""

    # --- nodes that fail

    def sicken(self, name: str, what: str, times: int) -> None:
        """Let the next operations of this kind (`write`, `flush`) of a node fail."""
        self._ills[name] = (what, times)

    def cure(self, name: str) -> None:
        """Let nothing more fail."""
        self._ills.pop(name, None)

    def operate(self, name: str, kind: str) -> NodeError | None:
        """An operation of a node begins; the error with which it is to fail, if it is."""
        ill, times = self._ills.get(name, ("", 0))
        if ill != kind or times == 0:
            return None
        self._ills[name] = (ill, times - 1)
        return NodeError(f"the {kind} failed, as told")

    def wipe(self, name: str) -> None:
        """Put an empty disk in a node's place."""
        (node,) = (node for node in self.config.nodes if node.name == name)
        shutil.rmtree(node.path)
        self.lives[name] = self.lives.get(name, 0) + 1
        self.tape.events.append(Wiped(name))

    def before_checkpoint(self) -> None:
        """A transaction of the metadata begins; may raise MetadataError."""

    def after_checkpoint(self) -> None:
        """It has ended; may raise MetadataError, though all is written."""

    # --- running

    def __enter__(self) -> Machine:
        patch = self._patches.setattr
        patch(trio.to_thread, "run_sync", self._run_sync)
        patch(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch(member, "_Watched", lambda member: member.node)  # its threads are not of trio
        patch(os, "fsync", lambda descriptor: None)  # the tape is what decides
        patch(os, "fdatasync", lambda descriptor: None)
        patch(lmdb, "open", partial(lmdb.open, sync=False))
        opener = self._opening(node_opening.open_node)
        for module in (node_opening, comeback, repairer, opening):
            patch(module, "open_node", opener)
        patch(repairer, "write_identity", self._claiming(write_identity))
        patch(Engine, "write", self._checkpointing(Engine.write))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.undo()

    def run(self, main: Callable[[], Awaitable[Result]]) -> Result:
        """Run a trio program on this machine; it must not hang."""

        async def bounded() -> Result:
            with trio.fail_after(HANG_SECONDS):
                return await main()

        trio._core._run._r.seed(self.chance.getrandbits(64))
        try:
            return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))
        finally:
            for job in self._abandoned:
                while not job.step():
                    pass
            self._abandoned.clear()

    async def _run_sync(
        self,
        function: Callable[..., Result],
        *arguments: Any,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter | None = None,
    ) -> Result:
        """In place of trio.to_thread.run_sync."""
        await trio.lowlevel.checkpoint_if_cancelled()
        async with limiter or contextlib.nullcontext():
            job = _Job(partial(function, *arguments))
            try:
                with trio.CancelScope(shield=not abandon_on_cancel):
                    await self._turns(job)
            except trio.Cancelled:
                self._abandoned.append(job)
                raise
        return job.result()  # type: ignore[no-any-return]

    async def _turns(self, job: _Job) -> None:
        """Let a job go on and end, by turns with all others."""
        while not job.step():
            for _turn in range(self.chance.choice((0, 0, 0, 1, 1, 2, 5, 20))):
                await trio.lowlevel.checkpoint()
            if self._abandoned and self.chance.random() < 0.5 and self._abandoned[0].step():
                del self._abandoned[0]
        await trio.lowlevel.checkpoint()

    def _opening(self, real: Callable[..., Node]) -> Callable[..., Node]:
        def open_node(config: StoreConfig, node: NodeConfig, **options: bool) -> Node:
            pause()
            error = self.operate(node.name, "open")
            if error is not None:
                raise error
            return RecordedNode(self, node.name, real(config, node, **options))

        return open_node

    def _claiming(self, real: Callable[..., None]) -> Callable[..., None]:
        def claim(path: Path, identity: Any) -> None:
            pause()
            real(path, identity)
            data = (path / IDENTITY_NAME).read_bytes()
            self.tape.events.append(Claimed(identity.node, data))

        return claim

    def _checkpointing(self, real: Callable[[Engine], None]) -> Callable[[Engine], None]:
        def write(engine: Engine) -> None:
            pause()
            self.before_checkpoint()
            real(engine)
            data = (self.config.metadata / "data.mdb").read_bytes()
            self.tape.events.append(Checkpointed(data))
            pause()
            self.after_checkpoint()

        return write


@contextlib.contextmanager
def told(note: str) -> Iterator[None]:
    """Say with every error where it happened."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise
