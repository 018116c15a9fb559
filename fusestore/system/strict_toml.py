"""A strict reader of small TOML files.

Each mistake becomes one sentence with its file, line and key.  One pass finds all
mistakes of a file.  A caller that cannot use a file with mistakes raises the first.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import UUID

from ..errors import ConfigError, NewerFormatError
from .beneath import open_file

FILE_BYTES_MAX = 1 << 18
"""The longest file that is read."""
PARSED_MAX = 1 << 20
"""How many characters are parsed again to find the lines of mistakes."""
SHOWN_MAX = 80
"""How many characters of a value a message shows."""

T = TypeVar("T")
Keys = tuple[str | int, ...]
"""The path to a value: names of keys, and indexes of arrays."""

_NEEDED = object()
_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of tables"}


@dataclass(slots=True)
class _File:
    """A file, and the mistakes found in it."""

    path: Path
    text: str
    wrong: dict[Keys, str] = field(default_factory=dict)
    """The first mistake of each key."""

    def problems(self) -> list[str]:
        """Return the mistakes as sentences with file and line, in the order of the lines."""
        lines = _statements(self.text) if self.wrong else {}
        at = []
        for keys, what in self.wrong.items():
            while keys and keys not in lines:  # for a missing key: the start of its table
                keys = keys[:-1]
            at.append((lines.get(keys, 1), what))
        at.sort(key=lambda found: found[0])
        return [f"{self.path}:{line}: {what}" for line, what in at]


def _statements(text: str) -> dict[Keys, int]:
    """Return for each value the line of the statement that first names it.

    tomllib does not report lines.  A statement ends on the first line that makes it valid
    TOML.  Each statement is parsed alone, and belongs to the table of the last header.  If
    long statements make this slow, the search stops early.
    """
    found: dict[Keys, int] = {}
    counts: Counter[str] = Counter()
    above: Keys = ()
    left = PARSED_MAX
    start, lines = 1, list[str]()
    for number, line in enumerate(text.split("\n"), 1):
        lines.append(line)
        statement = "\n".join(lines)
        left -= len(statement)
        if left < 0:
            break
        try:
            values = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # the statement is not complete
        if statement.lstrip().startswith("["):
            above = ()
            for key, value in values.items():
                if isinstance(value, list):
                    above = (key, counts[key])
                    counts[key] += 1
                    found.setdefault((key,), start)
                elif counts[key]:  # [key.inner], in the last table of an array
                    above = (key, counts[key] - 1, *value)
                else:
                    above = (key,)
            found.setdefault(above, start)
        else:
            for keys in _named(values):
                found.setdefault((*above, *keys), start)
        start, lines = number + 1, []
    return found


def _named(values: dict[str, Any]) -> Iterator[Keys]:
    """Yield the keys of a file and of the tables in its arrays, the deepest level that we use."""
    for key, value in values.items():
        yield (key,)
        for i, row in enumerate(value if isinstance(value, list) else ()):
            yield (key, i)
            yield from ((key, i, inner) for inner in (row if isinstance(row, dict) else ()))


def shown(value: Any) -> str:
    """Format a value of any type and length for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print such long numbers
        return "a number with thousands of digits"
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "…"


