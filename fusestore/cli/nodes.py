"""The commands `node` and `rebalance`: a store grows, shrinks and is evened out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..text import bytes_text, counted, speed_text, table_lines
from .asking import (
    ANY_PATH,
    JSON,
    QUIET,
    STORE,
    complete_node,
    do,
    print_lines,
    rate_option,
)
from .repair import repair

if TYPE_CHECKING:
    from ..serve.messages.nodes import (
        NodeDrained,
        NodeShare,
        NodesResult,
        Rebalance,
        RebalanceAction,
    )
    from ..watch.fields import NodeStatus

_NODE = click.argument("node", shell_complete=complete_node)


@click.group(short_help="Add, drain, remove and list nodes, and take them offline.")
def node() -> None:
    """Add, drain, remove, replace and list the nodes of a store, mounted or not.

    A region can have several nodes; each gets shards in proportion to its weight.
    On a mounted store the daemon moves shards in the background.  You can kill it
    at any moment: moving continues when the store is mounted again.

    \b
      fusestore node add ~/store us-east-2 --region us-east-1 --path /mnt/disk2/node
      fusestore rebalance ~/store start --wait
      fusestore node drain ~/store us-east-1
      fusestore node remove ~/store us-east-1
    """


@node.command("list", short_help="List the nodes and their shares.")
@STORE
@JSON
def list_nodes(store: Path, as_json: bool) -> None:
    """List the nodes of STORE, the shards that each holds, and its share."""
    from ..serve.messages.nodes import NodesRequest

    result = do(store, NodesRequest(), as_json=as_json)
    if not as_json:
        print_lines(nodes_lines(result))


@node.command(short_help="Add a node.")
@STORE
@click.argument("node")
@click.option(
    "--region", required=True, metavar="R", help="The region of the node, existing or new."
)
@click.option(
    "--path",
    type=ANY_PATH,
    metavar="P",
    help="The directory of the node, new or empty; default: STORE/NODE.",
)
@click.option(
    "--weight",
    type=float,
    help="Its share of new shards, relative to the weights of the region's other nodes; "
    "default: by the sizes of their disks.",
)
@QUIET
@JSON
def add(
    store: Path,
    node: str,
    region: str,
    path: Path | None,
    weight: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Add NODE to STORE: it gets the journal, then its share of new shards.

    Existing shards stay where they are until you run `fusestore rebalance`.
    """
    from ..serve.messages.nodes import NodeAddRequest

    place = Path(os.path.realpath(path if path is not None else store / node))
    request = NodeAddRequest(node, region, os.fspath(place), weight)
    result = do(store, request, quiet=quiet, as_json=as_json)
    if not as_json:
        print_lines(
            [
                f"{node} at {result.path} is now a node of region {region}.",
                f"Give it its share of existing shards: fusestore rebalance {store} start",
            ]
        )


@node.command(short_help="Move the shards of a node to other nodes.")
@STORE
@_NODE
@click.option("--cancel", is_flag=True, help="Give the node new shards again.")
@click.option("--no-wait", is_flag=True, help="Return at once, and drain in the background.")
@QUIET
@JSON
def drain(store: Path, node: str, cancel: bool, no_wait: bool, quiet: bool, as_json: bool) -> None:
    """Give NODE of STORE no new shards, and move its shards to other nodes of its region.

    Each shard is read back and checked at its new place before it counts there.  If
    NODE is gone, its shards are rebuilt from others.  Draining continues if you
    interrupt this command, and after a restart.
    """
    from ..serve.messages.nodes import NodeDrainRequest

    request = NodeDrainRequest(node, cancel=cancel, wait=not no_wait)
    result = do(store, request, quiet=quiet, as_json=as_json)
    if not as_json:
        print_lines([drain_line(os.fspath(store), result)])


@node.command(short_help="Take a node out of a store.")
@STORE
@_NODE
@JSON
def remove(store: Path, node: str, as_json: bool) -> None:
    """Take the drained NODE out of STORE, and delete what is left in its directory.

    The command refuses while anything needs NODE.
    """
    from ..serve.messages.nodes import NodeRemoveRequest

    result = do(store, NodeRemoveRequest(node), as_json=as_json)
    if not as_json:
        rest = "is empty" if result.emptied else "was missing, or could not be emptied"
        print_lines([f"{node} is no longer a node of {store}; {result.path} {rest}."])


