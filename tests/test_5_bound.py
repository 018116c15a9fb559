"""The nodes hold no more garbage than the manual says, whatever programs do.

Each program runs for minutes; the nodes are measured all the time.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import garbage
from support.mounted_store import Store, sync

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain, pytest.mark.long]

MIB = 1 << 20
FIRST_SECONDS = 60
"""Before the bound holds: the store is small, and the files that are worked on are written."""
SECONDS = 180


class Held(threading.Thread):
    """Measures what the nodes hold beside what the files in the store have."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.ended = threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        begun = time.monotonic()
        while not self.ended.wait(2):
            found = self.store.status()
            places = [Path(node["path"]) for node in found["nodes"]]
            shards = sum(held(place / "shards") for place in places)
            journals = sum(held(place / "journal") for place in places)
            seconds, waste = time.monotonic() - begun, found["cleaning"]["waste"] or 0
            self.samples.append(Sample(seconds, shards, journals, found["bytes"], waste))

    def worst(self) -> Sample:
        """The one that was farthest above the bound."""
        late = [sample for sample in self.samples if sample.seconds > FIRST_SECONDS]
        return max(late, key=lambda sample: sample.over)


@dataclass(frozen=True)
class Sample:
    """Bytes, at a moment."""

    seconds: float
    shards: int
    journals: int
    files: int
    waste: int

    @property
    def over(self) -> int:
        """The bytes on the nodes above the bound."""
        return int(self.shards + self.journals - 1.25 * 1.5 * self.files) - 128 * MIB

    def __str__(self) -> str:
        return (
            f"after {self.seconds:.0f} s: {self.shards / MIB:.0f} MiB of shards, "
            f"{self.journals / MIB:.0f} of journals; {self.files / MIB:.1f} of files, "
            f"{self.waste / MIB:.0f} of garbage; {self.over / MIB:.0f} above the bound"
        )


def held(folder: Path) -> int:
    """The bytes that files take on their disk; some may go meanwhile."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            pass
    return total


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("program", "seconds"),
    [
        (garbage.temporaries, SECONDS),
        (garbage.overwrites, SECONDS),
        (garbage.database, SECONDS),
        (garbage.mail, SECONDS),
        (garbage.repository, SECONDS),
        (garbage.image, SECONDS),
        pytest.param(
            garbage.postgres,
            600,
            marks=pytest.mark.skipif(not shutil.which("pgbench"), reason="needs PostgreSQL"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_nodes_keep_to_the_bound(
    make_store: Callable[..., Store],
    program: Callable[..., None],
    seconds: int,
    pytestconfig: pytest.Config,
) -> None:
    store = make_store()
    store.mount("allow_other")
    watch = Held(store)
    watch.start()
    try:
        ends = time.monotonic() + seconds
        chance = random.Random(pytestconfig.getoption("--model-seed"))
        program(store.mountpoint, lambda: time.monotonic() < ends, chance)
    finally:
        watch.ended.set()
        watch.join()
    print(program.__name__)
    for sample in watch.samples[:: max(1, len(watch.samples) // 8)]:
        print(sample)
    print("worst:", watch.worst())
    assert watch.worst().over <= 0
    sync(store.mountpoint)
    store.umount()
    assert store.cli("fsck", store.store).returncode == 0
