"""A request: it names its command, and the type of the result."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar, cast, get_args

R = TypeVar("R")


class Request(Generic[R]):
    """What a command is asked; its result is an R."""

    __slots__ = ()
    command: ClassVar[str]
    as_left: ClassVar[bool] = False
    """Whether it sees a store as it was left: nothing goes on in a store opened for it."""

    @property
    def only_looks(self) -> bool:
        """Whether it does not change the store."""
        return False


def result_of(kind: type[Request[R]]) -> type[R]:
    """The type of the result of a kind of request."""
    (base,) = kind.__orig_bases__  # type: ignore[attr-defined]
    return cast("type[R]", get_args(base)[0])


class LookRequest(Request[R]):
    """A request that does not change the store, whatever it asks."""

    __slots__ = ()

    @property
    def only_looks(self) -> bool:
        return True
