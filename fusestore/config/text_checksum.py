"""The checksum of a small text file of a node: a comment in its last line."""

from __future__ import annotations

from xxhash import xxh3_64_hexdigest

_BEGINS = b"# checksum "


def sealed(body: bytes) -> bytes:
    """Return a file of whole lines with one more: the xxh3-64 of all bytes before it."""
    return body + _BEGINS + xxh3_64_hexdigest(body).encode()


def is_intact(data: bytes) -> bool | None:
    """Return whether a file is as it was written; None: an early version wrote no checksum."""
    body, found, checksum = data.rstrip(b"\n").rpartition(_BEGINS)
    return checksum == xxh3_64_hexdigest(body).encode() if found else None
