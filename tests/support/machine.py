"""A machine that opens a store in this process and keeps a record of its disks.

Below the log every node is wrapped: what reaches the directory is also written down, in order,
on the machine's tape.  From the tape, power_cut.py makes the disks that a cut may leave.

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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import pytest
import trio
import trio.testing
from outcome import Outcome, capture
from typing_extensions import Buffer

from fusestore.config.node_identity import IDENTITY_NAME, write_identity_in
from fusestore.config.owner_record import OwnerRecord
from fusestore.config.store_config import NodeConfig, StoreConfig
from fusestore.errors import NodeError
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.members import member
from fusestore.members import opening as node_opening
from fusestore.metadata.engine import Engine
from fusestore.nodes.base import Node, Space
from fusestore.repair import claim, comeback, rejoin, writing_again
from fusestore.store import opening
from fusestore.system import threads
from fusestore.system.beneath import Directory
from support.power_cut import (
    Checkpointed,
    Claimed,
    Created,
    Deleted,
    Event,
    Flushed,
    Punched,
    Replaced,
    Synced,
    Tape,
    Truncated,
    Wiped,
    Written,
    read_disks,
)

HANG_SECONDS = 50_000.0
"""Of the mock clock, which passes them only while nothing can run."""

Result = TypeVar("Result")


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


class RecordedNode:
    """A node whose operations go on the tape, and which can be ill."""

    def __init__(self, machine: Machine, name: str, node: Node) -> None:
        self.node = node
        self.name = name
        self._machine = machine
        self._life = machine.lives.get(name, 0)

    @property
    def has_holes(self) -> bool:
        """See Node."""
        return self.node.has_holes

    def _note(self, *events: Event) -> None:
        if self._life == self._machine.lives.get(self.name, 0):
            self._machine.tape.events += events

    def _operate(self, kind: str) -> None:
        """Let others go on; then fail, if that is to be."""
        pause()
        error = self._machine.operate(self.name, kind)
        if error is not None:
            raise error

    def _exists(self, kind: SegmentKind, segment: int) -> bool:
        path: Path = self.node.path  # type: ignore[attr-defined]
        return (path / segment_path(kind, segment)).exists()

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """Write; an ill node writes a part, or nothing."""
        pause()
        data = b"".join(bytes(buffer) for buffer in buffers)
        error = self._machine.operate(self.name, "write")
        if error is not None:
            data = data[: self._machine.chance.randrange(len(data) + 1)]
        there = self._exists(kind, segment)
        if data:
            self.node.write(kind, segment, offset, [data])
            if not there and self._exists(kind, segment):
                self._note(Created(self.name, (kind, segment)))
            self._note(Written(self.name, (kind, segment), offset, data))
        if error is not None:
            raise error

    def flush(self, kind: SegmentKind, segments: Sequence[int]) -> None:
        """Flush, one segment after the other."""
        for segment in segments:
            self._flush(kind, segment)

    def _flush(self, kind: SegmentKind, segment: int) -> None:
        pause()
        error = self._machine.operate(self.name, "flush")
        if error is not None:
            self._note(Flushed(self.name, (kind, segment), failed=True))
            raise error
        self.node.flush(kind, [segment])
        self._note(Flushed(self.name, (kind, segment), failed=False))

    def read_back(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """Flush, and read."""
        self._flush(kind, segment)
        return self.node.read_back(kind, segment, offset, length)

    def truncate(self, kind: SegmentKind, segment: int, size: int) -> None:
        """Set the size."""
        self._operate("truncate")
        self.node.truncate(kind, segment, size)
        self._note(Truncated(self.name, (kind, segment), size))

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give room back."""
        self._operate("punch")
        self.node.punch(segment, offset, length)
        self._note(Punched(self.name, (SegmentKind.SHARDS, segment), offset, length))

    def replace(self, kind: SegmentKind, segment: int, content: Buffer) -> None:
        """Put another file in a segment's place."""
        self._operate("write")
        self.node.replace(kind, segment, content)
        self._note(Replaced(self.name, (kind, segment), bytes(content)))

    def set_aside(self, kind: SegmentKind, segment: int) -> None:
        """Take a segment away."""
        self._operate("delete")
        self.node.set_aside(kind, segment)
        self._note(Deleted(self.name, (kind, segment)))

    def drop_aside(self) -> None:
        """Remove what was set aside, which is not on the tape."""
        self._operate("delete")
        self.node.drop_aside()
        self._note(Synced(self.name))

    def delete(self, kind: SegmentKind, segment: int) -> None:
        """Remove a segment."""
        self._operate("delete")
        self.node.delete(kind, segment)
        self._note(Deleted(self.name, (kind, segment)))

    def read(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """Read."""
        self._operate("read")
        return self.node.read(kind, segment, offset, length)

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """Read from memory, or not: both happen."""
        if self._machine.chance.random() < 0.5:
            return None
        return self.node.read_now(kind, segment, offset, length)

    def opened(self, kind: SegmentKind, segment: int) -> None:
        """See Node: here everything is asked for."""

    def check(self) -> None:
        """See Node."""
        self._operate("check")
        self.node.check()

    @property
    def found_owner(self) -> OwnerRecord | None:
        """See Node."""
        return self.node.found_owner

    def refuse_owner(self) -> None:
        """See Node."""
        self.node.refuse_owner()

    def claim(self) -> None:
        """See Node; the record is not on the tape, and after a power cut is not there."""
        pause()
        self.node.claim()

    def is_owned(self) -> bool:
        """See Node."""
        return self.node.is_owned()

    def give_back(self) -> None:
        """See Node."""
        pause()
        self.node.give_back()

    def disown(self) -> None:
        """See Node."""
        pause()
        self.node.disown()

    def segments(self, kind: SegmentKind) -> list[int]:
        """See Node."""
        self._operate("segments")
        return self.node.segments(kind)

    def size(self, kind: SegmentKind, segment: int) -> int:
        """See Node."""
        self._operate("size")
        return self.node.size(kind, segment)

    def is_shared(self, kind: SegmentKind, segment: int) -> bool:
        """See Node."""
        return self.node.is_shared(kind, segment)

    def space(self) -> Space:
        """See Node."""
        self._operate("space")
        return self.node.space()

    def keep_reserve(self, length: int) -> None:
        """See Node."""
        self.node.keep_reserve(length)

    def remove(self) -> None:
        """See Node."""
        self.node.remove()

    def bytes_used(self) -> int:
        """See Node."""
        return self.node.bytes_used()

    def held(self) -> dict[int, int]:
        """See Node."""
        return self.node.held()

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
        patch(threads._Queue, "start", lambda queue, job: self._start(job))
        patch(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch(member, "_Watched", lambda member: member.node)  # its threads are not of trio
        patch(os, "fsync", lambda descriptor: None)  # the tape is what decides
        patch(os, "fdatasync", lambda descriptor: None)
        patch(lmdb, "open", partial(lmdb.open, sync=False))
        opener = self._opening(node_opening.open_node)
        for module in (node_opening, comeback, rejoin, claim, writing_again, opening):
            patch(module, "open_node", opener)
        patch(claim, "write_identity_in", self._claiming(write_identity_in))
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

    def _start(self, job: threads.Job) -> None:
        """In place of a thread."""
        trio.lowlevel.spawn_system_task(self._deliver, _Job(job.function), job.deliver)

    async def _deliver(self, job: _Job, deliver: Callable[[Outcome[Any]], object]) -> None:
        try:
            await self._turns(job)
        except trio.Cancelled:
            self._abandoned.append(job)
            raise
        deliver(capture(job.result))

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
        def claim(directory: Directory, identity: Any) -> None:
            pause()
            real(directory, identity)
            with open(directory.open(IDENTITY_NAME, os.O_RDONLY), "rb") as file:
                data = file.read()
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
