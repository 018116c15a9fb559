"""One history: what is opened, refused, said and advised when parts of a store are from elsewhere.

The database and each region may be of now, of an earlier moment, of a clone that went on by
itself, or away.  Whatever the combination: no file has bytes of two histories, nothing of a
history that nobody gave up is touched, and who follows the advice loses nothing that could be
had.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.commit import histories
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import FusestoreError, NodeError, ReplayError
from fusestore.files.filesystem import FileSystem
from fusestore.format.records import Header, Kind
from fusestore.format.store_rows import Descent, LogPosition
from fusestore.log.journal import Entry, Journals
from fusestore.members.standing import State
from fusestore.repair.rejoin import Rejoin
from fusestore.repair.risk import Safety
from fusestore.rescue.fsck import fsck
from fusestore.serve.offline import unwrapped
from fusestore.store.opening import open_store
from support.faults import BadSectors
from support.logs import (
    DISAGREE,
    DROPPED,
    FOREIGN_FILES,
    LOST_STRIPE,
    OTHER_HISTORY,
    OUT_OF_USE,
    TOO_FEW_NODES,
    UNREAD_FILE,
)
from support.opened_store import (
    REGIONS,
    Opened,
    crashed,
    healthy,
    limited,
    loses_a_region,
    make,
    make_with_two_nodes_a_region,
    opened,
    repair,
)
from support.recovery import copy_tree, dump_metadata, fingerprint, forget, instead, recovered
from support.whole_tree import Files, made, put, read, read_files, write

SIZE = 40_000


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


def small(seed: str, *names: str) -> dict[str, bytes]:
    return made(seed, *names, size=SIZE)


def journals_of(path: Path) -> dict[str, Any]:
    """All that is in a node's directory, as a fingerprint without times of directories."""
    return {name: about[1::2] for name, about in fingerprint(path).items() if Path(name).is_file()}


def untouched(before: dict[str, Any], path: Path) -> bool:
    """Whether all that a node's directory had is still there, as it was."""
    now = journals_of(path)
    return all(now.get(name) == about for name, about in before.items())


def state_of(one: Opened, name: str) -> State:
    member = one.store.log.members.named(name)
    assert member is not None
    return member.state


async def looked_at(one: Opened) -> None:
    """Let the nodes that are away be looked at."""
    with trio.fail_after(20):
        for _ in range(4):
            one.store.comeback.wake()
            await trio.sleep(0.02)


# --- reproductions


@dataclass
class Rolled:
    """A machine with two regions was rolled back to an image; the third region was not."""

    config: StoreConfig
    base: dict[str, bytes]
    lost: dict[str, bytes]
    """Written in the history that was rolled back."""
    nas: Path
    """Where the third region is, with all of it."""


async def rolled_back(base: Path, *, mounts: int, dumped: bool = False) -> Rolled:
    config = limited(make(base / "store"), retry_seconds_min=0.01)
    files = small("base", "base0", "base1", "base2")
    await write(config, files)
    copy_tree(config.store, base / "image")
    lost: dict[str, bytes] = {}
    for number in range(mounts):
        async with opened(config) as one:
            if number == 0:
                one.delete("base2")
            more = small(f"lost{number}", f"lost{number}", "both")
            await put(one, more)
            lost |= more
        if dumped and number == mounts - 2:
            await dump_metadata(config)
    config.nodes[2].path.rename(base / "nas")
    instead(base / "image", config.store)
    shutil.rmtree(config.nodes[2].path)
    return Rolled(config, files, lost, base / "nas")


@pytest.mark.expects_log(DROPPED, OTHER_HISTORY, LOST_STRIPE)
async def test_a_foreign_region_counts_as_absent_while_nothing_is_mounted(tmp_path: Path) -> None:
    """risk, status and fsck of a store at rest judge its nodes as a mount does."""
    rolled = await rolled_back(tmp_path, mounts=3)
    config = rolled.config
    await write(config, small("new", "new", "both"))
    rolled.nas.rename(config.nodes[2].path)
    before = journals_of(config.nodes[2].path)
    for away in (False, True):
        if away:
            config.nodes[1].path.rename(tmp_path / "away")
        async with open_store(config, read_only=True, background=False) as store:
            status = await store.status()
            assert not status["healthy"]
            assert status["nodes"][2]["state"] == "foreign"
            risk = await Safety(store.log, store.reader).risk([])
            assert bool(risk["lost_stripes"]) is away
            found = await fsck(store, repair=False, at_rest=True)
            assert not any("lies where another does" in text for text in found["findings"])
    assert untouched(before, config.nodes[2].path)


