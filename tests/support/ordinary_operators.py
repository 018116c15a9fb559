"""Events of the campaign of ordinary life: operators ask, and do more than they need to.

Each is a function of a `Life`, which returns whether it could happen.
"""

from __future__ import annotations

from support.mounted_store import sync
from support.ordinary_life import Life, some_node
from support.ordinary_model import BrokenPromiseError


def ask(life: Life) -> bool:
    """Somebody asks about everything while there is trouble."""
    store = str(life.world.store.store)
    for words in (["status"], ["risk"], ["fsck"], ["node", "list"], ["scrub", store, "status"]):
        done = life.cli(*words, *([store] if store not in words else []))
        if done.returncode not in (0, 1):
            raise BrokenPromiseError(f"{words} fails")
    return True


def scrub_in_trouble(life: Life) -> bool:
    """A scrub runs while there is trouble."""
    gone = {name for cause in life.causes for name in cause.nodes if not cause.destroys}
    if len(life.hurt) > life.world.bears or life.tolerated:
        return False
    done = life.cli("scrub", str(life.world.store.store), "start", "--wait", "--quiet")
    if done.returncode not in (0, 1) or (gone and done.returncode == 0):
        raise BrokenPromiseError(f"scrub says {done.returncode} while {gone} are not there")
    return True


def needless_repair(life: Life) -> bool:
    """Somebody repairs a node that lacks nothing."""
    if life.causes:
        return False
    store = str(life.world.store.store)
    if life.cli("repair", store, some_node(life), "--quiet").returncode:
        raise BrokenPromiseError("a repair of a node that lacks nothing failed")
    return True


def needless_fsck(life: Life) -> bool:
    """Somebody runs `fsck --repair` on a store that is well, and first while it is mounted."""
    if life.causes or life.damaged:
        return False
    store = str(life.world.store.store)
    if life.cli("fsck", store, "--repair").returncode != 2:
        raise BrokenPromiseError("fsck --repair of a mounted store was not refused")
    life.umount()
    if life.cli("fsck", store, "--repair").returncode:
        raise BrokenPromiseError("fsck found something")
    life.mount()
    life.compare(crashed=False)
    return True


def drill(life: Life) -> bool:
    """Somebody asks whether a region could be lost."""
    if life.hurt or life.tolerated:
        return False
    sync(life.world.store.mountpoint)
    life.model.acknowledged()
    store = str(life.world.store.store)
    if life.cli("drill", store, "--lose", some_node(life), "--all", "--quiet").returncode:
        raise BrokenPromiseError("a region could not be lost")
    return True


EVENTS = (
    ask,
    scrub_in_trouble,
    needless_repair,
    needless_fsck,
    drill,
)
