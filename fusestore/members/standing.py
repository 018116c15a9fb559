"""The state of a node: its permitted uses, and the transitions.

Only the methods of `Standing` change the state.

    state       reads  shards  commits  meaning
    up          yes    yes     yes      in sync: it holds every commit
    rebuilding  yes    yes     no       it gets the data that it lacks
    behind      yes    no      no       open; not checked yet, or the mount or its disk is read-only
    suspect     no     no      no       it failed or was late; the store retries it by itself
    foreign     no     no      no       its journal has another history; an operator decides
    down        no     no      no       it is gone, is another node, or failed repeatedly
    removed     no     no      no       it is no longer a node of the store

    transition  from                                 to
    opened      down                                 behind
    refused     suspect, down, foreign               unchanged; down if it is another node
    set_apart   behind, suspect, down, foreign       foreign
    confirmed   behind                               up
    missed      behind                               behind
    entered     behind, rebuilding, suspect, down,
                foreign                              rebuilding
    joined      rebuilding                           up
    resumed     behind, suspect, down                up
    only_read   up, rebuilding, behind, suspect,
                down                                 behind
    failed      up, rebuilding, behind               suspect; down if it is gone
    removed     all but removed                      removed

A node that is out of use may fail again when running calls end; this changes nothing.
Any other transition is a bug, and raises InvariantError.
"""

from __future__ import annotations

from enum import StrEnum

from ..errors import InvariantError, NodeIdentityError
from ..format.store_rows import NEVER_WHOLE
from ..limits import Limits


class State(StrEnum):
    """The states of a node."""

    UP = "up"
    REBUILDING = "rebuilding"
    BEHIND = "behind"
    SUSPECT = "suspect"
    FOREIGN = "foreign"
    DOWN = "down"
    REMOVED = "removed"


_OUT_OF_USE = (State.SUSPECT, State.FOREIGN, State.DOWN, State.REMOVED)


