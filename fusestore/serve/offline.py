"""Commands on an unmounted store: they open the store, work on it, and close it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import trio

from ..config.store_config import StoreConfig
from ..config.store_config_write import write_store_config
from ..errors import FusestoreError
from ..files.filesystem import FileSystem
from ..members.opening import offline_error
from ..members.standing import State
from ..metadata.environment import DATABASE
from ..store.opening import open_store
from ..system import threads
from .commands import Context, do
from .control_client import Progress
from .control_server import lock_store
from .messages.nodes import NodeOfflineRequest, NodeOnlineRequest, NodeState
from .messages.request import Request

R = TypeVar("R")


async def offline(config: StoreConfig, request: Request[R], progress: Progress) -> R:
    """Run a command on an unmounted store; FusestoreError."""
    with lock_store(config.store):
        if isinstance(request, NodeOnlineRequest):  # else it might hinder its own opening
            config = await threads.call(_mark, config, request.node, False)
        elif isinstance(request, NodeOfflineRequest) and request.force:
            # Nobody has its files open.  The store may be one that cannot be opened as it is.
            config = await threads.call(_mark, config, request.node, True)
            node = config.node(request.node)
            error = str(offline_error(config, node))
            # R is what this request returns.
            return cast("R", NodeState(node.name, str(node.path), str(State.DOWN), error))
        # A command writes no new data of files, and may bring back the node that they lack.
        config = replace(config, spare_shards=0)
        try:
            # A store that was never mounted has no journal that must stay unchanged.
            read_only = request.only_looks and (config.metadata / DATABASE).exists()
            async with (
                open_store(config, read_only=read_only, background=not request.as_left) as store,
                trio.open_nursery() as nursery,
            ):
                files = FileSystem(store, nursery)
                if not request.as_left:
                    await files.begin()
                return await do(Context(store, files, progress, alone=True), request)
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None


def _mark(config: StoreConfig, name: str, offline: bool) -> StoreConfig:
    """In a thread: mark a node as taken offline, or clear the mark, in the file, too."""
    marked = replace(config.node(name), offline=offline)
    nodes = tuple(marked if node.name == name else node for node in config.nodes)
    if nodes == config.nodes:
        return config
    after = replace(config, nodes=nodes)
    write_store_config(after)
    return after


def unwrapped(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to report from the groups that nurseries made."""
    if group.subgroup(KeyboardInterrupt) is not None:
        return KeyboardInterrupt()
    ours, others = group.split(FusestoreError)
    if ours is None or others is not None:
        return group
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
