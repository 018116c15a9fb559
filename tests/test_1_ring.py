"""The kernel's ring: what was asked for is done or said to have failed, and buffers outlive it."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusestore.system import io_uring as ring_module
from fusestore.system.io_uring import Ring, read_operation, write_operation


@asynccontextmanager
async def running() -> AsyncIterator[Ring]:
    ring = Ring.open()
    if ring is None:
        pytest.skip("this kernel offers no io_uring")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.run)
        yield ring
        nursery.cancel_scope.cancel()


async def read(ring: Ring, descriptor: int, offset: int, length: int) -> tuple[int | None, bytes]:
    buffer = bytearray(length)
    operation, kept = read_operation(descriptor, offset, buffer)
    batch = ring.start([operation], kept)
    assert batch is not None
    await ring.wait(batch)
    return batch.results[0], bytes(buffer)


async def test_reads_and_appends(tmp_path: Path) -> None:
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "abc"]
    async with running() as ring:
        for turn in range(200):
            writes = [write_operation(file, 10 * turn, b"012345678x") for file in files]
            batch = ring.start([operation for operation, _ in writes], writes)
            assert batch is not None
            await ring.wait(batch)
            assert batch.results == [10, 10, 10]
        for file in files:
            assert await read(ring, file, 5, 10) == (10, b"5678x01234")
            assert await read(ring, file, 1995, 10) == (5, b"5678x" + bytes(5))
    for file in files:
        assert os.pread(file, 4000, 0) == b"012345678x" * 200
        os.close(file)


async def test_many_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data := os.urandom(1 << 20))
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    async with running() as ring:
        wrong = []

        async def one(offset: int) -> None:
            if await read(ring, descriptor, offset, 4096) != (4096, data[offset : offset + 4096]):
                wrong.append(offset)

        async with trio.open_nursery() as nursery:
            for offset in range(0, 200 * 4096, 4096):
                nursery.start_soon(one, offset)
        assert wrong == []
    os.close(descriptor)


async def test_errors_are_told(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    async with running() as ring:
        assert (await read(ring, writer, 0, 10))[0] == -errno.EBADF
        operation, kept = write_operation(reader, 0, b"x")
        batch = ring.start([operation], kept)
        assert batch is not None
        await ring.wait(batch)
        assert batch.results == [-errno.EBADF]
    os.close(reader)
    os.close(writer)


async def test_what_is_given_up_keeps_its_buffer_until_it_is_done() -> None:
    reader, writer = os.pipe()
    async with running() as ring:
        buffer = bytearray(b"." * 8)
        operation, kept = read_operation(reader, 0, buffer)
        batch = ring.start([operation], kept)
        assert batch is not None
        with trio.move_on_after(0.05) as scope:
            await ring.wait(batch)
        assert scope.cancelled_caught
        assert batch.left == 1
        assert batch.keep is kept
        os.write(writer, b"late")
        with trio.fail_after(5):
            await ring.wait(batch)
        assert batch.results == [4]
        assert buffer == b"late...."
    os.close(reader)
    os.close(writer)


async def test_a_ring_that_ends_early_is_kept_with_its_buffers() -> None:
    reader, writer = os.pipe()
    async with running() as ring:
        operation, kept = read_operation(reader, 0, bytearray(8))
        assert ring.start([operation], kept) is not None
    del kept
    gc.collect()
    assert ring in ring_module._ABANDONED
    os.write(writer, b"late")
    os.close(reader)
    os.close(writer)


async def test_a_full_ring_takes_no_more() -> None:
    reader, writer = os.pipe()
    async with running() as ring:
        started = []
        while True:
            operation, kept = read_operation(reader, 0, bytearray(1))
            batch = ring.start([operation], kept)
            if batch is None:
                break
            started.append(batch)
        assert len(started) == 256
        os.write(writer, bytes(256))
        with trio.fail_after(5):
            for batch in started:
                await ring.wait(batch)
        assert (await read_one(ring, reader, writer)) == b"z"
    os.close(reader)
    os.close(writer)


async def read_one(ring: Ring, reader: int, writer: int) -> bytes:
    os.write(writer, b"z")
    return (await read(ring, reader, 0, 1))[1]


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(ring_module, "_syscall", refuse)
    assert Ring.open() is None
