"""An unexpected error in a node is a bug: it costs the node, not the mount."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FusestoreError, NodeError

logger = logging.getLogger(__name__)


@contextmanager
def costs_only(name: str) -> Iterator[None]:
    """Turn an exception that is not a FusestoreError into a NodeError, and log it."""
    try:
        yield
    except FusestoreError:
        raise
    except Exception as error:
        raise unexpected(name, error) from error


def unexpected(name: str, error: Exception) -> NodeError:
    """Return the NodeError that replaces an unexpected exception, which is logged."""
    logger.error("Node %s met an unexpected error.", name, exc_info=error)
    return NodeError(
        f"Node {name} met an unexpected error ({type(error).__name__}): see the log, and please "
        "report it."
    )
