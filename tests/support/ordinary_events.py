"""All events of the campaign of ordinary life, by name.

An event is a function of a `Life`, which returns whether it could happen.  What it makes wrong is
a `Cause`, which goes later; what it destroys it names.
"""

from __future__ import annotations

from collections.abc import Callable

from support import ordinary_daemons, ordinary_disks, ordinary_nodes, ordinary_operators
from support.ordinary_life import Life

EVENTS: dict[str, Callable[[Life], bool]] = {
    event.__name__: event
    for module in (ordinary_disks, ordinary_daemons, ordinary_nodes, ordinary_operators)
    for event in module.EVENTS
}
