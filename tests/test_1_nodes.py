"""The contract of every kind of node, and of every wrapper of one."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fusestore.config.node_identity import IDENTITY_VERSION, NodeIdentity, write_identity
from fusestore.errors import NodeError, NodeIdentityError
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.limits import DEFAULTS, Limits
from fusestore.nodes.base import Node
from fusestore.nodes.directory import DirectoryNode
from fusestore.system.beneath import Directory
from support.faults import FaultyNode
from support.logs import FOREIGN_FILES


def directory(path: Path, limits: Limits = DEFAULTS) -> DirectoryNode:
    identity = NodeIdentity(uuid4(), "a", "a", uuid4(), IDENTITY_VERSION)
    path.mkdir()
    write_identity(path, identity)
    return DirectoryNode(path, identity, limits=limits)


KINDS: dict[str, Callable[[Path], Node]] = {
    "directory": directory,
    "faulty directory without faults": lambda path: FaultyNode(directory(path)),
}


@pytest.fixture(params=KINDS)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Node:
    return KINDS[request.param](tmp_path / "node")


SEGMENT_KINDS = pytest.mark.parametrize("kind", list(SegmentKind))


@SEGMENT_KINDS
def test_what_was_written_is_read(node: Node, kind: SegmentKind) -> None:
    node.write(kind, 1, 0, [b"abc", bytearray(b"defg"), memoryview(b"h")])
    node.write(kind, 1, 100, [b"far"])
    node.flush(kind, [1])
    assert node.read(kind, 1, 0, 8) == b"abcdefgh"
    assert node.read(kind, 1, 2, 3) == b"cde"
    assert node.read(kind, 1, 8, 95) == bytes(92) + b"far"
    assert node.read_back(kind, 1, 100, 3) == b"far"
    assert node.size(kind, 1) == 103
    assert node.segments(kind) == [1]


@SEGMENT_KINDS
def test_a_read_never_returns_less(node: Node, kind: SegmentKind) -> None:
    node.write(kind, 1, 0, [b"abc"])
    for offset, length in ((0, 4), (3, 1), (1000, 1)):
        with pytest.raises(NodeError):
            node.read(kind, 1, offset, length)
    with pytest.raises(NodeError):
        node.read(kind, 2, 0, 1)


@SEGMENT_KINDS
def test_segments_are_listed_in_order(node: Node, kind: SegmentKind) -> None:
    for segment in (3, 123456789, 1, 20):
        node.write(kind, segment, 0, [b"x"])
    assert node.segments(kind) == [1, 3, 20, 123456789]
    node.delete(kind, 3)
    node.delete(kind, 3)
    assert node.segments(kind) == [1, 20, 123456789]
    with pytest.raises(NodeError):
        node.read(kind, 3, 0, 1)


def test_a_punched_payload_gives_room_back_and_nothing_else(node: Node) -> None:
    payload = b"\xff" * (1 << 20)
    node.write(SegmentKind.SHARDS, 1, 0, [b"h" * 64, payload, b"n" * 64, payload])
    node.flush(SegmentKind.SHARDS, [1])
    before = node.bytes_used()
    node.punch(1, 64, len(payload))
    assert before - node.bytes_used() >= len(payload) - 8192
    assert node.read(SegmentKind.SHARDS, 1, 0, 64) == b"h" * 64
    assert node.read(SegmentKind.SHARDS, 1, 64 + len(payload), 64) == b"n" * 64
    assert node.read(SegmentKind.SHARDS, 1, 128 + len(payload), len(payload)) == payload


def test_room_allocated_ahead_is_given_back(node: Node) -> None:
    node.write(SegmentKind.SHARDS, 1, 0, [b"x" * 4096])
    assert node.bytes_used() > 1 << 20
    node.truncate(SegmentKind.SHARDS, 1, 4096)
    assert node.bytes_used() <= 8192
    node.write(SegmentKind.SHARDS, 1, 4096, [b"y"])
    assert node.read(SegmentKind.SHARDS, 1, 4095, 2) == b"xy"


def test_space_is_told(node: Node) -> None:
    space = node.space()
    assert 0 < space.free <= space.total


def test_a_node_that_moved_away_is_noticed(node: Node, tmp_path: Path) -> None:
    node.check()
    (tmp_path / "node").rename(tmp_path / "away")
    with pytest.raises(NodeIdentityError):
        node.check()
    shutil.copytree(tmp_path / "away", tmp_path / "node")
    with pytest.raises(NodeIdentityError):
        node.check()


def test_a_deleted_segment_is_noticed(node: Node, tmp_path: Path) -> None:
    node.write(SegmentKind.SHARDS, 1, 0, [b"abc"])
    node.delete(SegmentKind.SHARDS, 1)
    node.check()
    node.write(SegmentKind.SHARDS, 1, 0, [b"abc"])
    (tmp_path / "node" / segment_path(SegmentKind.SHARDS, 1)).unlink()
    with pytest.raises(NodeError):
        node.check()


def test_a_segment_that_cannot_be_looked_at_is_noticed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fstat(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    node.write(SegmentKind.SHARDS, 1, 0, [b"abc"])
    with monkeypatch.context() as patched, pytest.raises(NodeError, match="Stale"):
        patched.setattr(os, "fstat", fstat)
        node.check()


def test_the_segment_that_was_not_used_for_longest_is_closed_first(tmp_path: Path) -> None:
    node = directory(tmp_path / "node", Limits(open_segments_max=2))
    node.write(SegmentKind.SHARDS, 1, 0, [b"one"])
    node.write(SegmentKind.SHARDS, 2, 0, [b"two"])
    for segment, use in enumerate((node.read_now, node.read), 3):
        assert use(SegmentKind.SHARDS, 1, 0, 3) == b"one"
        node.write(SegmentKind.SHARDS, segment, 0, [b"new"])
        assert node.opened(SegmentKind.SHARDS, segment - 1) is None
    assert node.opened(SegmentKind.SHARDS, 1) is not None
    node.write(SegmentKind.SHARDS, 5, 0, [b"new"])
    assert node.opened(SegmentKind.SHARDS, 1) is not None
    assert node.read(SegmentKind.SHARDS, 2, 0, 3) == b"two"


@pytest.mark.expects_log(FOREIGN_FILES)
def test_foreign_files_are_no_segments(node: Node, tmp_path: Path) -> None:
    for name in ("1.seg", "00000001.log", "00000001.seg~", "x"):
        (tmp_path / "node/shards" / name).touch()
    assert node.segments(SegmentKind.SHARDS) == []


@pytest.fixture
def hanging(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A node with the segment 1, in which a thread hangs until the test is over."""
    node.write(SegmentKind.SHARDS, 1, 0, [b"x"])
    hangs, may_end = threading.Event(), threading.Event()

    def unlink(directory: Directory, name: str) -> None:
        hangs.set()
        may_end.wait(20)

    monkeypatch.setattr(Directory, "unlink", unlink)

    def delete() -> None:
        with suppress(NodeError):  # it was closed meanwhile: whether it lasts is not known
            node.delete(SegmentKind.SHARDS, 1)

    deleting = threading.Thread(target=delete)
    deleting.start()
    assert hangs.wait(20)
    yield node
    may_end.set()
    deleting.join()