@pytest.mark.parametrize("dumped", [False, True])
@pytest.mark.parametrize("mounts", [1, 5])
@pytest.mark.expects_log(DROPPED, OTHER_HISTORY)
async def test_a_region_newer_than_what_was_restored_is_foreign(
    tmp_path: Path, mounts: int, dumped: bool
) -> None:
    rolled = await rolled_back(tmp_path, mounts=mounts, dumped=dumped)
    config, files = rolled.config, dict(rolled.base)
    async with opened(config) as one:
        files |= small("new", "new", "both")
        await put(one, small("new", "new", "both"))
        rolled.nas.rename(config.nodes[2].path)
        before = journals_of(config.nodes[2].path)
        await looked_at(one)
        status = await one.store.status()
        assert status["healthy"] is False
        assert state_of(one, REGIONS[2]) is State.FOREIGN
        (error,) = [node["error"] for node in status["nodes"] if node["error"]]
        assert "another history" in error
        assert "--discard-history" in error
        with pytest.raises(NodeError, match="--discard-history"):
            await repair(one, REGIONS[2])
        assert await read_files(one) == files
    assert untouched(before, config.nodes[2].path)
    for number in range(3):
        async with opened(config) as one:
            assert state_of(one, REGIONS[2]) is State.FOREIGN
            assert await read_files(one) == files
            files |= small(f"later{number}", "later", "new")
            await put(one, small(f"later{number}", "later", "new"))
    assert untouched(before, config.nodes[2].path)
    async with opened(config) as one:
        done = await repair(one, REGIONS[2], discard_history=True)
        assert done["unrepairable"] == []
        await healthy(one)
        assert await read_files(one) == files
    shutil.rmtree(config.nodes[0].path)
    assert await read(config) == files


@pytest.mark.parametrize("code", ["2+1", "1+2", "4+2"])
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.expects_log(OTHER_HISTORY, DROPPED, OUT_OF_USE)
async def test_no_row_is_in_doubt_when_a_history_was_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, interrupted: bool
) -> None:
    """Shards of the clone lie where the rows have ours: this is expected, and no damage."""
    config = (
        make(tmp_path / "store", code)
        if code != "4+2"
        else (make_with_two_nodes_a_region(tmp_path / "store", code))
    )
    files = made("base", "a", "b", size=300_000)
    await write(config, files)
    copy_tree(config.store, tmp_path / "clone")
    clone = load(tmp_path / "clone")
    for number in range(3):
        await write(clone, made(f"theirs{number}", f"t{number}", size=300_000 + 999 * number))
    ours = [made(f"ours{n}", f"o{n}", size=280_000 + 1000 * n) for n in range(4)]
    for more in ours:
        await write(config, more)
        files |= more
    own = [node for node in config.nodes if node.region == config.nodes[-1].region]
    for node, theirs in zip(config.nodes, clone.nodes, strict=True):
        if node in own:
            instead(theirs.path, node.path)
    async with opened(config) as one:
        for node in own:
            if interrupted:
                with monkeypatch.context() as patched, pytest.raises(NodeError):
                    patched.setattr(Rejoin, "join", refuse)
                    await repair(one, node.name, discard_history=True)
            await repair(one, node.name, discard_history=not interrupted)
        status = await one.store.status()
        assert (status["healthy"], status["rows_in_doubt"]) == (True, 0)
        assert await read_files(one) == files
        await one.checkpoint()
        found = await fsck(one.store, repair=False, at_rest=False)
        assert found["clean"], found
        with trio.fail_after(10):
            while one.rows(b"R"):  # noqa: ASYNC110
                await trio.sleep(0.02)
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=False, at_rest=True)
        assert found["clean"], found
    for node in config.nodes:
        if node.region == config.nodes[0].region:
            shutil.rmtree(node.path)
    assert await read(config) == files


async def refuse(*_: object) -> None:
    raise NodeError("It stops.")