class Standing:
    """The state of one node; times are by trio's clock."""

    __slots__ = (
        "_limits",
        "_name",
        "_retry_at",
        "_retry_wait",
        "_slow_until",
        "_suspicions",
        "checksum",
        "doubted",
        "error",
        "holds",
        "read_only",
        "state",
        "unread",
    )

    def __init__(self, name: str, limits: Limits, holds: int = 0) -> None:
        self._name = name
        self._limits = limits
        self.state = State.DOWN
        self.holds = holds
        """The last commit that the node is known to have flushed."""
        self.checksum = 0
        """The checksum of that commit; 0: not known."""
        self.doubted = False
        """It lacks commits, so all its shards must be checked."""
        self.error = ""
        """A sentence that explains why the node is not up; or empty."""
        self.read_only = False
        """Its file system is read-only."""
        self.unread = False
        """The node could not be read: its data is unknown, not gone."""
        self._slow_until = 0.0
        self._suspicions = 0
        """How often in a row the node could not be brought back."""
        self._retry_at: float | None = None
        self._retry_wait = 0.0

    # --- questions -----------------------------------------------------------

    @property
    def in_sync(self) -> bool:
        """Whether it holds every commit; an acknowledged commit is flushed on all such nodes."""
        return self.state is State.UP

    @property
    def writable(self) -> bool:
        """Whether shards can be written to it."""
        return self.state in (State.UP, State.REBUILDING)

    @property
    def out_of_use(self) -> bool:
        """Whether the store does not use it; any other node is open."""
        return self.state in _OUT_OF_USE

    def is_slow(self, now: float) -> bool:
        """Return whether it is read only if other nodes do not suffice."""
        return now < self._slow_until

    def is_due(self, now: float) -> bool:
        """Return whether to retry it; a node that has just failed is left alone for a while."""
        if self._retry_at is None:
            self._retry_at = now + self._limits.retry_seconds_min
        return now >= self._retry_at

    # --- transitions ---------------------------------------------------------

    def _go(self, transition: str, to: State, *allowed: State) -> None:
        if self.state not in allowed:
            raise InvariantError(
                f"Node {self._name} is {self.state}: the transition '{transition}' is impossible."
            )
        self.state = to

    def opened(self) -> None:
        """Its directory is open; its missing data is not known yet."""
        self._go("opened", State.BEHIND, State.DOWN)

    def refused(self, error: Exception) -> None:
        """It could not be opened, or could not be brought back."""
        gone = isinstance(error, NodeIdentityError)
        to = State.DOWN if gone else self.state
        self._go("refused", to, State.SUSPECT, State.DOWN, State.FOREIGN)
        self.error, self.unread = str(error), not gone

    def confirmed(self) -> None:
        """At a mount: it holds every commit."""
        self._go("confirmed", State.UP, State.BEHIND)

    def missed(self) -> None:
        """At a mount: it does not hold every commit."""
        self._go("missed", State.BEHIND, State.BEHIND)
        self.error = self.error or "It missed some commits."

    def set_apart(self, problem: str) -> None:
        """Its journal has another history: the store neither uses nor overwrites it by itself."""
        allowed = (State.BEHIND, State.SUSPECT, State.DOWN, State.FOREIGN)
        self._go("set_apart", State.FOREIGN, *allowed)
        self.error, self.unread = problem, False

    def entered(self) -> None:
        """It gets new shards from now on, while repair rebuilds the data that it lacks."""
        self._go(
            "entered",
            State.REBUILDING,
            State.BEHIND,
            State.REBUILDING,
            State.SUSPECT,
            State.DOWN,
            State.FOREIGN,
        )
        self.error, self.read_only = "", False

    def joined(self) -> None:
        """It holds every commit again."""
        self._go("joined", State.UP, State.REBUILDING)
        self.holds = 0
        self.checksum = 0
        self._suspicions, self._retry_at, self._retry_wait = 0, None, 0.0

    def resumed(self) -> None:
        """It holds every acknowledged commit, and nothing was acknowledged since it failed."""
        self._go("resumed", State.UP, State.BEHIND, State.SUSPECT, State.DOWN)
        self.error, self.read_only = "", False

    def only_read(self, error: Exception) -> None:
        """It can be read, but not written to."""
        self._go(
            "only_read",
            State.BEHIND,
            State.UP,
            State.REBUILDING,
            State.BEHIND,
            State.SUSPECT,
            State.DOWN,
        )
        self.error, self.unread, self.read_only = str(error), False, True

    def failed(self, error: Exception) -> bool:
        """It is out of use; return whether it was in use before."""
        if self.out_of_use:
            return False
        gone = isinstance(error, NodeIdentityError)
        gone = gone or self._suspicions >= self._limits.suspicions_max
        to = State.DOWN if gone else State.SUSPECT
        self._go("failed", to, State.UP, State.REBUILDING, State.BEHIND)
        self.error, self.unread = str(error), not isinstance(error, NodeIdentityError)
        return True

    def removed(self) -> None:
        """It is no longer a node of the store."""
        allowed = tuple(state for state in State if state is not State.REMOVED)
        self._go("removed", State.REMOVED, *allowed)

    # --- what it holds -------------------------------------------------------

    def recorded(self, holds: int, checksum: int = 0) -> None:
        """The log contains the last commit that it flushed."""
        self.holds, self.checksum = holds, checksum

    def flushed(self, commit: int, checksum: int = 0) -> None:
        """It flushed a commit."""
        if self.in_sync:
            self.holds, self.checksum = commit, checksum

    def found(self, commit: int) -> None:
        """Its journal reaches this commit; if this is less than it held, all data is in doubt."""
        self.doubted = commit < self.holds

    def never_whole(self) -> None:
        """It may lack any data, whatever its journal contains, until it has joined."""
        self.holds, self.checksum, self.doubted = NEVER_WHOLE, 0, True

    def looked_through(self) -> None:
        """All its shards have been checked."""
        self.doubted = False

    # --- delays --------------------------------------------------------------

    def answered_late(self, now: float) -> None:
        """A read took too long: other nodes are read for a while, if they suffice."""
        self._slow_until = now + self._limits.slow_seconds

    def leave_alone(self, now: float) -> None:
        """It could not be brought back: leave it alone, twice as long each time."""
        self._suspicions += 1
        wait = self._retry_wait or self._limits.retry_seconds_min
        self._retry_wait = min(2 * wait, self._limits.retry_seconds_max)
        self._retry_at = now + self._retry_wait
