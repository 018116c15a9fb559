"""The commands `config`, `log-level` and `service`: long-term operation of a store."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import click

from ..system.logs import LEVELS
from .asking import ANY_PATH, STORE, print_lines

# --- config ------------------------------------------------------------------


@click.group()
def config() -> None:
    """Check the configuration of a store.

    \b
      fusestore config check ~/store
    """


@config.command(short_help="Report every mistake in fusestore.toml.")
@STORE
def check(store: Path) -> None:
    """Report every mistake in the fusestore.toml of STORE, each with its line.

    STORE may also be a file.  The command checks only this file: neither the nodes
    nor their directories.

    Exit status 0: the file can be used; 2: it cannot.

    \b
      fusestore config check ~/store
      fusestore config check draft.toml
    """
    from ..config.store_config import CONFIG_NAME, examine
    from ..errors import ConfigError

    real = Path(os.path.realpath(store))
    file = real if real.is_file() else real / CONFIG_NAME
    try:
        found, problems = examine(file)
    except ConfigError as error:
        problems = [str(error)]
    else:
        if not problems:
            nodes = ", ".join(node.name for node in found.nodes)
            print_lines([f"{file} is fine: code {found.code}, nodes {nodes}."])
    if problems:
        print_lines(problems, err=True)
        click.get_current_context().exit(2)


# --- log-level ---------------------------------------------------------------


@click.command("log-level", short_help="Show or change the log level of a mounted store.")
@STORE
@click.argument("level", type=click.Choice(LEVELS), required=False)
def log_level(store: Path, level: str | None) -> None:
    """Set the log level of the mounted STORE until it is unmounted; print the level.

    \b
      fusestore log-level ~/store debug
      fusestore log-level ~/store
    """
    from ..config.store_config import load
    from ..serve.control_client import ControlClient
    from ..serve.messages.mount import LogLevelRequest

    click.echo(ControlClient(load(store).store).ask(LogLevelRequest(level)).level)


# --- service -----------------------------------------------------------------


@click.group()
def service() -> None:
    """Make systemd mount a store at each boot.

    \b
      fusestore service install /srv/store /srv/data -o allow_other
      fusestore service install --user ~/store ~/files
      fusestore service uninstall /srv/data
    """


_USER = click.option("--user", is_flag=True, help="Use your own systemd, not that of the system.")


@service.command(short_help="Write the systemd units for a mount.")
@STORE
@click.argument("mountpoint", type=ANY_PATH)
@click.option("options", "-o", multiple=True, metavar="OPT[,OPT…]", help="As for `mount`.")
@_USER
@click.option("--print", "only_print", is_flag=True, help="Print the files, and write nothing.")
def install(
    store: Path, mountpoint: Path, options: tuple[str, ...], user: bool, only_print: bool
) -> None:
    """Write the systemd units that mount STORE on MOUNTPOINT at each boot.

    They go to /etc/systemd/system, or with --user to ~/.config/systemd/user.  You
    can run the command again at any time, for example after you move a region.  It
    starts and enables nothing; it prints the commands that do.

    \b
      fusestore service install /srv/store /srv/data -o allow_other,nodev
      fusestore service install --user ~/store ~/files --print
    """
    from ..config.mount_options import MountOptions
    from ..config.store_config import load
    from ..errors import UsageError
    from ..serve import launch, units
    from ..system import mounts
    from ..system.files import write_whole

    found = load(store)
    chosen = MountOptions.parse(options)
    if chosen.once:
        raise UsageError(
            f"{chosen.once} is not allowed for a service: run `fusestore mount` with it once."
        )
    place = mounts.locate(mountpoint)
    if mounts.find(place) is None:
        place = launch.prepare_mountpoint(found, mountpoint, chosen)
    systemd = units.Systemd.choose(user)
    texts = units.files(systemd, _program(), found, place, chosen)
    if only_print:
        click.echo("\n".join(f"# {path}\n{text}" for path, text in texts.items()), nl=False)
        return
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                write_whole(path, text, 0o644)
                print_lines([f"wrote {path}"])
        except PermissionError as error:
            remedy = (
                "your home directory must be writable" if user else "run as root, or use --user"
            )
            raise UsageError(f"{path} cannot be written: {remedy}.") from error
    if Path("/run/systemd/system").is_dir():
        systemd.control("daemon-reload")
    systemctl = "systemctl --user" if user else "systemctl"
    instance = units.instance_of(place)
    click.echo(f"Mount it now and at each boot:  {systemctl} enable --now {_word(instance)}")
    timer = _word(instance, "fusestore-scrub@", ".timer")
    click.echo(f"Scrub it every month:           {systemctl} enable --now {timer}")
    if user:
        click.echo("Keep it while you are away:     loginctl enable-linger")


@service.command(short_help="Stop the service of a mount, and remove its settings.")
@click.argument("mountpoint", type=ANY_PATH)
@_USER
def uninstall(mountpoint: Path, user: bool) -> None:
    """Stop and disable the service of MOUNTPOINT, and remove its settings.

    The store does not change.  The units that all mounts share stay installed.

    \b
      fusestore service uninstall /srv/data
    """
    from ..errors import UsageError
    from ..serve import units
    from ..system import mounts

    systemd = units.Systemd.choose(user)
    place = mounts.locate(mountpoint)
    instance = units.instance_of(place)
    own = systemd.own_files(instance)
    if not own[0].exists():
        raise UsageError(f"{place} has no service: there is no {own[0]}.")
    systemd.control(
        *("disable", "--now", f"fusestore@{instance}.service", f"fusestore-scrub@{instance}.timer")
    )
    for file in own:
        file.unlink(missing_ok=True)
        if not any(file.parent.iterdir()):  # files that `systemctl edit` wrote stay
            file.parent.rmdir()
    systemd.control("daemon-reload")


def _word(instance: str, before: str = "fusestore@", after: str = "") -> str:
    """Return the name of a unit, quoted for a shell."""
    return shlex.quote(before + instance + after)


def _program() -> Path:
    """Return the absolute path of the program `fusestore`; UsageError if it is not installed."""
    from ..errors import UsageError

    beside = Path(sys.executable).with_name("fusestore")
    found = str(beside) if beside.is_file() else shutil.which("fusestore")
    if found is None:
        raise UsageError("The program fusestore is not installed, and systemd could not start it.")
    return Path(os.path.abspath(found))