@pytest.mark.expects_log(DROPPED, OTHER_HISTORY)
async def test_nothing_is_freed_while_a_node_is_foreign(tmp_path: Path) -> None:
    rolled = await rolled_back(tmp_path, mounts=2)
    config = rolled.config
    rolled.nas.rename(config.nodes[2].path)
    before = {index: journals_of(config.nodes[index].path) for index in (0, 1)}
    shards = {
        index: {name: about for name, about in found.items() if "/shards/" in name}
        for index, found in before.items()
    }
    # What is ahead cannot be read without what was rolled back; the third is away at first.
    config.nodes[2].path.rename(tmp_path / "away")
    await write(config, small("mine", "mine"))
    (tmp_path / "away").rename(config.nodes[2].path)
    async with opened(config) as one:
        assert state_of(one, REGIONS[2]) is State.FOREIGN
        one.delete("base0")
        await one.checkpoint()
        await one.checkpoint()
        await trio.sleep(0.1)
        assert one.rows(b"R")
        await one.store.dumper.take()
    for index in (0, 1):
        for name, about in shards[index].items():
            assert journals_of(config.nodes[index].path)[name] == about
    async with opened(config) as one:
        await repair(one, REGIONS[2], discard_history=True)
        await healthy(one)
        await one.checkpoint()
        with trio.fail_after(10):
            while one.rows(b"R"):  # noqa: ASYNC110
                await trio.sleep(0.02)


async def test_what_is_ahead_and_cannot_be_read_is_refused(tmp_path: Path) -> None:
    rolled = await rolled_back(tmp_path, mounts=2)
    config = rolled.config
    rolled.nas.rename(config.nodes[2].path)
    before = fingerprint(*(node.path for node in config.nodes))
    with pytest.raises(ReplayError, match=f"{REGIONS[2]} is ahead of the metadata") as refused:
        await read(config)
    assert "accept" not in str(refused.value)
    assert fingerprint(*(node.path for node in config.nodes)) == before
    config.nodes[2].path.rename(tmp_path / "away")  # as it says
    assert await read(config) == rolled.base


@pytest.mark.expects_log(OTHER_HISTORY)
async def test_a_region_of_a_clone_is_not_in_sync_by_its_numbers(
    config: StoreConfig, tmp_path: Path
) -> None:
    """Two copies of a store were used; they have as many commits."""
    base = small("base", "a", "b")
    await write(config, base)
    copy_tree(config.store, tmp_path / "clone")
    clone = load(tmp_path / "clone")
    await write(config, small("ours", "ours"))
    await write(clone, small("theirs", "theirs"))
    instead(clone.nodes[2].path, config.nodes[2].path)
    before = journals_of(config.nodes[2].path)
    async with opened(config) as one:
        assert state_of(one, REGIONS[2]) is State.FOREIGN
        assert await read_files(one) == base | small("ours", "ours")
        await put(one, small("more", "more"))
    assert untouched(before, config.nodes[2].path)


@pytest.mark.expects_log(DROPPED, OTHER_HISTORY)
async def test_a_longer_clone_does_not_keep_the_store_from_opening(
    config: StoreConfig, tmp_path: Path
) -> None:
    await write(config, small("base", "a"))
    copy_tree(config.store, tmp_path / "clone")
    clone = load(tmp_path / "clone")
    await write(config, small("ours", "ours"))
    for number in range(8):
        await write(clone, small(f"theirs{number}", "theirs", f"t{number}"))
    instead(clone.nodes[0].path, config.nodes[0].path)
    async with opened(config) as one:
        assert state_of(one, REGIONS[0]) is State.FOREIGN
        assert (await read_files(one)).keys() == {"a", "ours"}


async def test_a_region_of_an_older_moment_is_brought_back_by_itself(
    config: StoreConfig, tmp_path: Path
) -> None:
    """All that it holds is in our past: nothing can be lost by rebuilding it."""
    await write(config, small("then", "a", "b"))
    copy_tree(config.nodes[1].path, tmp_path / "then")
    await write(config, small("now", "b", "c"))
    instead(tmp_path / "then", config.nodes[1].path)
    files = small("then", "a") | small("now", "b", "c")
    async with opened(config) as one:
        await healthy(one)
        assert await read_files(one) == files
    shutil.rmtree(config.nodes[0].path)
    assert await read(config) == files


