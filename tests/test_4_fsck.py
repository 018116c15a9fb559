"""What `fusestore fsck` says that --repair will do, and has done, is true."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from fusestore.cli.main import cli
from fusestore.config.store_config import StoreConfig, load
from fusestore.format.stripe_rows import Stripe
from fusestore.store.opening import open_store
from support.filled_store import fill
from support.logs import LOST_STRIPE, MENDED, UNREAD_FILE
from support.metadata_rows import Rows, edit
from support.mounted_store import Store
from support.opened_store import make


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    config = make(tmp_path / "store")
    trio.run(fill, config)
    return config


def fsck(config: StoreConfig, *options: str) -> tuple[int, str]:
    """The exit status, and the lines after the findings."""
    done = CliRunner().invoke(cli, ["fsck", str(config.store), *options])
    return done.exit_code, done.output


def change(config: StoreConfig, mend: Callable[[Rows], dict[bytes, bytes | None]]) -> None:
    """Change rows of the database and of the journals."""

    async def apply() -> None:
        async with open_store(config, background=False) as store:
            rows = dict(store.log.engine.scan(b"A", b"["))
            store.log.apply(mend(rows))

    trio.run(apply)


def test_a_store_without_findings_is_clean(config: StoreConfig) -> None:
    status, output = fsck(config)
    assert status == 0
    assert "Clean: 8 files" in output


@pytest.mark.expects_log(MENDED)
def test_what_repair_mends_is_said_to_be_mendable(config: StoreConfig) -> None:
    edit(config, lambda rows: rows.pop(min(key for key in rows if key[:1] == b"V")))
    status, output = fsck(config)
    assert status == 1
    assert "mend them with --repair, unmounted" in output
    assert "losses" not in output
    status, output = fsck(config, "--repair")
    assert "all mended" in output
    assert "losses" not in output
    assert fsck(config)[0] == 0


@pytest.mark.mounted
@pytest.mark.expects_log(MENDED)
@pytest.mark.parametrize("table", [b"I", b"S", b"V"])
def test_what_a_mount_has_mended_is_not_said_to_need_repair(
    make_store: Callable[..., Store], table: bytes
) -> None:
    store = make_store()
    store.mount()
    (store.mountpoint / "file").write_bytes(bytes(100_000))
    store.umount()
    rows: Rows = {}
    edit(load(store.store), rows.update)
    key = max(key for key in rows if key[:1] == table)
    database = store.store / "metadata" / "data.mdb"
    row, flipped = key + rows[key], key + bytes([rows[key][0] ^ 1]) + rows[key][1:]
    assert row in database.read_bytes()
    database.write_bytes(database.read_bytes().replace(row, flipped))
    store.mount()
    done = store.cli("fsck", store.store, check=False)
    assert done.returncode == 1
    assert "all mended when the store was mounted" in done.stdout
    store.umount()
    assert store.cli("fsck", store.store).stdout.startswith("Clean")


def test_losses_are_said_to_be_recorded_only(config: StoreConfig) -> None:
    """A stripe has no row, and none of its shards is on a node."""

    def lose(rows: Rows) -> dict[bytes, bytes | None]:
        return {key: None for key in rows if key[:1] in (b"S", b"V", b"O", b"G", b"M")}

    change(config, lose)
    for node in config.nodes:
        shutil.rmtree(node.path / "shards")
    status, output = fsck(config)
    assert status == 1
    assert ", except 8 losses, which it can only record" in output
    status, output = fsck(config, "--repair")
    assert "all mended, except 8 losses, which it can only record" in output
    status, output = fsck(config)
    assert status == 0
    assert "bytes known to be lost" in output
    assert [line for line in output.splitlines() if line.endswith(" bytes lost")]


def test_what_waits_for_a_node_names_the_node(config: StoreConfig) -> None:
    def lose(rows: Rows) -> dict[bytes, bytes | None]:
        return {key: None for key in rows if key[:1] == b"S"}

    change(config, lose)
    for node in config.nodes[:2]:
        node.path.rename(node.path.with_suffix(".away"))
    shutil.move(config.nodes[0].path.with_suffix(".away"), config.nodes[0].path)
    shutil.rmtree(config.nodes[0].path / "shards")
    status, output = fsck(config, "--repair")
    assert status == 1
    assert f"mended none while: stripes: {config.nodes[1].name} cannot be read" in output
    assert "bring them back or repair them first" in output
    assert "all mended" not in output


@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE)
def test_what_no_repair_of_rows_brings_back_says_what_helps(config: StoreConfig) -> None:
    for node in config.nodes[:2]:
        for segment in (node.path / "shards").iterdir():
            segment.unlink()
    for options in ((), ("--repair",), ()):
        status, output = fsck(config, *options)
        assert status == 1
        assert "--repair cannot bring back shards" in output


def test_a_row_that_names_another_stripes_shards_is_mended(config: StoreConfig) -> None:
    """The headers of the shards say whose they are."""

    def swap(rows: Rows) -> dict[bytes, bytes | None]:
        one, two = sorted(key for key in rows if key[:1] == b"S")[:2]
        return {one: rows[two]}

    rows: dict[bytes, bytes] = {}
    edit(config, rows.update)
    change(config, swap)
    status, output = fsck(config, "--repair")
    assert status == 1
    assert "has a wrong row" in output
    assert "losses" not in output
    assert fsck(config)[0] == 0
    after: dict[bytes, bytes] = {}
    edit(config, after.update)
    for key in (key for key in rows if key[:1] == b"S"):
        assert Stripe.decode(after[key]) == Stripe.decode(rows[key])
