"""Formatting of numbers, times and tables for all commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Row = Sequence[str]


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things: `1 file`, `2,000 files`; `plural` if that is not noun and `s`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def bytes_text(count: int) -> str:
    """Format a number of bytes with a unit: `5.6 GiB`."""
    if count < 1024:
        return f"{count} B"
    size, unit = float(count), "B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):  # noqa: B007
        size /= 1024
        if size < 1023.95:
            break
    return f"{size:.1f} {unit}"


def speed_text(size: int, seconds: float) -> str:
    """Format the time that `size` bytes took, and the speed: `2.0 s (51.2 MB/s)`."""
    return f"{seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s)"


def duration_text(seconds: float) -> str:
    """Format a time in its two largest units: `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[tuple[int, str]] = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append((count, "days" if name == "day" and count != 1 else name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count)


def table_lines(rows: Sequence[Row], right: Sequence[int] = ()) -> Iterator[str]:
    """Align rows of equal length in columns; the columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """Escape unprintable characters of a line for a terminal: names of files can have any."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