def in_time(function: Callable[[], object]) -> bool:
    """Whether a call ends within two seconds."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(2)
    return not thread.is_alive()


def test_a_node_in_which_a_thread_hangs_can_be_closed(hanging: Node) -> None:
    """The event loop closes it: it must not wait for a disk."""
    assert in_time(hanging.close)


def test_a_node_in_which_a_thread_hangs_still_reads_what_is_cached(hanging: Node) -> None:
    """The event loop asks it: it must not wait for a disk."""
    assert in_time(lambda: hanging.opened(SegmentKind.SHARDS, 1))
    assert in_time(lambda: hanging.read_now(SegmentKind.SHARDS, 1, 0, 1))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_without_descriptors_caches_close_files_and_the_open_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    one, other = directory(tmp_path / "one"), directory(tmp_path / "other")
    for node in (one, other):
        for segment in range(1, 6):
            node.write(SegmentKind.SHARDS, segment, 0, [b"x"])
    one.write(SegmentKind.JOURNAL, 1, 0, [b"y"])
    one.close_unused()
    really, left = os.open, [40]

    def no_descriptor(*arguments: Any, **named: Any) -> int:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return really(*arguments, **named)

    monkeypatch.setattr(os, "open", no_descriptor)
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(one.read(SegmentKind.SHARDS, 1, 0, 1)))
    thread.start()  # the event loop's thread would not wait
    thread.join(20)
    assert (left, read) == ([0], [b"x"])
    monkeypatch.undo()
    for node in (one, other):  # the newest may be written to
        opened = [n for n in range(1, 6) if node.opened(SegmentKind.SHARDS, n) is not None]
        assert opened == ([1, 5] if node is one else [5])
