"""Dataclasses and their JSON: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import pytest

from fusestore.typed_json import INLINE, OPTIONAL, FieldError, from_json, to_json


class Row(TypedDict):
    """One of many."""

    offset: int


@dataclass(frozen=True, slots=True)
class Part:
    """Inside another."""

    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Whole:
    """Has fields of every kind."""

    action: Literal["start", "stop"]
    rate: float | None
    wait: bool = False
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    more: int | None = field(default=None, metadata=OPTIONAL)
    beside: Part | None = field(default=None, metadata=INLINE)


SMALL = {"action": "start", "rate": None}
LARGE = {
    "action": "stop",
    "rate": 1.5,
    "wait": True,
    "more": 7,
    "size": 3,
    "names": ["x"],
    "parts": [{"size": 1, "names": ["a", "\udcff"]}],
    "by_name": {"b": {"size": 2, "names": []}},
    "rows": [{"offset": 1, "told by nobody": 2}],
}


def test_json_becomes_a_dataclass_and_json_again() -> None:
    whole = from_json(Whole, LARGE)
    assert whole.parts == (Part(1, ("a", "\udcff")),)
    assert whole.by_name == {"b": Part(2)}
    assert whole.beside == Part(3, ("x",))
    assert json.loads(json.dumps(to_json(whole))) == LARGE


def test_fields_may_be_left_out() -> None:
    small = from_json(Whole, SMALL)
    assert (small.wait, small.more, small.beside) == (False, None, None)
    rest: dict[str, Any] = {"wait": False, "parts": [], "by_name": {}, "rows": []}
    assert to_json(small) == {**SMALL, **rest}
    assert list(to_json(small)) == ["action", "rate", *rest]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"action": "sing"}, "action has to be one of start, stop"),
        ({"action": ["start"]}, "action has to be one of start, stop"),
        ({"action": None}, "action has to be one of start, stop"),
        ({"rate": "1"}, "rate has to be a number"),
        ({"rate": True}, "rate has to be a number"),
        ({"wait": 1}, "wait has to be true or false"),
        ({"more": 1.0}, "more has to be a whole number"),
        ({"more": True}, "more has to be a whole number"),
        ({"parts": {}}, "parts has to be a list"),
        ({"parts": [7]}, "parts is not an object with fields"),
        ({"parts": [{"size": 1, "names": [1]}]}, "parts.names has to be text"),
        ({"by_name": []}, "by_name has to be an object"),
        ({"by_name": {"a": {}}}, "the field by_name.a.size is missing"),
        ({"names": []}, "the field size is missing"),
        ({"beside": {"size": 1}}, "there is no field beside"),
        ({"rates": 1}, "there is no field rates"),
        ({"by_name": {"a": {"size": 1, "x": 1}}}, "there is no field by_name.a.x"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(FieldError) as raised:
        from_json(Whole, {**SMALL, **change})
    assert str(raised.value) == reason


def test_a_missing_field_is_named() -> None:
    with pytest.raises(FieldError, match="the field rate is missing"):
        from_json(Whole, {"action": "start"})


@pytest.mark.parametrize("value", [None, 7, "text", [SMALL]])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(FieldError, match="it is not an object"):
        from_json(Whole, value)


def test_fields_of_a_newer_program_may_be_passed_over() -> None:
    newer = {**SMALL, "newer": 1, "by_name": {"a": {"size": 1, "newer": 2}}}
    assert from_json(Whole, newer, exact=False).by_name == {"a": Part(1)}
