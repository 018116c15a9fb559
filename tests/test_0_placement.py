"""Placement keeps the region rule and the weights, and moves no more than it must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusestore.format import placement as placement_module
from fusestore.format.erasure import Code
from fusestore.format.placement import Placement, Site, check_region_rule, shares

CODES = [
    Code.parse(text) for text in ("2+1", "4+2", "6+3", "1+2", "1+1", "2+2", "5+4", "8+4", "10+4")
]
STRIPES = 20_000
FIRST = 1 << 40
"""Number of the first stripe of a store."""

weights = st.sampled_from([0.5, 1.0, 1.0, 1.0, 2.0, 3.0, 10.0])
topologies = st.lists(st.lists(weights, min_size=1, max_size=4), min_size=1, max_size=6)


def sites(topology: list[list[float]]) -> list[Site]:
    """Nodes by the weights of each region's."""
    return [
        Site(f"node-{region}-{number}", f"region-{region}", weight)
        for region, inside in enumerate(topology)
        for number, weight in enumerate(inside)
    ]


@given(topologies, st.sampled_from(CODES), st.integers(0, (1 << 64) - 1))
def test_every_stripe_keeps_the_region_rule(
    topology: list[list[float]], code: Code, stripe: int
) -> None:
    nodes = sites(topology)
    placement = Placement(nodes)
    chosen = placement.place(code, stripe)
    assert chosen == Placement(nodes).place(code, stripe)
    assert len(chosen) == code.n
    regions = Counter(nodes[node].region for node in chosen)
    most = -(-code.n // len(topology))
    assert max(regions.values()) == placement.most_in_region(code) == most
    assert min(regions[name] for name in placement.names) >= code.n // len(topology)
    if check_region_rule(code, [node.region for node in nodes]) is None:
        assert max(regions.values()) <= code.m
    held = Counter(chosen)
    limits = placement.most(code)
    for number, node in enumerate(nodes):
        assert held[number] <= limits[number]
        others = [n for n, other in enumerate(nodes) if other.region == node.region]
        assert max(held[n] for n in others) - min(held[n] for n in others) <= 1


@given(topologies, st.sampled_from(CODES), st.sets(st.integers(0, 5)))
def test_the_least_that_some_regions_get_is_told(
    topology: list[list[float]], code: Code, some: set[int]
) -> None:
    nodes = sites(topology)
    placement = Placement(nodes)
    regions = {f"region-{number}" for number in some}
    least = min(
        sum(nodes[node].region in regions for node in placement.place(code, FIRST + turn))
        for turn in range(len(topology))
    )
    assert placement.least(code, regions) == least


@pytest.mark.parametrize("code", ["2+1", "4+2", "6+3", "1+2", "2+2", "8+4"])
@pytest.mark.parametrize(
    "inside",
    [[1, 1], [1, 1, 2], [1, 2, 3, 4], [2, 3, 3], [1, 1, 1, 10], [0.5, 1, 4, 1, 1]],
    ids=str,
)
def test_nodes_hold_what_their_weights_say(code: str, inside: list[float]) -> None:
    nodes = sites([inside, inside[::-1], [1]])
    placement = Placement(nodes)
    held: Counter[int] = Counter()
    for stripe in range(FIRST, FIRST + STRIPES):
        held.update(placement.place(Code.parse(code), stripe))
    expected = placement.expected(Code.parse(code))
    assert sum(expected) == pytest.approx(Code.parse(code).n)
    for node, part in enumerate(expected):
        assert held[node] == pytest.approx(STRIPES * part, rel=0.05)
    if code in ("2+1", "1+2"):  # one shard a region: the plain weights
        for node, site in enumerate(nodes):
            region = sum(other.weight for other in nodes if other.region == site.region)
            assert expected[node] == pytest.approx(site.weight / region)


@settings(max_examples=30)
@given(topologies, weights, st.integers(0, 5))
def test_a_new_node_takes_its_part_and_nothing_else_moves(
    topology: list[list[float]], weight: float, region: int
) -> None:
    code = Code(1, len(topology) - 1) if len(topology) > 1 else Code(1, 0)
    before = sites(topology)
    region %= len(topology)
    new = Site("new", f"region-{region}", weight)
    old, grown = Placement(before), Placement([*before, new])
    moved = 0
    for stripe in range(FIRST, FIRST + 1000):
        pairs = zip(old.place(code, stripe), grown.place(code, stripe), strict=True)
        for source, target in pairs:
            if source != target:
                assert target == len(before)
                moved += 1
    share = weight / (weight + sum(topology[region]))
    assert moved == pytest.approx(1000 * share, abs=80)


@settings(max_examples=50)
@given(
    st.lists(weights, min_size=2, max_size=6),
    st.lists(st.just(1.0), min_size=3, max_size=6),
    st.integers(1, 3),
)
def test_of_equal_nodes_at_most_one_shard_a_stripe_and_region_moves(
    others: list[float], inside: list[float], each: int
) -> None:
    code = Code(each, each)  # `each` shards in each of two regions
    before = sites([others, inside])
    old = Placement(before)
    grown = Placement([*before, Site("new", "region-1", 1.0)])
    for stripe in range(FIRST, FIRST + 200):
        gone = Counter(old.place(code, stripe)) - Counter(grown.place(code, stripe))
        assert gone.total() <= 1


def test_one_node_a_region_is_placed_as_it_always_was() -> None:
    placement = Placement(sites([[1], [1], [1]]))
    for stripe in range(FIRST, FIRST + 9):
        for code in CODES:
            assert placement.place(code, stripe) == tuple(
                (index + stripe) % 3 for index in range(code.n)
            )


def test_placement_is_the_same_in_every_version() -> None:
    placement = Placement(sites([[1, 1, 2], [1, 1], [3, 1]]))
    found = [placement.place(Code(2, 1), stripe) for stripe in range(FIRST, FIRST + 6)]
    assert found == [(4, 5, 2), (6, 2, 4), (2, 4, 6), (4, 5, 1), (5, 2, 3), (0, 4, 5)]


@given(st.lists(weights, min_size=1, max_size=8), st.data())
def test_shares_add_up_and_none_is_too_much(of: list[float], data: st.DataObject) -> None:
    total = data.draw(st.floats(0, len(of)))
    parts = shares(of, total, 1.0)
    assert sum(parts) == pytest.approx(total)
    assert max(parts) <= 1.0 + 1e-9
    free = [(part, weight) for part, weight in zip(parts, of, strict=True) if part < 1.0 - 1e-9]
    units = [part / weight for part, weight in free]
    assert not units or max(units) == pytest.approx(min(units))


def test_many_unequal_nodes_are_placed_on_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop waits for `_rates`: it is close after a few rounds of `_inclusion`."""
    inclusion, calls = placement_module._inclusion, 0

    def counted(rates: Sequence[float], count: int) -> list[float]:
        nonlocal calls
        calls += 1
        return inclusion(rates, count)

    monkeypatch.setattr(placement_module, "_inclusion", counted)
    nodes = tuple([0.5, 1.0, 2.0, 3.0] * 10)
    rates = placement_module._rates(nodes, 2)
    assert 0 < calls < 5
    reached = inclusion(rates, 2)
    assert reached == pytest.approx(shares(nodes, 2, 1.0), rel=2e-3)
