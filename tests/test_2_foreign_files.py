"""What is read from a node's directory is somebody else's: an oddity there costs that node only."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.node_identity import read_identity
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import ConfigError, NodeError, NodeIdentityError
from fusestore.format.records import Commit, Header, Kind, Place, SegmentKind, encode_commit
from fusestore.format.records import checksum as checksum_of
from fusestore.format.segment_numbers import (
    GAP_MAX,
    SEGMENT_MAX,
    reachable,
    segment_number,
    segment_path,
)
from fusestore.log.journal_scan import SEARCHED_BYTES_MAX, read_journals
from fusestore.members.opening import open_node
from fusestore.nodes.directory import DirectoryNode
from fusestore.rescue.recover import recover
from fusestore.system.beneath import Directory
from fusestore.system.files import write_whole
from fusestore.system.strict_toml import PARSED_MAX, Table
from support.foreign_files import FILES, KINDS, MIB, PLACES, Outside, plant, quick
from support.logs import (
    CLAIMED,
    CORRUPT,
    FOREIGN_FILES,
    IDENTITY_STAYS,
    JOURNAL_DAMAGED,
    NOT_WHERE_ITS_ROW_SAYS,
    OUT_OF_USE,
    RECOGNIZED,
    SCRUBBED,
    UNREAD_FILE,
)
from support.opened_store import opened

SECONDS_MAX = 20
"""Of everything that one oddity is put through; nothing may wait for it, or read it to its end."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was used and unmounted; copies of it are planted with oddities."""
    place = tmp_path_factory.mktemp("template") / "store"
    config = quick(make_store(place))

    async def fill() -> None:
        async with opened(config) as one:
            for name, data in FILES.items():
                await one.put(name, data)
                await one.store.committer.commit()

    trio.run(fill)
    return place


@pytest.fixture
def config(template: Path, tmp_path: Path) -> StoreConfig:
    shutil.copytree(template, tmp_path / "store")
    return quick(load(tmp_path / "store"))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    found = Outside(tmp_path / "outside")
    yield found
    assert found.is_untouched()


async def used(config: StoreConfig, files: dict[str, bytes]) -> None:
    """Mount, write, commit, read and scrub; the two other nodes must go on."""
    async with opened(config) as one:
        others = one.store.log.members.all[1:]
        for name, data in files.items():
            assert await one.get(name) == data
        for number in range(3):
            name = f"new {len(files)}"
            files[name] = random.Random(name).randbytes(MIB + number)
            await one.put(name, files[name])
            await one.store.committer.commit()
        await one.store.scrubber.command(
            "start", None, wait=True, alone=False, progress=lambda message: None
        )
        for name, data in files.items():
            assert await one.get(name) == data
        assert all(member.in_sync for member in others)


async def repaired(config: StoreConfig, files: dict[str, bytes]) -> None:
    """Repair the node, which may be refused with a sentence."""
    async with opened(config) as one:
        first, *others = one.store.log.members.all
        refused = ""
        try:
            await one.store.repairer.repair(first.name, lambda message: None)
        except NodeError as error:
            refused = str(error)
        assert not refused or str(first.config.path) in refused
        for name, data in files.items():
            assert await one.get(name) == data
        assert all(member.in_sync for member in others)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.expects_log(
    OUT_OF_USE,
    CORRUPT,
    UNREAD_FILE,
    NOT_WHERE_ITS_ROW_SAYS,
    JOURNAL_DAMAGED,
    FOREIGN_FILES,
    SCRUBBED,
    CLAIMED,
    RECOGNIZED,
    IDENTITY_STAYS,
)
async def test_an_oddity_costs_that_node_only(
    config: StoreConfig, outside: Outside, caplog: pytest.LogCaptureFixture, kind: str, place: str
) -> None:
    plant(kind, PLACES[place](config.nodes[0].path), outside)
    files = dict(FILES)
    with trio.fail_after(SECONDS_MAX):
        await used(config, files)
        assert outside.is_untouched()
        await repaired(config, files)
        assert outside.is_untouched()
    assert "unexpected error" not in caplog.text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.expects_log(
    OUT_OF_USE,
    CORRUPT,
    UNREAD_FILE,
    NOT_WHERE_ITS_ROW_SAYS,
    JOURNAL_DAMAGED,
    FOREIGN_FILES,
    RECOGNIZED,
    IDENTITY_STAYS,
)
async def test_recover_needs_no_odd_node(
    config: StoreConfig, outside: Outside, kind: str, place: str
) -> None:
    plant(kind, PLACES[place](config.nodes[0].path), outside)
    shutil.rmtree(config.metadata)
    began = time.monotonic()
    recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    assert time.monotonic() - began < SECONDS_MAX
    assert outside.is_untouched()
    with trio.fail_after(SECONDS_MAX):
        async with opened(config) as one:
            for name, data in FILES.items():
                assert await one.get(name) == data