@node.command(short_help="Close a node, for work on its disk.")
@STORE
@_NODE
@click.option(
    "--force", is_flag=True, help="Even if the store cannot be written to without the node."
)
@JSON
def offline(store: Path, node: str, force: bool, as_json: bool) -> None:
    """Close NODE of STORE until `fusestore node online`, also after a restart.

    Its disk can then be unmounted, checked or moved.  New data goes to the other
    nodes, and NODE gets what it missed when it is online again.
    """
    from ..serve.messages.nodes import NodeOfflineRequest

    result = do(store, NodeOfflineRequest(node, force), as_json=as_json)
    if not as_json:
        click.echo(f"{node} is offline: the disk of {result.path} can be unmounted.")


@node.command(short_help="Use a node again that is offline.")
@STORE
@_NODE
@JSON
@click.pass_context
def online(context: click.Context, store: Path, node: str, as_json: bool) -> None:
    """Use NODE of STORE again, and give it what it missed.

    Exit status 1: the node is not up yet.  The store retries it by itself.
    """
    from ..serve.messages.nodes import NodeOnlineRequest

    result = do(store, NodeOnlineRequest(node), as_json=as_json)
    if not as_json:
        click.echo(f"{node} is {result.state}. {result.problem}".strip())
    if result.state != "up":
        context.exit(1)


@click.command(short_help="Give each node its share.")
@STORE
@click.argument("action", type=click.Choice(["start", "status", "stop"]))
@rate_option
@click.option("--wait", is_flag=True, help="Return when the rebalance has ended or was stopped.")
@QUIET
@JSON
def rebalance(
    store: Path, action: RebalanceAction, rate: float | None, wait: bool, quiet: bool, as_json: bool
) -> None:
    """Move shards within each region of STORE until each node has the share of its weight.

    On a mounted store, the rebalance runs in the background, gives way to users,
    and continues after a restart.  On an unmounted store, the command returns when
    the rebalance is complete.

    \b
      fusestore rebalance ~/store start --wait
      fusestore rebalance ~/store status
    """
    from ..serve.messages.nodes import RebalanceRequest

    request = RebalanceRequest(action, rate, wait)
    result = do(store, request, quiet=quiet, as_json=as_json)
    if not as_json:
        click.echo(rebalance_line(result))


_TO = click.Option(
    ["--to"],
    type=ANY_PATH,
    required=True,
    metavar="PATH",
    help="The directory to move it to, new or empty.",
)
node.add_command(
    click.Command(
        "replace",
        callback=repair.callback,
        params=[_TO if parameter.name == "to" else parameter for parameter in repair.params],
        short_help="Move a node to another place.",
        help="Rebuild NODE of STORE in the directory PATH, and use it there from then on.  "
        "This is the same as `fusestore repair STORE NODE --to PATH`.",
    )
)


def nodes_lines(result: NodesResult) -> Iterator[str]:
    """List the nodes, what they hold, and their shares."""
    heads = ("NODE", "REGION", "WEIGHT", "STATE", "SHARDS", "HOLDS", "SHARE", "FREE", "PATH")
    rows = [
        (
            node.name,
            node.region,
            f"{node.weight:g}",
            "drained" if node.drained else state_text(node),
            f"{node.shards:,}",
            bytes_text(node.bytes),
            bytes_text(node.share_bytes),
            bytes_text(node.bytes_free),
            node.path,
        )
        for node in result.nodes
    ]
    yield from table_lines([heads, *rows], right=(2, 4, 5, 6, 7))
    for node in result.nodes:
        if node.problem:
            yield f"  {node.name}: {node.problem}"
    yield f"No node is more than {result.off_balance:.1%} from its share."
    yield rebalance_line(result.rebalance)


def state_text(node: NodeStatus | NodeShare) -> str:
    """The state of a node, and whether it is being drained."""
    return f"{node.state}, draining" if node.draining else node.state


def drain_line(store: str, result: NodeDrained) -> str:
    """Report the progress of draining a node."""
    name = result.node
    if not result.draining:
        return f"{name} gets shards again."
    if result.drained:
        return f"{name} is drained: remove it with 'fusestore node remove {store} {name}'."
    return f"{name} is being drained: see 'fusestore node list {store}'."


def rebalance_line(row: Rebalance) -> str:
    """Report the progress or the result of a rebalance."""
    if row.state == "never":
        return "This store was never rebalanced."
    moved = f"{counted(row.shards, 'shard')} moved and checked, {bytes_text(row.size)}"
    if row.state == "done":
        speed = speed_text(row.size, row.finished - row.started)
        return f"Rebalance done: {moved} in {speed}."
    left = f", about {bytes_text(max(row.total - row.size, 0))} to go"
    problem = f" {row.error}" if row.error else ""
    return f"Rebalance {row.state}: {moved}{left}.{problem}"
