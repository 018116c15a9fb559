"""The base of all requests: a request names its command, and the type of the result."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar, cast, get_args

R = TypeVar("R")


class Request(Generic[R]):
    """A request to run a command; the result is an R."""

    __slots__ = ()
    command: ClassVar[str]
    as_left: ClassVar[bool] = False
    """Whether the command needs an unmounted store as it was left, without background work."""

    @property
    def only_looks(self) -> bool:
        """Whether the request does not change the store."""
        return False


def result_of(kind: type[Request[R]]) -> type[R]:
    """Return the type of the result of a kind of request."""
    (base,) = kind.__orig_bases__  # type: ignore[attr-defined]
    return cast("type[R]", get_args(base)[0])


class LookRequest(Request[R]):
    """A request that never changes the store."""

    __slots__ = ()

    @property
    def only_looks(self) -> bool:
        return True
