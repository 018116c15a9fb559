"""Records over zeros that lie ready: the journal is what plain appends would make it."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

from fusestore.config.node_identity import IDENTITY_VERSION, NodeIdentity, write_identity
from fusestore.config.store_config import NodeConfig
from fusestore.errors import NodeFullError
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.limits import DEFAULTS
from fusestore.members.member import Member
from fusestore.nodes.directory import DirectoryNode
from fusestore.system.io_uring import Ring


@pytest.fixture(params=["direct", "page cache"])
def member(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Member:
    if request.param == "page cache":
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    identity = NodeIdentity(uuid4(), "a", "a", uuid4(), IDENTITY_VERSION)
    write_identity(tmp_path, identity)
    node = DirectoryNode(tmp_path, identity)
    found = Member(1, NodeConfig("a", "a", tmp_path), DEFAULTS)
    found.open(node, node.space())
    found.standing.confirmed()
    return found


async def test_both_ways_make_the_same_journal(
    member: Member, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    ring = Ring.open()
    if ring is None:
        pytest.skip("this kernel offers no io_uring")
    path = member.config.path
    segment, expected, short = 1, bytearray(), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.run)
        for _ in range(400):
            record = chance.randbytes(
                64 * chance.choice((1, 2, 63, 64, 65, chance.randint(1, 1100)))
            )
            room = member.journal_room
            write = room.write(segment, len(expected), record) if room is not None else None
            if room is not None and write is not None and chance.random() < 0.8:
                batch = ring.start([write[0]], write)
                assert batch is not None
                await ring.wait(batch)
                assert batch.results == [write[0].length]
                room.written(len(record))
                short += 1
            else:  # also when the short way was begun, and came to nothing
                ahead = chance.random() < 0.5
                member.append(segment, len(expected), [record], len(record), ahead=ahead)
                member.node.flush(SegmentKind.JOURNAL, [segment])
            expected += record
            found = (path / segment_path(SegmentKind.JOURNAL, segment)).read_bytes()
            assert found[: len(expected)] == expected
            assert not any(found[len(expected) :])
            if len(expected) > 1.5 * DEFAULTS.journal_ahead_bytes:
                segment, expected = segment + 1, bytearray()
        nursery.cancel_scope.cancel()
    assert short > 100


def test_what_does_not_fit_goes_the_other_way(member: Member) -> None:
    member.append(1, 0, [bytes(64)], 64, ahead=True)
    room = member.journal_room
    assert room is not None
    assert room.write(1, 64, bytes(DEFAULTS.direct_record_bytes_max)) is not None
    assert room.write(1, 64, bytes(DEFAULTS.direct_record_bytes_max + 64)) is None
    assert room.write(1, 128, bytes(64)) is None
    assert room.write(2, 64, bytes(64)) is None
    member.append(1, 64, [bytes(64)], 64, ahead=False)
    assert room.write(1, 128, bytes(64)) is not None
    end = DEFAULTS.journal_ahead_bytes - 64
    member.append(1, end, [bytes(64)], 64, ahead=False)
    assert room.write(1, end + 64, bytes(DEFAULTS.direct_record_bytes_max)) is None


def test_a_full_disk_costs_the_zeros_and_not_the_record(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DirectoryNode.write

    def write(
        self: DirectoryNode, kind: SegmentKind, segment: int, offset: int, buffers: list[bytes]
    ) -> None:
        if sum(map(len, buffers)) >= DEFAULTS.journal_ahead_bytes:
            raise NodeFullError("Node a is full.")
        real(self, kind, segment, offset, buffers)

    monkeypatch.setattr(DirectoryNode, "write", write)
    member.append(1, 0, [b"x" * 64], 64, ahead=True)
    assert member.journal_room is None
    assert (member.config.path / segment_path(SegmentKind.JOURNAL, 1)).read_bytes() == b"x" * 64