async def test_an_old_copy_of_the_database_is_to_be_recovered(
    config: StoreConfig, tmp_path: Path
) -> None:
    await write(config, small("old", "old"))
    copy_tree(config.metadata, tmp_path / "backup")
    await write(config, small("new", "new"))
    await dump_metadata(config)
    instead(tmp_path / "backup", config.metadata)
    before = fingerprint(*(node.path for node in config.nodes))
    for accept_loss in (False, True):
        with pytest.raises(ReplayError, match="fusestore recover") as refused:
            async with open_store(config, accept_loss=accept_loss):
                pytest.fail("mounted")
        assert "accept" not in str(refused.value)
        assert "restored from an old copy" in str(refused.value)
    assert fingerprint(*(node.path for node in config.nodes)) == before
    config.metadata.rename(tmp_path / "metadata.old")
    recovered(config)
    assert await read(config) == small("old", "old") | small("new", "new")


async def test_a_database_of_a_clone_is_refused(config: StoreConfig, tmp_path: Path) -> None:
    await write(config, small("base", "a"))
    copy_tree(config.store, tmp_path / "clone")
    clone = load(tmp_path / "clone")
    await write(config, small("ours", "ours"))
    await write(clone, small("theirs", "theirs"))
    instead(clone.metadata, config.metadata)
    with pytest.raises(ReplayError, match="which no node holds") as refused:
        await read(config)
    assert "accept" not in str(refused.value)


@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE, DROPPED, FOREIGN_FILES)
async def test_recover_refuses_to_choose_between_two_histories(
    config: StoreConfig, tmp_path: Path
) -> None:
    await write(config, small("base", "a"))
    copy_tree(config.store, tmp_path / "clone")
    clone = load(tmp_path / "clone")
    await write(config, small("ours", "ours"))
    for number in range(3):
        await write(clone, small(f"theirs{number}", "theirs"))
    instead(clone.nodes[2].path, config.nodes[2].path)
    forget(config)
    with pytest.raises(ReplayError, match="Two histories were acknowledged") as refused:
        recovered(config)
    text = str(refused.value)
    assert all(name in text for name in REGIONS)
    assert text.count("last change 20") == 2
    assert "--history NODE" in text
    copy_tree(config.store, tmp_path / "other")
    recovered(config, history=REGIONS[0])
    async with opened(config) as one:
        await healthy(one)
        assert await read_files(one) == small("base", "a") | small("ours", "ours")
    other = load(tmp_path / "other")
    result = recovered(other, history=REGIONS[2])
    assert result["lost"] == ["/theirs"]
    found = await read(other)
    assert found == small("base", "a") | {"theirs": None}


@pytest.mark.expects_log(DROPPED, FOREIGN_FILES)
async def test_recover_does_not_revive_a_history_whose_beginning_is_gone(tmp_path: Path) -> None:
    """The rolled-back history has a metadata dump: nothing connects it with the living one."""
    rolled = await rolled_back(tmp_path, mounts=6, dumped=True)
    config = rolled.config
    files = rolled.base | small("new", "new")
    await write(config, small("new", "new"))
    rolled.nas.rename(config.nodes[2].path)
    forget(config)
    for accept_loss in (False, True):
        with pytest.raises(ReplayError, match="--history NODE") as refused:
            recovered(config, accept_loss=accept_loss)
        assert "accept" not in str(refused.value)
        assert {REGIONS[0], REGIONS[1]} <= set(str(refused.value).replace(",", "").split())
    recovered(config, history=REGIONS[0])
    async with opened(config) as one:
        await healthy(one)
        assert await read_files(one) == files


async def test_fsck_is_not_clean_when_shards_are_those_of_an_older_moment(
    config: StoreConfig, tmp_path: Path
) -> None:
    """Two regions' shards are put back from a backup; their journals are of now."""
    await write(config, small("then", "a"))
    for index in (0, 1):
        copy_tree(config.nodes[index].path / "shards", tmp_path / f"then{index}")
    await write(config, small("now", "b"))
    for index in (0, 1):
        instead(tmp_path / f"then{index}", config.nodes[index].path / "shards")
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=False, at_rest=True)
        assert found["findings"], found


async def test_fsck_looks_at_the_headers_of_shards(config: StoreConfig) -> None:
    """The segment is as long as it was, and has other bytes."""
    await write(config, small("bytes", "a", "b"))
    path = next((config.nodes[1].path / "shards").iterdir())
    path.write_bytes(bytes(path.stat().st_size))
    for at_rest in (True, False):
        async with open_store(config, background=False) as store:
            found = await fsck(store, repair=False, at_rest=at_rest)
            assert any("has lost" in text for text in found["findings"]), found


