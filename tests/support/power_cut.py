"""The power is cut: a tape of all that happened on some disks, and any disk a cut may leave.

A `Machine` (machine.py) opens a store in this process and keeps the tape.  From the tape `cut`
makes the disks as they might be found when the power came back, for a cut at any event;
`write_disks` makes directories of them.

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
- A deletion is sure when it has returned.  One that was under way may have happened or not; if
  not, the segment comes back with what it had.  This lasts until the folder is synced.
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
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusestore.config.node_identity import IDENTITY_NAME
from fusestore.config.store_config import CONFIG_NAME, StoreConfig, load
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path

SECTOR_BYTES = 512
PAGE_BYTES = 4096
META_PAGES = 2
"""The first pages of `data.mdb`; one of them says which of the others count."""


Key = tuple[SegmentKind, int]
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
class Synced(Event):
    """The names of all segments of a node were synced."""

    node: str


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

    def sync(self, kind: SegmentKind) -> None:
        """Names in a folder are sure."""
        self.ghosts = {key: file for key, file in self.ghosts.items() if key[0] is not kind}

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
        elif isinstance(event, Synced):
            disks[event.node].ghosts.clear()
        elif isinstance(event, OfSegment):
            disk = disks[event.node]
            file = disk.files.get(event.key)
            if isinstance(event, Created):
                disk.files[event.key] = File()
                disk.sync(event.key[0])
            elif isinstance(event, Replaced):
                disk.files[event.key] = File(bytearray(event.data))
            elif file is None:
                pass  # through a descriptor of what was removed by others
            elif isinstance(event, Deleted):
                del disk.files[event.key]
                disk.sync(event.key[0])
            elif isinstance(event, Flushed):
                if event.failed:
                    file.doubt(chance)
                else:
                    file.settle()
            else:
                file.limbo.append(event)

    def _begin(self, disks: dict[str, Disk], event: Event, chance: random.Random) -> None:
        """An event was under way."""
        if isinstance(event, Deleted):
            disk = disks[event.node]
            if event.key in disk.files:
                disk.ghosts[event.key] = disk.files.pop(event.key)
        elif isinstance(event, Written | Truncated | Punched):
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
        for kind in SegmentKind:
            folder = (node.path / segment_path(kind, 1)).parent
            for path in folder.glob("*.[ls][oe]g") if folder.exists() else ():
                disk.files[kind, int(path.stem)] = File(bytearray(path.read_bytes()))
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
        for kind in SegmentKind:
            (node.path / segment_path(kind, 1)).parent.mkdir()
        for (kind, segment), file in disk.files.items():
            (node.path / segment_path(kind, segment)).write_bytes(file.seen())
    return config
