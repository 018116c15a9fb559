"""Manual pages made of the help texts of the commands; click-man lays them out.

    python docs/man_pages.py DIR

writes DIR/man1 and DIR/man8, as `man` expects them.  `tools/docs` runs it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click_man.man import ManPage

from fusestore import __version__
from fusestore.cli.main import cli
from fusestore.cli.mount_helper import mount as mount_helper
from fusestore.cli.mount_helper import umount as umount_helper


def main(directory: Path) -> None:
    """Write all pages below `directory`."""
    for name, text in pages():
        section = directory / f"man{name[-1]}"
        section.mkdir(parents=True, exist_ok=True)
        (section / name).write_text(text, encoding="ascii")


def pages() -> Iterator[tuple[str, str]]:
    """File name and text (roff) of the page of each command, and of the helpers of mount(8)."""
    yield from _pages(click.Context(cli, info_name="fusestore"))
    for name, helper in (("mount.fusestore", mount_helper), ("umount.fusestore", umount_helper)):
        yield f"{name}.8", _page(click.Context(helper, info_name=name), "8")


def _pages(context: click.Context) -> Iterator[tuple[str, str]]:
    yield f"{context.command_path.replace(' ', '-')}.1", _page(context, "1")
    if isinstance(context.command, click.Group):
        for name, command in context.command.commands.items():
            yield from _pages(click.Context(command, info_name=name, parent=context))


def _page(context: click.Context, section: str) -> str:
    command = context.command
    page = ManPage(context.command_path)
    page.version = f"fusestore {__version__}"
    page.short_help = _escaped(command.short_help or command.get_short_help_str(limit=200))
    page.synopsis = " ".join(command.collect_usage_pieces(context))
    page.description = _roff(command.help or "")
    options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
    records = [option.get_help_record(context) for option in options]
    page.options = [(record[0], _escaped(record[1])) for record in records if record]
    if isinstance(command, click.Group):
        page.commands = [
            (name, _escaped(child.get_short_help_str(limit=200)))
            for name, child in command.commands.items()
        ]
    name = context.command_path.replace(" ", "-")
    text = str(page).replace('"1"', f'"{section}"', 1)
    text = text.replace(context.command_path.upper(), name.upper(), 1)
    text = text.replace(f"See \\fB{context.command_path}-", f"See \\fB{name}-")
    if command.epilog:
        title, _, rest = inspect.cleandoc(command.epilog).removeprefix("\b\n").partition("\n")
        text += f".SH {title.rstrip(':').upper()}\n{_verbatim(rest)}\n"
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)


def _roff(help_text: str) -> str:
    """A help text of click's: paragraphs, those that begin with \\b as they are."""
    paragraphs = inspect.cleandoc(help_text).split("\n\n")
    return "\n.PP\n".join(
        _verbatim(text.removeprefix("\b\n")) if text.startswith("\b") else _escaped(text)
        for text in paragraphs
    )


def _verbatim(text: str) -> str:
    return f".nf\n{_escaped(text)}\n.fi"


def _escaped(text: str) -> str:
    """Text that roff takes literally; a line must not begin like a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