# --- every combination


@dataclass
class World:
    """A store at two moments, and a clone of the earlier one that went on."""

    base: Path
    config: StoreConfig
    states: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By history: the files."""

    @property
    def needed(self) -> int:
        """Regions that are enough to read everything."""
        return {"2+1": 2, "4+2": 2, "1+2": 1}[str(self.config.code)]

    @property
    def parts(self) -> dict[str, list[str]]:
        """By region: its nodes, which are from the same moment."""
        found: dict[str, list[str]] = {region: [] for region in REGIONS}
        for node in self.config.nodes:
            found[node.region].append(node.name)
        return found


SOURCES = ("now", "earlier", "clone", "away")


async def make_world(base: Path, code: str) -> World:
    config = (make_with_two_nodes_a_region if code == "4+2" else make)(base / "store", code)
    world = World(base, config)
    then = small("then", "base", "changed")
    await write(config, then)
    await write(config, small("then", "third"))
    world.states["earlier"] = then | small("then", "third")
    copy_tree(config.store, base / "earlier")
    copy_tree(config.store, base / "clone")
    await write(config, small("now", "changed", "now1"))
    await write(config, small("now", "now2"))
    world.states["now"] = world.states["earlier"] | small("now", "changed", "now1", "now2")
    clone = load(base / "clone")
    for number in range(3):
        await write(clone, small("clone", "changed", f"clone{number}"))
    names = ("changed", "clone0", "clone1", "clone2")
    world.states["clone"] = world.states["earlier"] | small("clone", *names)
    copy_tree(config.store, base / "now")
    return world


class Operator:
    """Does what the messages say, to the letter, with the parts that there are."""

    def __init__(self, world: World, sources: tuple[str, ...], place: Path) -> None:
        self.world, self.sources, self.place = world, sources, place
        self.said: list[str] = []
        store = place / "store"
        store.mkdir(parents=True)
        shutil.copy(world.config.store / "fusestore.toml", store)
        self.config = load(store)
        parts = [["metadata"], *world.parts.values()]
        self._source = {
            name: source for source, names in zip(sources, parts, strict=True) for name in names
        }
        for name, source in self._source.items():
            if source != "away":
                copy_tree(world.base / source / name, store / name)
        del self._source["metadata"]
        self.names = list(self._source)
        self.gone = {name for name in self.names if self.source(name) == "away"}
        self.before = {
            name: journals_of(store / name) for name in self.names if name not in self.gone
        }
        now = sum(source == "now" for source in sources[1:])
        self.unwanted = "clone" if now >= world.needed else "now"
        """The operator knows which history is right."""
        self.accepted = False
        self.chosen = ""

    def source(self, name: str) -> str:
        return self._source[name]

    async def run(self) -> Files | None:
        """What is opened in the end; None when nothing could be."""
        if self.sources[0] == "away" and not self._recover():
            return None
        for _ in range(6):
            try:
                return await self._mount()
            except (FusestoreError, BaseExceptionGroup) as raised:
                error = unwrapped(raised) if isinstance(raised, BaseExceptionGroup) else raised
                if not isinstance(error, FusestoreError):
                    raise
                self._note(error)
                if not self._obey(str(error)):
                    return None
        raise AssertionError(f"the advice goes in circles: {self.said}")

    def _note(self, error: Exception) -> None:
        self.said.append(str(error))
        if not self.gone and "earlier" not in self.sources[1:]:
            assert "accept" not in str(error), error

    async def _mount(self) -> Files:
        async with (
            open_store(self.config, accept_loss=self.accepted) as store,
            trio.open_nursery() as nursery,
        ):
            one = Opened(store, FileSystem(store, nursery))
            await one.files.begin()
            await looked_at(one)
            found = await read_files(one)
            self.status = await store.status()
            nursery.cancel_scope.cancel()
        return found

    def _obey(self, text: str) -> bool:
        if "fusestore recover" in text:
            (self.config.metadata).rename(self.place / f"metadata{len(self.said)}")
            return self._recover()
        if "away, and mount" in text:
            part = text.rsplit("move ", maxsplit=1)[-1] if "move " in text else text
            names = [name for name in self.names if name in part.split(" away")[0]]
            if "Two histories" in text:
                names = [name for name in self.names if self.source(name) == self.unwanted]
            for name in names:
                (self.config.store / name).rename(self.place / f"moved-{name}")
            return bool(names)
        if "accept_loss" in text and not self.accepted:
            self.accepted = True
            return True
        return False

    def _recover(self) -> bool:
        options: dict[str, Any] = {}
        for _ in range(3):
            try:
                recovered(self.config, **options)
            except FusestoreError as error:
                self._note(error)
                if "--history" in str(error):
                    others = (self.unwanted, "earlier", "away")
                    right = [n for n in self.names if self.source(n) not in others]
                    self.chosen = options["history"] = right[0]
                elif "--accept-loss" in str(error):
                    options["accept_loss"] = True
                else:
                    return False
            else:
                return True
        return False


def check_outcome(world: World, operator: Operator, found: Files | None) -> None:
    """What must be true whatever the parts were."""
    sources, k = operator.sources, world.needed
    regions = sources[1:]
    told = f"{sources}: {operator.said}"
    holding = {
        history: sum(source == history for source in regions) for history in ("now", "clone")
    }
    rival = holding["now"] and holding["clone"]
    base = sum(source != "away" for source in regions)
    if found is None:
        assert base < k or (holding["now"] < k and holding["clone"] < k), told
        return
    histories = [
        name
        for name, files in world.states.items()
        if found.keys() == files.keys()
        and all(data is None or data == files[path] for path, data in found.items())
    ]
    assert histories, f"a mixture; {told}: {[(n, d is not None) for n, d in found.items()]}"
    if holding["now"] >= k and not rival:
        assert found == world.states["now"], told
    if holding["clone"] >= k and not rival and "now" not in sources:
        assert found == world.states["clone"], told
    if base >= k:
        assert found["base"] == world.states["earlier"]["base"], told
    if operator.status["healthy"]:
        assert None not in found.values(), told
    kept = "now" if "now" in histories else "clone" if "clone" in histories else "earlier"
    for name in operator.names:
        other = {"now": "clone", "clone": "now"}.get(kept, "")
        if operator.source(name) == other and not operator.chosen and not operator.accepted:
            place = operator.config.store / name
            if place.exists():
                assert untouched(operator.before[name], place), f"{name}; {told}"


def combinations() -> Iterator[tuple[str, ...]]:
    for sources in itertools.product(SOURCES, repeat=4):
        if sources[1:] != ("away",) * 3:
            yield sources


@pytest.mark.parametrize("code", ["2+1", "1+2", pytest.param("4+2", marks=pytest.mark.long)])
@pytest.mark.expects_log(
    DISAGREE, UNREAD_FILE, LOST_STRIPE, DROPPED, FOREIGN_FILES, OTHER_HISTORY, TOO_FEW_NODES
)
async def test_every_combination_of_moments(tmp_path: Path, code: str) -> None:
    world = await make_world(tmp_path / "world", code)
    failures = []
    for number, sources in enumerate(combinations()):
        operator = Operator(world, sources, tmp_path / f"c{number}")
        try:
            check_outcome(world, operator, await operator.run())
        except Exception as error:
            failures.append(f"{sources}: {type(error).__name__}: {str(error)[:1500]}")
        shutil.rmtree(operator.place)
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:40])


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_restored_region_is_doubted_until_it_was_looked_through(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon dies while the region, which lacks shards, is being rebuilt."""
    files = small("restored", "a", "b", "c")
    node = config.nodes[1].path
    async with opened(config) as one:  # one mount: the same segments have old and new shards
        await one.put("a", files["a"])
        await one.store.committer.commit()
        copy_tree(node, node.with_name("image"))
        for name, data in files.items():
            await one.put(name, data)
    instead(node.with_name("image"), node)
    copies = list[StoreConfig]()

    async def dies(rejoin: Rejoin, *arguments: Any, **options: Any) -> tuple[int, int]:
        if not copies:
            copies.append(crashed(config, config.store.with_name("crashed")))
        raise NodeError("It died, as told.")

    monkeypatch.setattr(Rejoin, "rebuild_all", dies)
    async with opened(config) as one:
        with trio.fail_after(20):
            while not copies:
                one.store.comeback.wake()
                await trio.sleep(0.02)
    monkeypatch.undo()
    async with opened(copies[0]) as one:
        await healthy(one)
    await loses_a_region(copies[0], 0, files)


