"""Stands in for a node that is not open: whatever needs the node fails with NodeError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import Buffer

from ..config.owner_record import OwnerRecord
from ..errors import NodeError
from ..format.records import SegmentKind
from .base import Segment, Space, Strays


class AbsentNode:
    """See `base.Node`; only `read_now`, `opened`, `is_owned` and `close` have an answer."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self) -> NoReturn:
        raise NodeError(f"Node {self._name} is not open: see 'fusestore status'.")

    def check(self) -> None:
        """See Node."""
        self._refuse()

    @property
    def found_owner(self) -> OwnerRecord | None:
        """See Node."""
        return None

    def refuse_owner(self) -> None:
        """See Node."""
        self._refuse()

    def claim(self) -> None:
        """See Node."""
        self._refuse()

    def is_owned(self) -> bool:
        """See Node."""
        return False

    def give_back(self) -> None:
        """See Node."""
        self._refuse()

    def disown(self) -> None:
        """See Node."""
        self._refuse()

    def segments(self, kind: SegmentKind) -> list[int]:
        """See Node."""
        self._refuse()

    def strays(self) -> Strays:
        """See Node."""
        self._refuse()

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """See Node."""
        self._refuse()

    def read(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """See Node."""
        self._refuse()

    def read_back(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """See Node."""
        self._refuse()

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """See Node."""
        return None

    def opened(self, kind: SegmentKind, segment: int) -> Segment | None:
        """See Node."""
        return None

    def size(self, kind: SegmentKind, segment: int) -> int:
        """See Node."""
        self._refuse()

    def is_shared(self, kind: SegmentKind, segment: int) -> bool:
        """See Node."""
        self._refuse()

    def flush(self, kind: SegmentKind, segments: Sequence[int]) -> None:
        """See Node."""
        self._refuse()

    def truncate(self, kind: SegmentKind, segment: int, size: int) -> None:
        """See Node."""
        self._refuse()

    has_holes = True

    def punch(self, segment: int, offset: int, length: int) -> None:
        """See Node."""
        self._refuse()

    def replace(self, kind: SegmentKind, segment: int, content: Buffer) -> None:
        """See Node."""
        self._refuse()

    def delete(self, kind: SegmentKind, segment: int) -> None:
        """See Node."""
        self._refuse()

    def set_aside(self, kind: SegmentKind, segment: int) -> None:
        """See Node."""
        self._refuse()

    def drop_aside(self) -> None:
        """See Node."""
        self._refuse()

    def space(self) -> Space:
        """See Node."""
        self._refuse()

    def keep_reserve(self, length: int) -> None:
        """See Node."""
        self._refuse()

    def remove(self) -> None:
        """See Node."""
        self._refuse()

    def bytes_used(self) -> int:
        """See Node."""
        self._refuse()

    def held(self) -> dict[int, int]:
        """See Node."""
        self._refuse()

    def close(self) -> None:
        """There is nothing to close."""
