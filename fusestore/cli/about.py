"""The commands `version` and `completion`."""

from __future__ import annotations

import click

from .asking import JSON, print_json


@click.command(short_help="Print the versions of all components.")
@JSON
def version(as_json: bool) -> None:
    """Print the versions of fusestore, of its format on disk, and of what it is built on.

    \b
      fusestore version
      fusestore version --json
    """
    from .versions import versions

    found = versions()
    if as_json:
        print_json(dict(found))
        return
    width = max(map(len, found))
    for name, number in found.items():
        click.echo(f"{name:<{width}}  {number}")


@click.command(short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete the commands and options of fusestore.

    \b
      bash   eval "$(fusestore completion bash)"    in ~/.bashrc
      zsh    eval "$(fusestore completion zsh)"     in ~/.zshrc
      fish   fusestore completion fish > ~/.config/fish/completions/fusestore.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    cli = context.find_root().command
    click.echo(kind(cli, {}, "fusestore", "_FUSESTORE_COMPLETE").source())
