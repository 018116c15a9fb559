"""How a command ends: a sentence on standard error, and a status from one table."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from typing import Any, ClassVar

import click

from . import logs
from .errors import ConfigError, FusestoreError, NotHealthyError, UsageError

EXIT_STATUS: Mapping[type[FusestoreError], int] = {
    NotHealthyError: 1,
    UsageError: 2,
    ConfigError: 2,
}
"""By the class of the error; FAILED for all others."""
FAILED = 3
INTERRUPTED = 130


def exit_status(error: FusestoreError) -> int:
    """The exit status of a command that ended with `error`."""
    return EXIT_STATUS.get(type(error), FAILED)


class EndsInSentences(click.Command):
    """A command, or a group of them, that ends with a sentence and a status, not a traceback."""

    program: ClassVar[str] = "fusestore"
    statuses: ClassVar[Mapping[type[FusestoreError], int]] = EXIT_STATUS
    failed: ClassVar[int] = FAILED

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FusestoreError as error:
            self._complain(str(error))
            ctx.exit(self.statuses.get(type(error), self.failed))
        except KeyboardInterrupt:
            self._complain("interrupted")
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends quietly when nobody reads any more
            where = f"{error.filename}: " if error.filename else ""
            self._complain(f"{where}{error.strerror or error}")
            ctx.exit(self.failed)
        except Exception:
            traceback.print_exc()
            self._complain("this should not happen: please report it")
            ctx.exit(self.failed)

    def _complain(self, what: str) -> None:
        prefix = logs.ERROR_PRIORITY if logs.is_journal() else f"{self.program}: "
        click.echo(prefix + what, err=True)
