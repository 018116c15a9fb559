"""Events of the campaign of ordinary life: nodes move, and are lost, copied and restored.

Each is a function of a `Life`, which returns whether it could happen.
"""

from __future__ import annotations

from pathlib import Path

from support.ordinary_life import Cause, Life, remove, some_node
from support.ordinary_model import BrokenPromiseError
from support.ordinary_world import run


def move_away(life: Life) -> bool:
    """The directory of a node is moved away, and back later."""
    name = some_node(life)
    path = life.world.node(name)
    away = path.with_name(f"{name}.away")
    if name in life.hurt or not life.may_lose(frozenset({name})):
        return False
    path.rename(away)

    def back() -> None:
        if path.exists():  # nobody may have made it anew
            raise BrokenPromiseError(f"{path} was made while the node was away")
        away.rename(path)

    life.add(Cause(f"{name} is moved away", frozenset({name}), undo=back))
    life.must_notice(name)
    return True


def move_several_away(life: Life) -> bool:
    """More nodes are away at a time than the code bears, for a while: a cable is pulled."""
    if life.hurt or life.tolerated:
        return False
    count = life.chance.randrange(life.world.bears + 1, len(life.world.nodes) + 1)
    names = sorted(life.chance.sample(sorted(life.world.nodes), count))
    paths = [life.world.node(name) for name in names]
    for path in paths:
        path.rename(path.with_name(f"{path.name}.away"))

    def back() -> None:
        for path in paths:
            path.with_name(f"{path.name}.away").rename(path)

    life.add(Cause(f"{', '.join(names)} are moved away", frozenset(names), undo=back))
    life.work(6)
    for name in names:
        life.must_notice(name)
    return True


def take_offline(life: Life) -> bool:
    """A node is offline for a while, as for a new cable."""
    name, store = some_node(life), str(life.world.store.store)
    if name in life.hurt or not life.may_lose(frozenset({name})) or life.tolerated:
        return False
    if life.cli("node", "offline", store, name).returncode:
        raise BrokenPromiseError(f"{name} cannot be taken offline")

    def online() -> None:
        if life.cli("node", "online", store, name).returncode not in (0, 1):
            raise BrokenPromiseError(f"{name} cannot be taken online")

    life.add(Cause(f"{name} is offline", frozenset({name}), undo=online))
    return True


def copied(source: Path, target: Path) -> None:
    """Copy a directory as a careful operator does."""
    run("cp", "-a", "--sparse=always", source, target)
    run("sync", "--file-system", target)


def move_copy(life: Life) -> bool:
    """A node is copied, as to another disk, and the copy takes its place."""
    name = some_node(life)
    path = life.world.node(name)
    if name in life.hurt or life.tolerated or len(life.hurt) >= life.world.bears:
        return False
    life.umount()
    copy = life.world.top / "copy"
    run("cp", "-a", "--sparse=always", path, copy)
    remove(path)
    copied(copy, path)
    remove(copy)
    life.note(f"{name} is a copy")
    life.mount()
    life.compare(crashed=False)
    return True


def swap(life: Life) -> bool:
    """Two nodes are swapped while the store is not mounted."""
    if life.hurt or life.tolerated:
        return False
    one, two = life.chance.sample(sorted(life.world.nodes), 2)
    first, second = life.world.node(one), life.world.node(two)
    if life.world.nodes[one] is not life.world.nodes[two]:
        return False  # a rename does not reach another file system
    life.umount()

    def exchange() -> None:
        first.rename(first.with_name("swapped"))
        second.rename(first)
        first.with_name("swapped").rename(second)

    exchange()
    life.note(f"{one} and {two} are swapped")
    done = life.world.store.try_mount()
    life.note(f"mount: {done.returncode} {done.stderr.strip()[:500]}")
    if done.returncode == 0:
        if life.world.bears < 2:
            raise BrokenPromiseError(
                "it was mounted although two nodes are not what they are to be"
            )
        life.compare(crashed=False)
        life.umount()
    exchange()
    life.mount()
    life.compare(crashed=False)
    return True


