"""Reading small TOML files strictly, key by key.

Every mistake becomes one sentence that says which file, line and key.  All of a
file are found in one pass; who cannot go on with any raises the first.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import UUID

from ..errors import ConfigError

FILE_BYTES_MAX = 1 << 18
"""A file longer than this is not one of ours."""
PARSED_MAX = 1 << 20
"""So many characters are parsed again to find the lines of mistakes."""
SHOWN_MAX = 80
"""So many characters of a value are said."""

T = TypeVar("T")
Keys = tuple[str | int, ...]
"""The way to a value: names of keys, and places in arrays from 0."""

_NEEDED = object()
_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of tables"}


@dataclass(slots=True)
class _File:
    """A file that is read, and what is wrong with it."""

    path: Path
    text: str
    wrong: dict[Keys, str] = field(default_factory=dict)
    """The first complaint about each key."""

    def problems(self) -> list[str]:
        """The complaints as sentences with file and line, in the order of the lines."""
        lines = _statements(self.text) if self.wrong else {}
        at = []
        for keys, what in self.wrong.items():
            while keys and keys not in lines:  # a key that is missing: where its table begins
                keys = keys[:-1]
            at.append((lines.get(keys, 1), what))
        at.sort(key=lambda found: found[0])
        return [f"{self.path}:{line}: {what}" for line, what in at]


def _statements(text: str) -> dict[Keys, int]:
    """The line on which the statement begins that first names a value.

    tomllib does not tell.  A statement ends on the first line with which it is TOML: each
    is parsed by itself, and belongs to the table that the last header named.  A file with
    statements of so many lines that this takes long is not looked through to its end.
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
            continue  # in the middle of a statement
        if statement.lstrip().startswith("["):
            above = ()
            for key, value in values.items():
                if isinstance(value, list):
                    above = (key, counts[key])
                    counts[key] += 1
                    found.setdefault((key,), start)
                elif counts[key]:  # [key.inner], of the last table of an array
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
    """The keys of a file, and those of each table of its arrays: nothing of ours is deeper."""
    for key, value in values.items():
        yield (key,)
        for i, row in enumerate(value if isinstance(value, list) else ()):
            yield (key, i)
            yield from ((key, i, inner) for inner in (row if isinstance(row, dict) else ()))


def shown(value: Any) -> str:
    """A value for a complaint, which may be of any kind and length."""
    try:
        text = repr(value)
    except ValueError:  # so long a number that Python does not write it out
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "…"


class Table:
    """A TOML table that is taken apart key by key.

    A value that is not what it must be is noted (`problems`), and something of
    the right type takes its place, so that the rest is looked at, too.
    """

    def __init__(self, file: _File, keys: Keys, values: dict[str, Any]) -> None:
        self._file, self._keys, self._values = file, keys, dict(values)

    @classmethod
    def read(cls, file: Path) -> Table:
        """Read a file; FileNotFoundError or NotADirectoryError, ConfigError for all else."""
        return cls.load(file, lambda: open(file, "rb"), FILE_BYTES_MAX)

    @classmethod
    def load(cls, file: Path, opened: Callable[[], BinaryIO], most: int) -> Table:
        """Read the file that `opened` opens, of `most` bytes; errors as of `read`."""
        try:
            with opened() as stream:
                data = stream.read(most + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
        if len(data) > most:
            raise ConfigError(f"{file} is longer than {most} bytes: it is not ours.")
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
        """Note a complaint about a key; only the first about each is kept."""
        where = f"{self._keys[0]} {int(self._keys[1]) + 1}: " if self._keys else ""
        self._file.wrong.setdefault((*self._keys, key), f"{where}{key} {what}.")

    def is_good(self) -> bool:
        """Whether nothing was wrong with this table so far."""
        depth = len(self._keys)
        return not any(keys[:depth] == self._keys for keys in self._file.wrong)

    def problems(self) -> list[str]:
        """What is wrong with the file as far as it was read: `FILE:LINE: sentence`."""
        return self._file.problems()

    def raise_first(self) -> None:
        """ConfigError with the first problem, if there is one."""
        for problem in self.problems():
            raise ConfigError(problem)

    def take_format(self, known: int) -> None:
        """ConfigError unless `format` is the one that this version of fusestore knows."""
        version = self.take("format", int)
        if version > known:
            self.bad(
                "format",
                f"is {shown(version)}, and this fusestore knows {known}: use a newer fusestore",
            )
        elif version != known:
            self.bad("format", f"is {shown(version)}, and there is only {known}")
        self.raise_first()

    def take(self, key: str, kind: type[T], default: Any = _NEEDED) -> T:
        """The value of a key, of this very type; it must be there if there is no default."""
        value = self._values.pop(key, default)
        if type(value) is kind:
            return value
        missing = value is _NEEDED
        self.bad(key, "is missing" if missing else f"must be {_KINDS[kind]}, and is {shown(value)}")
        return kind() if default is _NEEDED else default

    def take_count(self, key: str, default: int, most: int) -> int:
        """The whole number that a key has, from 0 to `most`."""
        count = self.take(key, int, default)
        if not 0 <= count <= most:
            self.bad(key, f"must be a number from 0 to {most}, and is {shown(count)}")
        return count

    def take_number(self, key: str, default: float, least: float, most: float) -> float:
        """The number, whole or not, that a key has, from `least` to `most`."""
        number = self._values.pop(key, default)
        if type(number) in (int, float) and least <= number <= most:
            return float(number)
        self.bad(key, f"must be a number from {least:g} to {most:g}, and is {shown(number)}")
        return default

    def take_uuid(self, key: str) -> UUID:
        """The UUID that a key has as text."""
        text = self.take(key, str)
        try:
            return UUID(text)
        except ValueError:
            self.bad(key, f"must be a UUID, and is {shown(text)}")
            return UUID(int=0)

    def take_path(self, key: str, base: Path, default: str) -> Path:
        """The path that a key has as text; a relative one starts at `base`."""
        text = self.take(key, str, default)
        if "\0" in text:
            self.bad(key, "has a zero byte in it")
            text = default
        return base / text

    def take_tables(self, key: str) -> list[Table]:
        """The tables of an array of tables, at least one."""
        rows = self.take(key, list, [])
        if not rows or not all(isinstance(row, dict) for row in rows):
            self.bad(key, f"must be there at least once, as [[{key}]]")
            return []
        return [Table(self._file, (key, i), row) for i, row in enumerate(rows)]

    def end(self) -> None:
        """Say that all keys have been taken; each that has not is noted."""
        for key in self._values:
            self.bad(key, "is not a key that fusestore knows")