class Table:
    """A TOML table that is read key by key.

    A wrong value is recorded (`problems`) and replaced by a value of the right type, so
    that the rest of the table is checked, too.
    """

    def __init__(self, file: _File, keys: Keys, values: dict[str, Any]) -> None:
        self._file, self._keys, self._values = file, keys, dict(values)

    @classmethod
    def read(cls, file: Path) -> Table:
        """Read a file; FileNotFoundError, NotADirectoryError, or ConfigError for other errors.

        It may be a symbolic link.
        """

        def opened() -> BinaryIO:
            return open(open_file(file, os.O_RDONLY, follow=True), "rb")

        return cls.load(file, opened, FILE_BYTES_MAX)

    @classmethod
    def load(cls, file: Path, opened: Callable[[], BinaryIO], most: int) -> Table:
        """Read the file that `opened` opens, up to `most` bytes; errors as for `read`."""
        try:
            with opened() as stream:
                data = stream.read(most + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
        if len(data) > most:
            raise ConfigError(f"{file} is longer than {most} bytes: it is no file of fusestore.")
        try:
            text = data.decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise ConfigError(f"{file}:{line}: not valid TOML: it is not UTF-8.") from None
        try:
            return cls(_File(file, text), (), tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
            line = int(at[1]) if at and at[1] else text.count("\n") + 1
            what = str(error)[: at.start()] if at else error
            raise ConfigError(f"{file}:{line}: not valid TOML: {what}.") from None
        except (RecursionError, ValueError):
            raise ConfigError(
                f"{file} is not valid TOML: it is nested too deeply, or a number is too long."
            ) from None

    def bad(self, key: str, what: str) -> None:
        """Record a mistake of a key; only the first of each key is kept."""
        where = f"{self._keys[0]} {int(self._keys[1]) + 1}: " if self._keys else ""
        self._file.wrong.setdefault((*self._keys, key), f"{where}{key} {what}.")

    def is_good(self) -> bool:
        """Return whether no mistake was found in this table so far."""
        depth = len(self._keys)
        return not any(keys[:depth] == self._keys for keys in self._file.wrong)

    def problems(self) -> list[str]:
        """Return the mistakes of the file found so far, as `FILE:LINE: sentence`."""
        return self._file.problems()

    def raise_first(self) -> None:
        """Raise ConfigError with the first mistake, if there is one."""
        for problem in self.problems():
            raise ConfigError(problem)

    def take_format(self, known: int) -> None:
        """Raise ConfigError unless `format` is the number that this version supports.

        NewerFormatError if it is greater.
        """
        version = self.take("format", int)
        if version > known:
            self.bad(
                "format",
                f"is {shown(version)}, but this fusestore knows only {known}: use a newer one",
            )
            raise NewerFormatError(self.problems()[0])
        if version != known:
            self.bad("format", f"must be {known}, but is {shown(version)}")
        self.raise_first()

    def take(self, key: str, kind: type[T], default: Any = _NEEDED) -> T:
        """Return the value of a key, of exactly this type; without a default it is required."""
        value = self._values.pop(key, default)
        if type(value) is kind:
            return value
        missing = value is _NEEDED
        self.bad(key, "is missing" if missing else f"must be {_KINDS[kind]}, but is {shown(value)}")
        return kind() if default is _NEEDED else default

    def take_count(self, key: str, default: int, most: int, least: int = 0) -> int:
        """Return the value of a key, a whole number from `least` to `most`."""
        count = self.take(key, int, default)
        if not least <= count <= most:
            self.bad(key, f"must be a number from {least} to {most}, but is {shown(count)}")
        return count

    def take_number(self, key: str, default: float, least: float, most: float) -> float:
        """Return the value of a key, a number from `least` to `most`."""
        number = self._values.pop(key, default)
        if type(number) in (int, float) and least <= number <= most:
            return float(number)
        self.bad(key, f"must be a number from {least:g} to {most:g}, but is {shown(number)}")
        return default

    def take_uuid(self, key: str) -> UUID:
        """Return the value of a key, a UUID as text."""
        text = self.take(key, str)
        try:
            return UUID(text)
        except ValueError:
            self.bad(key, f"must be a UUID, but is {shown(text)}")
            return UUID(int=0)

    def take_path(self, key: str, base: Path, default: str) -> Path:
        """Return the value of a key, a path as text; a relative path starts at `base`."""
        text = self.take(key, str, default)
        if "\0" in text:
            self.bad(key, "contains a zero byte")
            text = default
        return base / text

    def take_tables(self, key: str) -> list[Table]:
        """Return the tables of an array of tables, at least one."""
        rows = self.take(key, list, [])
        if not rows or not all(isinstance(row, dict) for row in rows):
            self.bad(key, f"must occur at least once, as [[{key}]]")
            return []
        return [Table(self._file, (key, i), row) for i, row in enumerate(rows)]

    def end(self) -> None:
        """Record each key that was not read as unknown."""
        for key in self._values:
            self.bad(key, "is not a key that fusestore knows")