def wipe(life: Life) -> bool:
    """A node is lost, or a part of it."""
    name = some_node(life)
    path = life.world.node(name)
    if name in life.hurt or not life.may_lose(frozenset({name})):
        return False
    what = life.chance.choice(["", "", "shards", "journal", "segment", "node.toml", "identity"])
    if what == "segment":
        segments = sorted((path / "shards").iterdir())
        if not segments:
            return False
        what = f"shards/{life.chance.choice(segments).name}"
    if what == "identity":
        (path / "node.toml").write_bytes(b"")
        what = "the contents of node.toml"
    target = path / what
    if target.is_dir():
        remove(target)
    elif not target.exists():
        pass
    else:
        target.unlink()
    life.to_scrub |= bool(what)
    life.add(Cause(f"{name}/{what} is lost", frozenset({name}), destroys=True))
    if not what:
        life.must_notice(name)
    return True


def keep_copy(life: Life) -> bool:
    """Somebody copies a node or the database, for a restore at a later moment."""
    if life.hurt or life.causes:
        return False
    what = life.chance.choice(["metadata", some_node(life)])
    source = life.world.store.store / what if what == "metadata" else life.world.node(what)
    copy = life.world.top / f"kept-{what}"
    remove(copy)
    life.world.stop()
    try:
        run("cp", "-a", "--sparse=always", source, copy)
    finally:
        life.world.go_on()
    life.kept[what] = copy
    life.note(f"{what} is copied")
    return True


def _put_back(copy: Path, target: Path) -> None:
    remove(target)
    copied(copy, target)


def restore_node(life: Life) -> bool:
    """A node is restored from a copy of an earlier moment."""
    names = sorted(set(life.kept) - {"metadata"})
    if not names or life.hurt or life.tolerated:
        return False
    name = life.chance.choice(names)
    mounted = life.chance.random() < 0.5
    if not mounted:
        life.umount()
    _put_back(life.kept[name], life.world.node(name))
    life.add(Cause(f"{name} is restored from a copy", frozenset({name}), destroys=True))
    if not mounted:
        life.mount()
        life.compare(crashed=False)
    return True


def restore_metadata(life: Life) -> bool:
    """The database is restored from a copy of an earlier moment."""
    if "metadata" not in life.kept or life.hurt or life.causes:
        return False
    crashed = life.chance.random() < 0.3
    if crashed:
        life.world.store.kill()
    else:
        life.umount()
    _put_back(life.kept["metadata"], life.world.store.store / "metadata")
    life.note("the database is restored from a copy")
    names = sorted(set(life.kept) - {"metadata"})
    if names and life.chance.random() < 0.4:
        name = life.chance.choice(names)
        _put_back(life.kept[name], life.world.node(name))
        life.add(Cause(f"{name} is restored from a copy", frozenset({name}), destroys=True))
    life.mount()
    life.compare(crashed=crashed)
    return True


def lose_metadata(life: Life) -> bool:
    """The database is lost, perhaps together with a node, and is recovered."""
    if life.hurt or life.tolerated:
        return False
    crashed = life.chance.random() < 0.5
    if crashed:
        life.work(10)
        life.world.store.kill()
    else:
        life.umount()
    remove(life.world.store.store / "metadata")
    life.note(f"the database is removed after {'a kill' if crashed else 'an umount'}")
    if life.chance.random() < 0.4:
        name = some_node(life)
        remove(life.world.node(name))
        life.add(Cause(f"{name} is lost", frozenset({name}), destroys=True))
    life.mount()
    life.compare(crashed=crashed)
    return True


EVENTS = (
    move_away,
    move_several_away,
    take_offline,
    move_copy,
    swap,
    wipe,
    keep_copy,
    restore_node,
    restore_metadata,
    lose_metadata,
)
