"""The commands of the control socket: what they may be asked, and that nothing else is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fusestore.cli import asking
from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig
from fusestore.errors import NotMountedError, UsageError
from fusestore.serve.commands import COMMANDS, Context, handlers
from fusestore.serve.control_client import Message
from fusestore.serve.messages.request import LookRequest, Request, result_of
from fusestore.serve.messages.safety import FsckRequest, ScrubRequest
from support.opened_store import Opened, opened


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store")


async def ask(one: Opened, name: str, arguments: Message) -> Message:
    """What the daemon of a mounted store answers a client."""
    return await handlers(Context(one.store, one.files))[name](arguments, lambda message: None)


def kinds(base: type[Any]) -> set[type[Any]]:
    """All kinds of requests; `dataclass` leaves one behind that it has made anew."""
    below = {kind for one in base.__subclasses__() for kind in kinds(one) | {one}}
    return {kind for kind in below if kind is not LookRequest}


def test_each_kind_of_request_is_a_command_with_its_result() -> None:
    assert {command.request.command for command in COMMANDS.values()} == set(COMMANDS)
    assert {kind.command for kind in kinds(Request)} == set(COMMANDS)
    for name, command in COMMANDS.items():
        hints = get_type_hints(command.run)
        assert hints["request"] is command.request, name
        assert hints["return"] is result_of(command.request), name


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("status", {"now": True}, "there is no field now"),
        ("repair", {}, "the field node is missing"),
        ("repair", {"node": 7}, "node has to be text"),
        ("repair", {"node": "us-east-1", "dry_run": "yes"}, "dry_run has to be true or false"),
        ("scrub", {"action": "sing"}, "action has to be one of start, pause, resume, status"),
        ("scrub", {"action": "start", "alone": True}, "there is no field alone"),
        ("risk", {"model": {"disk_failures": 0.1}}, "the field model.region_losses is missing"),
        ("quota", {"action": "set", "inode": "1"}, "inode has to be a whole number"),
        ("compact", {"wait": 1}, "wait has to be true or false"),
        ("layout", {"inode": 1.5}, "inode has to be a whole number"),
    ],
)
async def test_what_is_asked_wrongly_is_refused(
    config: StoreConfig, name: str, arguments: Message, reason: str
) -> None:
    async with opened(config) as one:
        with pytest.raises(UsageError) as raised:
            await ask(one, name, arguments)
        assert str(raised.value) == f"The arguments of {name!r} are invalid: {reason}."


async def test_answers_are_json_as_it_always_was(config: StoreConfig) -> None:
    async with opened(config) as one:
        plan = await ask(one, "repair", {"node": "us-east-1", "dry_run": True})
        assert set(plan) == {"plan"}
        assert "model" not in await ask(one, "risk", {})
        status = await ask(one, "status", {})
        assert list(status)[:3] == ["summary", "healthy", "store"]
        assert "mounted" not in status
        assert status["recode"]["state"] == "never"
        drained = await ask(one, "node_drain", {"node": "us-east-1", "cancel": True})
        assert drained == {"node": "us-east-1", "draining": False, "drained": False}


@pytest.mark.parametrize("name", ["stop", "metrics"])
async def test_what_a_mount_does_needs_one(config: StoreConfig, name: str) -> None:
    async with opened(config) as one:
        with pytest.raises(NotMountedError):
            await ask(one, name, {})


def test_a_command_that_is_asked_of_nobody_is_done_all_the_same(config: StoreConfig) -> None:
    assert asking.ask(config, ScrubRequest("start"))[1].state == "done"
    daemon, fsck = asking.ask(config, FsckRequest())
    assert (daemon, fsck.clean) == (None, True)
