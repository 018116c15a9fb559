"""A row that the database would refuse reaches no journal, and one in a journal stops nobody."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fusestore.config.store_config import NodeConfig, StoreConfig, check_places
from fusestore.errors import RowTooLargeError
from fusestore.format import file_rows, store_rows, stripe_rows
from fusestore.format.file_rows import ROOT
from fusestore.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from fusestore.rescue.recover import recover
from fusestore.serve import operations
from support.opened_store import Opened, crashed, make, opened


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


def deep(one: Opened) -> int:
    """A directory whose path does not fit a row."""
    ino = int(ROOT)
    for number in range(44):
        name = b"\xff" * 250 + b"%05d" % number
        ino, _ = one.files.tree.make(ino, name, stat.S_IFDIR | 0o755, 1000, 1000)
    return ino


async def recode(one: Opened) -> None:
    await one.files.recoder.start(deep(one), None, None)


async def long_value(one: Opened) -> None:
    with one.store.log.transaction() as txn:
        txn.files += 5
        txn.put(file_rows.orphan_key(77), b"")
        txn.put(file_rows.xattr_key(1, b"user.long"), bytes(VALUE_BYTES_MAX + 1))


async def long_key(one: Opened) -> None:
    with one.store.log.transaction() as txn:
        txn.put(file_rows.orphan_key(77), b"")
        txn.delete(b"X" + bytes(KEY_BYTES_MAX))


async def applied_directly(one: Opened) -> None:
    one.store.log.apply({file_rows.orphan_key(77): b"", store_rows.SCRUB_KEY: bytes(70_000)})


@pytest.mark.parametrize("operation", [recode, long_value, long_key, applied_directly])
async def test_it_is_refused_as_a_whole_and_the_log_goes_on(
    config: StoreConfig, tmp_path: Path, operation: Callable[[Opened], Awaitable[None]]
) -> None:
    async with opened(config) as one:
        await one.put("good", b"good" * 1000)
        await one.checkpoint()
        files = one.store.log.counters.files
        with pytest.raises(RowTooLargeError, match="at most 511 and 65536"):
            await operation(one)
        if operation is not recode:
            assert one.store.log.counters.files == files
        assert one.files.recoder.job.state == "never"
        assert one.store.log.engine.get(file_rows.orphan_key(77)) is None
        await one.put("later", b"later" * 1000)
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
    lost = crashed(config, tmp_path / "lost")
    async with opened(crash) as one:
        assert await one.get("good") == b"good" * 1000
        assert await one.get("later") == b"later" * 1000
        assert one.store.log.engine.get(file_rows.orphan_key(77)) is None
    shutil.rmtree(lost.metadata)
    recover(lost.store, [], None, accept_loss=False, progress=lambda message: None)
    async with opened(lost) as one:
        assert await one.get("later") == b"later" * 1000


def test_it_has_an_errno() -> None:
    assert operations.ERRNO[RowTooLargeError] == 7  # E2BIG


@pytest.mark.parametrize(
    "row",
    [
        (store_rows.RECODE_KEY, bytes(VALUE_BYTES_MAX + 1)),
        (b"X" + bytes(KEY_BYTES_MAX), b""),
        (stripe_rows.owners_key(7, 0), bytes(24 * 3000)),
    ],
)
@pytest.mark.expects_log(r"log\.journal: Record \d+ of the journal has a row \w+ that is too long")
async def test_a_journal_that_has_one_is_replayed_without_it(
    config: StoreConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: tuple[bytes, bytes],
) -> None:
    """Early versions put it into the journal before the database refused it."""
    async with opened(config) as one:
        await one.put("good", b"good" * 1000)
        await one.checkpoint()
        one.store.log.pending[row[0]] = row[1]
        await one.put("later", b"later" * 1000)
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
        gone = crashed(config, tmp_path / "gone")
    with caplog.at_level(logging.ERROR):
        async with opened(crash) as one:
            assert await one.get("later") == b"later" * 1000
            assert one.store.log.engine.get(row[0]) is None
    assert "too long for the metadata" in caplog.text
    shutil.rmtree(gone.metadata)
    recover(gone.store, [], None, accept_loss=False, progress=lambda message: None)
    async with opened(gone) as one:
        assert await one.get("later") == b"later" * 1000
    async with opened(crash) as one:
        assert await one.get("good") == b"good" * 1000


def test_nodes_that_do_not_fit_one_row_are_refused(tmp_path: Path) -> None:
    def nodes(count: int) -> list[NodeConfig]:
        return [
            NodeConfig(f"n{i}", f"r{i}", tmp_path / f"{i:04d}" / ("x" * 250) / ("y" * 250))
            for i in range(count)
        ]

    assert check_places(tmp_path / "s", tmp_path / "m", nodes(64)) is None
    problem = check_places(tmp_path / "s", tmp_path / "m", nodes(200))
    assert problem is not None
    assert "use fewer nodes" in problem
    assert len(json.dumps([str(node.path) for node in nodes(200)])) > VALUE_BYTES_MAX