# --- names and numbers ---------------------------------------------------------


STRAYS = [
    "4294967295",
    "9999999999",
    "00000000",
    "0000000007",
    "7",
    "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669",
    os.fsdecode(b"\xff\xfe000000"),
    "00000001 ",
]


@pytest.mark.expects_log(FOREIGN_FILES)
async def test_strays_are_named_once_never_used_and_never_deleted(
    config: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    node, files = config.nodes[0].path, dict(FILES)
    strays = [node / "journal" / f"{name}.log" for name in STRAYS]
    strays += [node / "shards" / f"{name}.seg" for name in STRAYS]
    far = node / "shards" / f"{SEGMENT_MAX}.seg", node / "journal" / f"{SEGMENT_MAX}.log"
    for path in (*strays, *far):
        path.touch()
    (node / "shards/00009999.seg").mkdir()
    numbers = []
    for _ in range(2):
        await used(config, files)
        numbers.append(
            [
                max(n for n in map(int, names) if n < GAP_MAX)
                for names in (
                    [path.stem for path in (config.nodes[1].path / folder).iterdir()]
                    for folder in ("journal", "shards")
                )
            ]
        )
    assert all(path.exists() for path in (*strays, *far))
    assert (node / "shards/00009999.seg").is_dir()
    assert max(max(numbers)) < 100
    warned = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    for path in strays:
        named = ascii(f"{path.parent.name}/{path.name}")
        assert sum(named in text for text in warned) == 2, named  # in each of two mounts
    caplog.clear()
    async with opened(config) as one:
        assert all(member.in_sync for member in one.store.log.members.all)


def test_a_name_is_a_number_if_we_would_have_written_it_so() -> None:
    for number in (1, 99_999_999, 100_000_000, SEGMENT_MAX):
        assert segment_number(f"{number:08d}.seg", "seg") == number
        assert segment_number(f"{number:08d}.seg", "log") is None
        assert segment_number(f"{number:08d}.seg\n", "seg") is None
    for name in STRAYS:
        assert segment_number(f"{name}.seg", "seg") is None, name


def test_numbers_count_as_far_as_they_can_have_been_reached() -> None:
    assert reachable([], [0]) == []
    assert reachable([3, 1], [0]) == [1, 3]
    assert reachable([GAP_MAX, 2 * GAP_MAX], [0]) == [GAP_MAX]
    assert reachable([1, GAP_MAX + 6, 5], [0, 1]) == [1, 5]
    assert reachable([1, 5_000_000], [4_999_999]) == [1, 5_000_000]


# --- files ---------------------------------------------------------------------


def test_a_file_with_several_names_is_read_and_not_written(config: StoreConfig) -> None:
    node = open_node(config, config.nodes[0])
    segment = node.segments(SegmentKind.SHARDS)[0]
    path = config.nodes[0].path / segment_path(SegmentKind.SHARDS, segment)
    before, other = path.read_bytes(), path.with_name("other name")
    other.hardlink_to(path)
    assert node.read(SegmentKind.SHARDS, segment, 0, 64) == before[:64]
    assert node.is_shared(SegmentKind.SHARDS, segment)
    with pytest.raises(NodeError, match="2 names"):
        node.write(SegmentKind.SHARDS, segment, 0, [b"x"])
    node.truncate(SegmentKind.SHARDS, segment, 0)  # these release room as far as they can
    node.punch(segment, 0, 8192)
    assert path.read_bytes() == before
    other.unlink()
    node.write(SegmentKind.SHARDS, segment, 0, [b"x"])
    assert path.read_bytes() == b"x" + before[1:]
    node.close()


def test_a_closed_node_holds_no_descriptor_and_opens_none(config: StoreConfig) -> None:
    def held() -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        places = [os.readlink(link) for link in links if os.path.lexists(link)]
        return [place for place in places if place.startswith(str(config.nodes[0].path))]

    node = open_node(config, config.nodes[0])
    segment = node.segments(SegmentKind.SHARDS)[0]
    node.read(SegmentKind.SHARDS, segment, 0, 64)
    assert held()
    node.close()
    assert held() == []
    with pytest.raises(NodeError, match="it is closed"):
        node.read(SegmentKind.SHARDS, segment, 0, 64)


def test_a_draft_does_not_lead_elsewhere(tmp_path: Path, outside: Outside) -> None:
    (tmp_path / f".file.{os.getpid()}").symlink_to(outside.file)
    (tmp_path / "file").symlink_to(outside.file)
    write_whole(tmp_path / "file", "new")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_descriptor_of_a_segment_waits_for_the_disk(tmp_path: Path) -> None:
    """The kernel's ring does not wait on one that is O_NONBLOCK."""
    (tmp_path / "file").touch()
    fd = Directory.at(tmp_path).open("file", os.O_RDWR)
    assert os.get_blocking(fd)
    os.close(fd)


# --- sizes ---------------------------------------------------------------------


def record(place: Place, offset: int, number: int, size: int) -> bytes:
    """A commit whose record takes a little more than `size` bytes."""
    payload = encode_commit(Commit(number, 1, 0, 0, 0, bytes(16), (1,), {b"Znote": bytes(size)}))
    header = Header(Kind.COMMIT, len(payload), checksum_of(payload, len(payload)), 1, number)
    padding = bytes(header.record_length - 64 - len(payload))
    return header.encode(place.seed(offset)) + payload + padding


@pytest.mark.expects_log(JOURNAL_DAMAGED)
def test_a_long_journal_segment_is_read_to_its_last_record(config: StoreConfig) -> None:
    """A commit may be longer than all that is looked through behind the last record."""
    node = open_node(config, config.nodes[0])
    place = Place(config.uuid, node_name := config.nodes[0].name, SegmentKind.JOURNAL, 50)
    data = record(place, 0, 901, SEARCHED_BYTES_MAX + MIB)
    data += record(place, len(data), 902, 100)
    node.write(SegmentKind.JOURNAL, 50, 0, [data])
    found = read_journals(config.uuid, [(node_name, node)])
    assert {901, 902} <= found.commits.keys()
    assert found.unreadable == []
    os.truncate(config.nodes[0].path / segment_path(SegmentKind.JOURNAL, 50), 10 << 40)
    found = read_journals(config.uuid, [(node_name, node)])
    assert {901, 902} <= found.commits.keys()
    (lost,) = found.unreadable
    assert (lost.segment, lost.start) == (50, len(data) + SEARCHED_BYTES_MAX)
    assert "it is damaged" in lost.error
    node.close()


def test_a_long_identity_is_refused_at_once(config: StoreConfig) -> None:
    file = config.nodes[0].path / "node.toml"
    file.write_text("format = 1\nx = 1\n" + "".join(f"k{i} = 1\n" for i in range(22_000)))
    began = time.monotonic()
    with pytest.raises(NodeIdentityError, match="longer than 4096 bytes"):
        read_identity(config.nodes[0].path)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i} = 1\n" for i in range(20_000)),
        "".join(f"[[node]]\nk{i} = 1\n" for i in range(10_000)),
        "k = [\n" + "1,\n" * 80_000 + "]\n",
        'k = """\n' + "\n" * 200_000 + '"""\n',
    ],
)
def test_mistakes_in_a_long_file_are_found_soon(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    began = time.process_time()
    table = Table.read(tmp_path / "file")
    table.end()
    assert table.problems()
    assert time.process_time() - began < 10
    assert PARSED_MAX < 1 << 22


def test_mistakes_have_the_line_of_their_statement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(
        "# a comment\na = 1\nlong = [\n  1,\n  2,\n]\n\n[[node]] # first\nb = 2\n[[node]]\n"
        'c = """\n[[node]]\n"""\n[node.inner]\nd = 4\n[other]\ne = 5\n'
    )
    table = Table.read(tmp_path / "file")
    rows = table.take_tables("node")
    for row in rows:
        row.end()
    table.end()
    lines = [problem.split(":")[1] for problem in table.problems()]
    assert lines == ["2", "3", "9", "11", "14", "16"]


# --- too many nodes ------------------------------------------------------------


def test_more_nodes_than_a_row_takes_are_refused(config: StoreConfig) -> None:
    file = config.store / "fusestore.toml"
    more = "".join(f'[[node]]\nname = "n{i}"\npath = "{"x" * 200}/{i}"\n' for i in range(300))
    file.write_text(file.read_text() + more)
    with pytest.raises(ConfigError, match="use fewer nodes"):
        load(config.store)


# --- bugs ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__init__", "segments", "size", "read"])
@pytest.mark.expects_log(OUT_OF_USE, r"nodes\.unexpected: Node \S+ met an unexpected error")
async def test_a_bug_costs_that_node_only(
    config: StoreConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    real, broken = getattr(DirectoryNode, method), config.nodes[0].path

    def fails(self: DirectoryNode, *arguments: object, **options: object) -> object:
        if broken in (getattr(self, "path", None), *arguments[:1]):
            raise MemoryError
        return real(self, *arguments, **options)

    monkeypatch.setattr(DirectoryNode, method, fails)
    async with opened(config) as one:
        first, *others = one.store.log.members.all
        assert not first.in_sync
        assert all(member.in_sync for member in others)
        for name, data in FILES.items():
            assert await one.get(name) == data
    assert "Node us-east-1 met an unexpected error" in caplog.text
    assert any(record.exc_info for record in caplog.records)
