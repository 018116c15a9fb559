"""The metadata engine behaves as one sorted dictionary, whatever a checkpoint is doing."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusestore.errors import ClosedError, MetadataError
from fusestore.limits import DEFAULTS
from fusestore.metadata.engine import Engine

KEYS = st.binary(min_size=1, max_size=3).map(lambda key: b"K" + bytes(b % 4 for b in key))
VALUES = st.binary(max_size=8)


class EngineModel(RuleBasedStateMachine):
    """Random changes, freezes, checkpoints and reopenings against a dictionary."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.engine = Engine(Path(self.folder.name))
        self.model: dict[bytes, bytes] = {}
        self.stored: dict[bytes, bytes] = {}
        self.set_aside: dict[bytes, bytes] | None = None

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()
            self.folder.cleanup()

    @rule(changes=st.dictionaries(KEYS, st.none() | VALUES, max_size=5))
    def apply(self, changes: dict[bytes, bytes | None]) -> None:
        self.engine.apply(changes)
        for key, value in changes.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @precondition(lambda self: self.set_aside is None)
    @rule()
    def freeze(self) -> None:
        self.engine.freeze()
        self.set_aside = dict(self.model)

    @precondition(lambda self: self.set_aside is not None)
    @rule(again=st.booleans())
    def checkpoint(self, again: bool) -> None:
        self.engine.write()
        if again:
            self.engine.write()
        self.engine.thaw()
        assert self.set_aside is not None
        self.stored, self.set_aside = self.set_aside, None

    @rule()
    def reopen(self) -> None:
        self.engine.close()
        self.engine = Engine(Path(self.folder.name))
        self.model, self.set_aside = dict(self.stored), None

    @invariant()
    def reads_are_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        rows = sorted(self.model.items())
        assert list(self.engine.scan(b"K", b"L")) == rows
        assert list(self.engine.scan(b"K\1", b"K\2\3")) == [
            row for row in rows if b"K\1" <= row[0] < b"K\2\3"
        ]
        for key in (b"K\0", b"K\1", b"K\2\2", b"K\3\3\3"):
            assert self.engine.get(key) == self.model.get(key)
        assert sorted(self.engine.scan_stored(b"K", b"L")) == sorted(self.stored.items())


TestEngine = EngineModel.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_last_key_at_or_below(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    rows = {b"E" + bytes([0, i]): b"%d" % i for i in range(0, 100, 10)}
    engine.apply(rows)
    engine.freeze()
    engine.write()
    engine.thaw()
    engine.apply({b"E\0\x1e": None, b"E\0\x19": b"new"})  # 30 goes, 25 comes
    engine.freeze()
    engine.apply({b"E\0\x28": None})  # 40 goes
    for at, expected in ((49, 25), (25, 25), (24, 20), (50, 50), (9, 0), (255, 90)):
        found = engine.last(b"E\0\0", b"E\0" + bytes([at]))
        assert found is not None
        assert found[0][2] == expected
    engine.apply({b"E\0\0": None})
    assert engine.last(b"E\0\0", b"E\0\x09") is None
    assert engine.last(b"A", b"B") is None
    engine.close()


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tmp_path)
    engine.apply({b"Ka": b"1"})
    engine.freeze()
    begin = engine._env.begin

    def full(*, write: bool = False) -> Any:
        if write:
            raise lmdb.MapFullError("full")
        return begin()

    monkeypatch.setattr(engine._env, "begin", full)
    with pytest.raises(MetadataError):
        engine.write()
    assert engine.get(b"Ka") == b"1"
    monkeypatch.setattr(engine._env, "begin", begin)
    engine.write()
    engine.thaw()
    engine.close()
    engine = Engine(tmp_path)
    assert engine.get(b"Ka") == b"1"
    engine.close()


def test_what_is_no_environment_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(MetadataError, match="cannot be opened"):
        Engine(tmp_path)


