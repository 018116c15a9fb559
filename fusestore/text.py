"""How numbers, times and tables read: what all commands print with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Row = Sequence[str]


def bytes_text(count: int) -> str:
    """A number of bytes with a unit: `5.6 GiB`."""
    if count < 1024:
        return f"{count} B"
    size, unit = float(count), "B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):  # noqa: B007
        size /= 1024
        if size < 1023.95:
            break
    return f"{size:.1f} {unit}"


def speed_text(size: int, seconds: float) -> str:
    """How long so many bytes took, and how fast that was: `2.0 s (51.2 MB/s)`."""
    return f"{seconds:.1f} s ({size / 1e6 / max(seconds, 1e-9):.1f} MB/s)"


def duration_text(seconds: float) -> str:
    """A time in the two largest units that tell: `3 min 20 s`."""
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
    """Rows of equal length as aligned columns; those numbered in `right` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def printable(text: str) -> str:
    """A line as a terminal may get it: names of files can have any characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
