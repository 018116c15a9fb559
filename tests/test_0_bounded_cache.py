"""The bounded cache: it never outgrows its bound, and lets go of what was used least recently."""

from __future__ import annotations

import random

from fusestore.bounded_cache import LeastRecentlyUsed


def filled(size_max: int, *keys: str) -> LeastRecentlyUsed[str, str]:
    cache: LeastRecentlyUsed[str, str] = LeastRecentlyUsed(size_max)
    for key in keys:
        cache[key] = key.upper()
    return cache


def test_the_oldest_goes_when_nothing_was_used() -> None:
    assert list(filled(2, "a", "b", "c").items()) == [("b", "B"), ("c", "C")]


def test_reading_is_a_use() -> None:
    cache = filled(2, "a", "b")
    assert cache.get("a") == "A"
    cache["c"] = "C"
    assert cache.get("b") is None
    assert cache.get("a") == "A"


def test_setting_again_is_a_use_and_takes_no_room() -> None:
    cache = filled(2, "a", "b")
    cache["a"] = "new"
    assert len(cache) == 2
    cache["c"] = "C"
    assert list(cache.items()) == [("a", "new"), ("c", "C")]


def test_looking_is_no_use() -> None:
    cache = filled(2, "a", "b")
    assert (cache.peek("a"), cache.peek("x")) == ("A", None)
    assert len(list(cache.items())) == 2
    cache["c"] = "C"
    assert cache.peek("a") is None


def test_what_is_discarded_is_gone() -> None:
    cache = filled(3, "a", "b", "c")
    cache.discard("b")
    cache.discard("x")
    assert [key for key, _ in cache.items()] == ["a", "c"]
    cache.clear()
    assert len(cache) == 0
    assert cache.get("a") is None


def test_it_does_what_a_list_in_order_of_use_would_do() -> None:
    chance = random.Random(1)
    for size_max in (1, 2, 7):
        cache: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(size_max)
        model: list[tuple[int, int]] = []
        for step in range(2000):
            key = chance.randrange(10)
            known = dict(model).get(key)
            action = chance.choice(("get", "set", "peek", "discard"))
            if action == "peek":
                assert cache.peek(key) == known
                continue
            model = [entry for entry in model if entry[0] != key]
            if action == "discard":
                cache.discard(key)
            elif action == "set":
                cache[key] = step
                model = [*model, (key, step)][-size_max:]
            else:
                assert cache.get(key) == known
                model += [(key, known)] if known is not None else []
            assert list(cache.items()) == model
