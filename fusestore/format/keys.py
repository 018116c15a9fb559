"""Packing of numbers into keys: big-endian, so that keys sort by number."""

from __future__ import annotations

import struct

Q = struct.Struct(">Q")
QQ = struct.Struct(">QQ")
QI = struct.Struct(">QI")
HI = struct.Struct(">HI")
HQB = struct.Struct(">HQB")
HIQ = struct.Struct(">HIQ")


def after(prefix: bytes) -> bytes:
    """Return the least key that is greater than all keys with this prefix."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big")
