"""Exit statuses and error messages of the commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, NoReturn

import click

from ..errors import ConfigError, FusestoreError, NotHealthyError, UsageError
from ..system import logs
from ..text import printable

EXIT_STATUS: Mapping[type[FusestoreError], int] = {
    NotHealthyError: 1,
    UsageError: 2,
    ConfigError: 2,
}
"""The exit status for a class of errors; FAILED for all others."""
FAILED = 3
INTERRUPTED = 130
UNREAD = 141
"""The status of a program that SIGPIPE ends because nothing reads its output."""


def sentence(error: Exception) -> str:
    """Return the message of an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


class EndsInSentences(click.Command):
    """A command or group of commands that reports errors as sentences, not tracebacks."""

    program: ClassVar[str] = "fusestore"
    statuses: ClassVar[Mapping[type[FusestoreError], int]] = EXIT_STATUS
    failed: ClassVar[int] = FAILED

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        _open_standard_streams()
        try:
            sys.exit(super().main(*args, **{**extra, "standalone_mode": False}))
        except FusestoreError as error:
            self._complain(str(error))
            sys.exit(self.statuses.get(type(error), self.failed))
        except (click.Abort, KeyboardInterrupt):
            self._complain("interrupted")
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            with suppress(OSError):
                error.show()
            sys.exit(error.exit_code)
        except OSError as error:
            self._complain(sentence(error))
            sys.exit(self.failed)
        except Exception:
            with suppress(OSError):
                traceback.print_exc()
            self._complain("this is a bug in fusestore: please report it")
            sys.exit(self.failed)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None
        except BrokenPipeError:  # click would exit with status 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(UNREAD)

    def _complain(self, what: str) -> None:
        prefix = logs.ERROR_PRIORITY if logs.is_journal() else f"{self.program}: "
        with suppress(OSError):
            click.echo(prefix + printable(what), err=True)


def _open_standard_streams() -> None:
    """Open standard input, output and error on /dev/null if they are closed.

    Otherwise the next files to be opened would get their descriptors, and output
    could overwrite the files of a store.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))
