"""The states of a node: each transition that there is, and each that must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fusestore.errors import InvariantError, NodeError, NodeIdentityError, NodeReadOnlyError
from fusestore.format.store_rows import NEVER_WHOLE
from fusestore.limits import Limits
from fusestore.members.standing import Standing, State

LIMITS = Limits(retry_seconds_min=5.0, retry_seconds_max=30.0, suspicions_max=3, slow_seconds=7.0)

TRANSITIONS: dict[str, Callable[[Standing], object]] = {
    "opened": Standing.opened,
    "refused": lambda standing: standing.refused(NodeError("It is away.")),
    "refused as another": lambda standing: standing.refused(NodeIdentityError("Another node.")),
    "confirmed": Standing.confirmed,
    "missed": Standing.missed,
    "set_apart": lambda standing: standing.set_apart("Another history."),
    "entered": Standing.entered,
    "joined": Standing.joined,
    "resumed": Standing.resumed,
    "only_read": lambda standing: standing.only_read(NodeReadOnlyError("It is read-only.")),
    "failed": lambda standing: standing.failed(NodeError("It failed.")),
    "failed as gone": lambda standing: standing.failed(NodeIdentityError("It is gone.")),
    "removed": Standing.removed,
}

UP, REBUILDING, BEHIND = State.UP, State.REBUILDING, State.BEHIND
SUSPECT, DOWN, REMOVED = State.SUSPECT, State.DOWN, State.REMOVED
FOREIGN = State.FOREIGN

ALLOWED: dict[tuple[State, str], State] = {
    (DOWN, "opened"): BEHIND,
    (SUSPECT, "refused"): SUSPECT,
    (DOWN, "refused"): DOWN,
    (SUSPECT, "refused as another"): DOWN,
    (DOWN, "refused as another"): DOWN,
    (FOREIGN, "refused"): FOREIGN,
    (FOREIGN, "refused as another"): DOWN,
    **{(state, "set_apart"): FOREIGN for state in (BEHIND, SUSPECT, DOWN, FOREIGN)},
    (BEHIND, "confirmed"): UP,
    (BEHIND, "missed"): BEHIND,
    **{(state, "entered"): REBUILDING for state in (BEHIND, REBUILDING, SUSPECT, DOWN, FOREIGN)},
    (REBUILDING, "joined"): UP,
    **{(state, "resumed"): UP for state in (BEHIND, SUSPECT, DOWN)},
    **{(state, "only_read"): BEHIND for state in (UP, REBUILDING, BEHIND, SUSPECT, DOWN)},
    **{(state, "failed"): SUSPECT for state in (UP, REBUILDING, BEHIND)},
    **{(state, "failed as gone"): DOWN for state in (UP, REBUILDING, BEHIND)},
    # Calls that were under way end later: they change nothing.
    **{
        (state, failure): state
        for state in (SUSPECT, DOWN, REMOVED, FOREIGN)
        for failure in ("failed", "failed as gone")
    },
    **{(state, "removed"): REMOVED for state in State if state is not REMOVED},
}

WAYS: dict[State, tuple[str, ...]] = {
    DOWN: (),
    BEHIND: ("opened",),
    UP: ("opened", "confirmed"),
    REBUILDING: ("entered",),
    SUSPECT: ("opened", "failed"),
    FOREIGN: ("opened", "set_apart"),
    REMOVED: ("removed",),
}


def in_state(state: State) -> Standing:
    standing = Standing("us-east-1", LIMITS)
    for name in WAYS[state]:
        TRANSITIONS[name](standing)
    assert standing.state is state
    return standing


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("state", list(State))
def test_a_transition_is_allowed_or_forbidden(state: State, name: str) -> None:
    standing = in_state(state)
    if (state, name) in ALLOWED:
        TRANSITIONS[name](standing)
        assert standing.state is ALLOWED[state, name]
        return
    with pytest.raises(InvariantError, match=f"us-east-1 is {state}"):
        TRANSITIONS[name](standing)
    assert standing.state is state


@pytest.mark.parametrize("state", list(State))
def test_what_a_state_means(state: State) -> None:
    standing = in_state(state)
    assert standing.in_sync is (state is UP)
    assert standing.writable is (state in (UP, REBUILDING))
    assert standing.out_of_use is (state in (SUSPECT, DOWN, REMOVED, FOREIGN))


def test_only_a_node_in_sync_holds_what_it_flushed() -> None:
    standing = in_state(UP)
    standing.flushed(7)
    assert standing.holds == 7
    standing.failed(NodeError("It failed."))
    standing.flushed(8)
    assert standing.holds == 7


def test_a_node_that_may_lack_anything_does_so_until_it_has_joined() -> None:
    standing = in_state(DOWN)
    standing.never_whole()
    standing.entered()
    assert (standing.holds, standing.doubted) == (NEVER_WHOLE, True)
    standing.found(1000)
    assert standing.doubted
    standing.looked_through()
    standing.joined()
    assert (standing.holds, standing.doubted) == (0, False)


def test_a_journal_that_is_too_short_puts_all_in_doubt() -> None:
    standing = in_state(DOWN)
    standing.recorded(10)
    standing.found(9)
    assert standing.doubted
    standing.found(10)
    assert not standing.doubted


def test_a_node_that_cannot_be_brought_back_is_left_alone_longer_each_time() -> None:
    standing = in_state(SUSPECT)
    assert not standing.is_due(100.0)
    assert not standing.is_due(104.9)
    assert standing.is_due(105.0)
    now = 105.0
    for wait in (10.0, 20.0, 30.0, 30.0):
        standing.leave_alone(now)
        assert not standing.is_due(now + wait - 0.1)
        now += wait
        assert standing.is_due(now)
    standing.entered()
    standing.failed(NodeError("It failed again."))
    assert standing.state is DOWN
    standing.entered()
    standing.joined()
    standing.failed(NodeError("It failed after a long time."))
    assert standing.state is SUSPECT
    assert not standing.is_due(now)
    assert standing.is_due(now + 5.0)


def test_a_late_answer_is_forgotten() -> None:
    standing = in_state(UP)
    standing.answered_late(50.0)
    assert standing.is_slow(56.9)
    assert not standing.is_slow(57.0)
