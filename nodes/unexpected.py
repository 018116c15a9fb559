"""An error that no node may raise is a bug: it costs the node that met it, not the mount."""

from __future__ import annotations

import logging

from ..errors import NodeError

log = logging.getLogger(__name__)


def unexpected(name: str, error: Exception) -> NodeError:
    """What to raise in the place of an error that is none of fusestore's; it is logged."""
    log.error("Node %s met an unexpected error.", name, exc_info=error)
    return NodeError(
        f"Node {name} met an unexpected error ({type(error).__name__}): see the log, and please "
        "report it."
    )
