"""Lookup counts, compared with a dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusestore.serve.lookups import Lookups

INOS = st.sampled_from([1, 2, 1023, 1024, 1025, 5000, 2**40, 2**62])


@given(st.lists(st.tuples(INOS, st.integers(0, 3))))
def test_as_a_dict(steps: list[tuple[int, int]]) -> None:
    counts, lookups = dict[int, int](), Lookups()
    for ino, forgotten in steps:
        if not forgotten:
            lookups.add(ino)
            counts[ino] = counts.get(ino, 0) + 1
        else:
            left = counts.pop(ino, 0) - forgotten
            assert lookups.forget(ino, forgotten) is (left <= 0)
            if left > 0:
                counts[ino] = left
        assert (ino in lookups) is (ino in counts)
        assert len(lookups) == len(counts)
