"""A job in the background: its transitions, and what survives a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import UsageError
from fusestore.log.background_job import BackgroundJob, JobRow
from support.opened_store import Opened, make, opened

KEY = b"Zjob"
REFUSALS = {"begin": "It is {state}: wait.", "pause": "Nothing runs.", "resume": "None is paused."}


@dataclass(slots=True)
class Row(JobRow):
    count: int = 0


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


@pytest.fixture
async def one(config: StoreConfig) -> AsyncIterator[Opened]:
    async with opened(config) as store:
        yield store


def job_of(one: Opened) -> BackgroundJob[Row]:
    return BackgroundJob(one.store.log, KEY, Row, REFUSALS)


def do(job: BackgroundJob[Row], transition: str) -> None:
    if transition == "begin":
        job.begin(Row(count=1))
    elif transition == "resume":
        job.resume(None)
    else:
        getattr(job, transition)()


WAYS: dict[str, tuple[str, ...]] = {
    "never": (),
    "running": ("begin",),
    "paused": ("begin", "pause"),
    "stopped": ("begin", "stop"),
    "done": ("begin", "end"),
}
ALLOWED = {
    **{(state, "begin"): "running" for state in ("never", "stopped", "done")},
    ("running", "pause"): "paused",
    ("paused", "resume"): "running",
    ("running", "stop"): "stopped",
    ("running", "end"): "done",
}


@pytest.mark.parametrize("transition", ["begin", "pause", "resume", "stop", "end"])
@pytest.mark.parametrize("state", WAYS)
async def test_a_transition_is_allowed_or_refused(one: Opened, state: str, transition: str) -> None:
    job = job_of(one)
    for step in WAYS[state]:
        do(job, step)
    before = job.row
    if (state, transition) in ALLOWED:
        do(job, transition)
        assert job.row.state == ALLOWED[state, transition]
        assert job.is_running is (job.row.state == "running")
        assert job.is_current(before) is (job.is_running and transition != "begin")
    else:
        sentence = REFUSALS.get(transition, f"There is nothing to {transition}.")
        with pytest.raises(UsageError, match=sentence.format(state=state)):
            do(job, transition)
        assert (job.row, job.row.state) == (before, state)


async def test_it_continues_after_a_restart(config: StoreConfig) -> None:
    async with opened(config) as one:
        job = job_of(one)
        job.begin(Row(count=1, rate=5.0))
        job.row.count = 7
        job.note()
        job.row.count = 8  # too soon for another note
        job.note_after(60.0)
    async with opened(config) as one:
        job = job_of(one)
        assert (job.row.state, job.row.count, job.row.rate) == ("running", 7, 5.0)
        job.pause()
        job.resume(9.0)
        assert job.row.rate == 9.0
        job.end()
        assert 0.0 < job.row.started <= job.row.finished


async def test_what_happens_during_the_work_is_not_missed(one: Opened) -> None:
    job = job_of(one)
    job.begin(Row())
    with trio.fail_after(1):
        await job.changed(60.0)  # the beginning
    job.note()
    with trio.move_on_after(0.05) as scope:
        await job.changed(60.0)  # a note is no change
    assert scope.cancelled_caught
    job.wake()
    with trio.fail_after(1):
        await job.changed(60.0)


async def test_who_waits_is_told_until_it_ends(one: Opened) -> None:
    job = job_of(one)
    job.begin(Row())
    told: list[dict[str, Any]] = []

    async def work() -> None:
        for _ in range(3):
            job.row.count += 1
            await trio.sleep(0.25)
        job.end()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await job.wait(lambda: {"done": job.row.count}, told.append)
    assert {"done": 1} in told
    assert told == sorted(told, key=lambda message: message["done"])
    job.begin(Row())
    await job.wait(lambda: None, told.append)  # it does not go on
