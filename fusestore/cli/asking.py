"""Arguments, output and dispatch that the commands share.

If the store is mounted, a command sends its request to the daemon.  Otherwise it
opens the store itself.  The same code does the work in both cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..text import printable
from .errors import sentence

if TYPE_CHECKING:
    from ..config.store_config import StoreConfig
    from ..serve.control_client import Message, Progress
    from ..serve.messages.request import Request

R = TypeVar("R")

PATHS_SHOWN_MAX = 20


class _AnyPath(click.Path):
    """A path that is accepted without a check.

    A check would block on a mount whose daemon hangs.  The code that uses the path
    reports its errors.
    """

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        return Path(value)


ANY_PATH = _AnyPath()
STORE = click.argument("store", type=ANY_PATH)
PATH = click.argument("path", type=ANY_PATH)
JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
QUIET = click.option("--quiet", "-q", is_flag=True, help="Show no progress bar.")


def ask(
    config: StoreConfig, request: Request[R], progress: Progress = lambda message: None
) -> tuple[int | None, R]:
    """Run a request; returns the process number of the daemon that ran it, if any, and the result.

    If the store is not mounted, the request runs in this process.
    """
    from ..errors import NotMountedError
    from ..serve.control_client import ControlClient

    client = ControlClient(config.store)
    try:
        return client.daemon(), client.ask(request, progress)
    except NotMountedError:
        import trio

        from ..serve.offline import offline
        from ..system.loop_clock import LoopClock

        return None, trio.run(
            offline,
            config,
            request,
            progress,
            clock=LoopClock(),
            restrict_keyboard_interrupt_to_checkpoints=True,
        )


@contextmanager
def answering(as_json: bool, **failed: Any) -> Iterator[None]:
    """Print an error of the body as JSON on standard output, too, if `as_json` is set."""
    try:
        yield
    except Exception as error:
        if as_json and not isinstance(error, click.exceptions.Exit):
            print_json({**failed, "error": sentence(error)})
        raise


def print_lines(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines of text in one write, so that `head -1` causes no SIGPIPE."""
    click.echo("\n".join(map(printable, lines)), err=err)


def print_json(value: Message) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(value, indent=2))


def print_paths(what: str, paths: Sequence[str]) -> None:
    """Print at most PATHS_SHOWN_MAX paths on standard error."""
    lines = [f"{what}: {path}" for path in paths[:PATHS_SHOWN_MAX]]
    if len(paths) > PATHS_SHOWN_MAX:
        lines.append(f"and {len(paths) - PATHS_SHOWN_MAX} more: see --json")
    if lines:
        print_lines(lines, err=True)


class ProgressBar:
    """A progress bar on standard error, shown only if that is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._wanted = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._phase = ""

    def show(self, progress: Message) -> None:
        """Show the progress of a command: `phase`, and `done` of `total` in `unit` (bytes)."""
        if not self._wanted:
            return
        if self._bar is None or progress["phase"] != self._phase:
            from tqdm import tqdm

            self.close()
            self._phase = progress["phase"]
            unit = progress.get("unit", "B")
            self._bar = tqdm(desc=self._phase, unit=unit, unit_scale=True, leave=False)
        self._bar.total = progress["total"]
        self._bar.update(progress["done"] - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def do(store: Path, request: Request[R], *, quiet: bool = True, as_json: bool) -> R:
    """Run a request with a progress bar; return its result, and print it if `as_json` is set."""
    from ..config.store_config import load
    from ..typed_json import to_json

    with closing(ProgressBar(quiet)) as bar, answering(as_json):
        _, result = ask(load(store), request, bar.show)
    if as_json:
        print_json(to_json(result))
    return result


def complete_node(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of a store's nodes that begin with `incomplete`."""
    from ..config.store_config import load
    from ..errors import FusestoreError

    try:
        config = load(context.params["store"])
    except (FusestoreError, KeyError):
        return []
    return [node.name for node in config.nodes if node.name.startswith(incomplete)]


def rate_option(function: Any) -> Any:
    """Add the option --rate, in MB/s; its value is in bytes a second."""
    return click.option(
        "--rate",
        type=click.FloatRange(min=0, min_open=True),
        metavar="MB/s",
        callback=lambda context, option, value: value * 1e6 if value else None,
        help="Read and write at most this much per second.",
    )(function)