# --- a history that was given up, whose records are on all nodes


@dataclass
class GaveUp:
    """A store that went on without its last commits, which can be read again."""

    config: StoreConfig
    files: dict[str, bytes]
    dead: Path
    """The metadata of the history that was given up."""


def last_journals(config: StoreConfig) -> list[Path]:
    return [max((node.path / "journal").glob("*.log")) for node in config.nodes]


async def gave_up(base: Path, how: str) -> GaveUp:
    """The last segment of all nodes could not be read, or had zeros; its loss was accepted."""
    config = make(base / "store")
    files = small("given up", "f0", "f1")
    await write(config, files)
    await write(config, small("dead", "d0", "d1", "d2"))
    copy_tree(config.metadata, base / "dead")
    kept = {path: path.read_bytes() for path in last_journals(config)}
    with BadSectors() as bad:
        for path, data in kept.items():
            if how == "unreadable":
                bad.add(path, 0, len(data))
            else:
                path.write_bytes(bytes(len(data)))
        forget(config)
        recovered(config, accept_loss=True)
        files |= small("living", "l0", "l1")
        async with opened(config, accept_loss=how == "unreadable") as one:
            for name in await read_files(one):
                if name not in files:
                    one.delete(name)
            for name, data in files.items():
                await one.put(name, data)
    for path, data in kept.items():
        if how == "zeros":
            path.write_bytes(data)
    assert await read(config) == files
    return GaveUp(config, files, base / "dead")


