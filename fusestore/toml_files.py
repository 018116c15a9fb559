"""Reading small TOML files strictly, key by key.

Every mistake becomes a ConfigError of one sentence that says which file and key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from .errors import ConfigError

FILE_BYTES_MAX = 1 << 20
"""A file longer than this is not one of ours."""

T = TypeVar("T")

_NEEDED = object()
_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of tables"}


class Table:
    """A TOML table that is taken apart key by key."""

    def __init__(self, file: Path, where: str, values: dict[str, Any]) -> None:
        self._file, self._where, self._values = file, where, dict(values)

    @classmethod
    def read(cls, file: Path) -> Table:
        """Read a file; FileNotFoundError or NotADirectoryError, ConfigError for all else."""
        try:
            with open(file, "rb") as stream:
                data = stream.read(FILE_BYTES_MAX + 1)
            if len(data) > FILE_BYTES_MAX:
                raise ConfigError(f"{file} is longer than {FILE_BYTES_MAX} bytes: it is not ours.")
            return cls(file, "", tomllib.loads(data.decode()))
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{file} is not valid TOML: it is not UTF-8.") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}.") from None

    def bad(self, key: str, what: str) -> ConfigError:
        """The error to raise about a key."""
        return ConfigError(f"{self._file}: {self._where}{key} {what}.")

    def take(self, key: str, kind: type[T], default: Any = _NEEDED) -> T:
        """The value of a key, of this very type; it must be there if there is no default."""
        value = self._values.pop(key, default)
        if value is _NEEDED:
            raise self.bad(key, "is missing")
        if type(value) is not kind:
            raise self.bad(key, f"must be {_KINDS[kind]}, and is {value!r}")
        return value

    def take_count(self, key: str, default: int, most: int) -> int:
        """The whole number that a key has, from 0 to `most`."""
        count = self.take(key, int, default)
        if not 0 <= count <= most:
            raise self.bad(key, f"must be a number from 0 to {most}, and is {count}")
        return count

    def take_uuid(self, key: str) -> UUID:
        """The UUID that a key has as text."""
        text = self.take(key, str)
        try:
            return UUID(text)
        except ValueError:
            raise self.bad(key, f"must be a UUID, and is {text!r}") from None

    def take_path(self, key: str, base: Path, default: str) -> Path:
        """The path that a key has as text; a relative one starts at `base`."""
        text = self.take(key, str, default)
        if "\0" in text:
            raise self.bad(key, "has a zero byte in it")
        return base / text

    def take_tables(self, key: str) -> list[Table]:
        """The tables of an array of tables, at least one."""
        rows = self.take(key, list, [])
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise self.bad(key, f"must be there at least once, as [[{key}]]")
        return [Table(self._file, f"{key} {i}: ", row) for i, row in enumerate(rows, 1)]

    def end(self) -> None:
        """Say that all keys have been taken; ConfigError when one has not."""
        for key in self._values:
            raise self.bad(key, "is not a key that fusestore knows")