@pytest.mark.parametrize("what", ["fifo", "device", "directory", "link to a fifo"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    file = tmp_path / "metadata" / "data.mdb"
    file.parent.mkdir()
    if what == "device":
        os.mknod(file, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    elif what == "directory":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    else:
        os.mkfifo(tmp_path / "fifo")
        file.symlink_to(tmp_path / "fifo")
    with pytest.raises(MetadataError, match="not a regular file"):
        Engine(file.parent)


def fails_and_succeeds(engine: Engine, rows: dict[bytes, bytes]) -> None:
    """A checkpoint fails, and the next one succeeds."""
    engine.apply(dict(rows))
    engine.freeze()
    with pytest.raises(MetadataError):
        engine.write()
    assert engine.get(b"K0") == rows[b"K0"]
    engine.after_failure()
    assert engine.get(b"K0") == rows[b"K0"]
    while True:
        try:
            engine.write()
            break
        except MetadataError:
            engine.after_failure()
    engine.thaw()
    assert dict(engine.scan_stored(b"K", b"L")) == rows


def test_a_map_that_is_full_is_made_wider(tmp_path: Path) -> None:
    """Where there is no room for a wide map at first, as with `ulimit -v`."""
    engine = Engine(tmp_path, limits=replace(DEFAULTS, map_bytes=1 << 20))
    fails_and_succeeds(engine, {b"K%d" % number: bytes(1000) for number in range(3000)})
    engine.close()


def test_an_environment_that_failed_for_good_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB refuses every transaction after it could not write its first pages."""
    engine = Engine(tmp_path)
    begin = engine._env.begin

    def panics(**named: Any) -> Any:
        raise lmdb.PanicError("as told")

    monkeypatch.setattr(engine._env, "begin", panics)
    engine.apply({b"K0": b"0"})
    engine.freeze()
    with pytest.raises(MetadataError):
        engine.write()
    monkeypatch.setattr(engine._env, "begin", begin)
    before, opens = engine._env._env, engine._env._open

    def fails(read_only: bool) -> Any:
        raise lmdb.Error("No space left on device, as told")

    monkeypatch.setattr(engine._env, "_open", fails)
    with pytest.raises(MetadataError, match="as told"):
        engine.after_failure()
    with pytest.raises(MetadataError) as unread:  # it waits in vain for the next attempt
        engine.get(b"K1")
    assert "recover" not in str(unread.value)
    monkeypatch.setattr(engine._env, "_open", opens)
    with pytest.raises(MetadataError):
        engine.write()
    engine.after_failure()
    assert engine._env._env is not before
    engine.write()
    engine.thaw()
    assert dict(engine.scan_stored(b"K", b"L")) == {b"K0": b"0"}
    engine.close()


@pytest.mark.parametrize("full", [{None}, {None, "/dev/shm"}], ids=len)
def test_it_needs_no_directory_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: set[str | None]
) -> None:
    """/tmp may be full, read-only or gone; so may be what else there is."""

    def make(*arguments: Any, **options: Any) -> Any:
        if options["dir"] in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return tempfile.TemporaryDirectory(*arguments, **options)

    monkeypatch.setattr("fusestore.metadata.environment.TemporaryDirectory", make)
    for number in range(3):
        engine = Engine(tmp_path)
        assert [value for _, value in engine.scan(b"K", b"L")] == [b"x"] * number
        engine.apply({b"K%d" % number: b"x"})
        engine.freeze()
        engine.write()
        engine.thaw()
        with engine.view() as view:
            assert len(list(view.all_stored())) == number + 1
        engine.close()


def test_a_database_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    """What is no database is; nobody moves away what was only in the way of something else."""
    (tmp_path / "data.mdb").mkdir()
    with pytest.raises(MetadataError) as refused:
        Engine(tmp_path)
    assert "recover" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


# --- the end ------------------------------------------------------------------


def stored(engine: Engine, count: int) -> None:
    """Write rows to the database."""
    engine.apply({b"K%05d" % number: b"v" for number in range(count)})
    engine.freeze()
    engine.write()
    engine.thaw()


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine.get(b"K00000"),
        lambda engine: list(engine.scan(b"K", b"L")),
        lambda engine: engine.scan_stored(b"K", b"L"),
        lambda engine: engine.view(),
        lambda engine: engine.last(b"K", b"L"),
        lambda engine: engine.rows_stored,
        lambda engine: (engine.apply({b"K1": b""}), engine.freeze(), engine.write()),
    ],
)
@pytest.mark.parametrize("viewed", [False, True])
def test_a_closed_engine_says_so(
    tmp_path: Path, use: Callable[[Engine], Any], viewed: bool
) -> None:
    """Nobody may take it for damage: the advice would be to move the metadata away."""
    engine = Engine(tmp_path)
    stored(engine, 3)
    view = engine.view() if viewed else None
    scan: Iterator[Any] = engine.scan(b"K", b"L")
    next(scan)
    engine.close()
    with pytest.raises(ClosedError, match=r"^The store is closed\.$"):
        use(engine)
    with pytest.raises(ClosedError, match=r"^The store is closed\.$"):
        list(scan)
    if view is not None:
        with view:  # a thread may still read it
            assert len(list(view.scan(b"K", b"L"))) == 3
        with pytest.raises(ClosedError):
            view.get(b"K00000")


async def test_a_thread_that_reads_a_view_ends_when_its_task_is_cancelled(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    stored(engine, 5000)
    rounds: list[int] = []

    def read_for_ever() -> None:
        with engine.view() as view:
            while True:
                rounds.append(sum(1 for _ in view.scan(b"K", b"L")))

    with trio.fail_after(20), trio.move_on_after(0.3) as scope:
        await trio.to_thread.run_sync(read_for_ever)
    assert scope.cancelled_caught
    assert set(rounds) == {5000}
    engine.close()