@pytest.mark.parametrize("how", ["unreadable", "zeros"])
@pytest.mark.expects_log(DROPPED, UNREAD_FILE)
async def test_metadata_of_a_history_that_was_given_up_is_refused(tmp_path: Path, how: str) -> None:
    """All nodes hold both histories; the advice leads to the one that went on."""
    store = await gave_up(tmp_path, how)
    instead(store.dead, store.config.metadata)
    for accept_loss in (False, True):
        with pytest.raises(ReplayError, match=r"given up.*fusestore recover"):
            async with open_store(store.config, accept_loss=accept_loss):
                pass
    forget(store.config)
    recovered(store.config, history=REGIONS[0] if how == "zeros" else "")
    assert await read(store.config) == store.files


@pytest.mark.parametrize("how", ["unreadable", "zeros"])
@pytest.mark.expects_log(DROPPED, UNREAD_FILE)
async def test_no_history_continues_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nodes hold two histories that went on in turns, as no tool lets them do now."""
    store = await gave_up(tmp_path, how)
    config = store.config
    copy_tree(config.metadata, tmp_path / "living")
    instead(store.dead, config.metadata)
    with monkeypatch.context() as patch:
        patch.setattr(histories.Histories, "refuse_old_metadata", lambda *_: None)
        async with opened(config) as one:
            for number in range(8):
                await one.put(f"z{number}", b"of the dead" * 5000)
                await one.store.committer.commit()
    instead(tmp_path / "living", config.metadata)
    try:
        async with opened(config) as one:
            found = await read_files(one)
    except ReplayError:
        return
    assert found == store.files


def commit_of(number: int, epoch: int, nonce: bytes, **fields: Any) -> Entry:
    header = Header(Kind.COMMIT, 0, 1000 * epoch + number, epoch, number)
    return Entry(header, nonce=nonce, holders=set(REGIONS), **fields)


@pytest.mark.parametrize(
    ("descent", "follows"),
    [
        (Descent(4, 2004, "02" * 16), True),
        (Descent(4, 2004, "03" * 16), False),
        (Descent(5, 2005, "03" * 16), True),
        (Descent(5, 3005, "02" * 16), False),
    ],
    ids=["of the epoch", "of another epoch", "of the base", "of another base"],
)
def test_an_epoch_continues_only_what_its_first_commit_names(
    descent: Descent, follows: bool
) -> None:
    """Commits 6 to 8 are missing; the epoch after them repeats all since its base."""
    first = commit_of(9, 7, b"\7" * 16, base=descent.base, descent=descent)
    journals = Journals()
    journals.commits.update({5: [commit_of(5, 2, b"\2" * 16)], 9: [first]})
    start = LogPosition(2, "02" * 16, 5, 2005)
    assert list(journals.chain(start)) == [first] * follows
    assert (journals.predecessor(first) is not None) is follows
