"""Frozen dataclasses to and from JSON, field by field, each checked against its type.

A field is text, a number, a truth value, a Literal, a dataclass, a tuple of these
of any length, a dictionary of these by text, or one of these or None.  What is a
TypedDict is not looked into: its rows may be many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")
Object = dict[str, Any]
"""A JSON object."""


class FieldError(ValueError):
    """A JSON value lacks a field, has one too many, or one of another type."""


OPTIONAL = {"json": "optional"}
"""Metadata of a field that JSON does not have while it is None."""
INLINE = {"json": "inline"}
"""Metadata of a dataclass whose fields JSON has beside those around it; None: it has none."""


def from_json(kind: type[T], value: Object, *, exact: bool = True) -> T:
    """The dataclass `kind` that a JSON object stands for; FieldError.

    Without `exact` fields that `kind` does not have are passed over: a program that
    is newer may send them.
    """
    return cast("T", _read_object(kind, value, "", exact))


def to_json(value: Any) -> Object:
    """The JSON object that stands for a dataclass."""
    result: Object = {}
    kind: Any = type(value)
    for one in _fields_of(kind):
        part = getattr(value, one.name)
        if one.kind == "inline":
            result |= {} if part is None else to_json(part)
        elif part is not None or one.kind != "optional":
            result[one.name] = part if part is None or one.write is None else one.write(part)
    return result


# --- types ---------------------------------------------------------------------

_Read = Callable[[Any, str, bool], Any]
"""Checks a value of JSON; is given its name, for people, and whether it has to be exact."""
_Write = Callable[[Any], Any]

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class _Field:
    """What is known of a field from its annotation."""

    name: str
    type: Any
    read: _Read
    kind: str
    """optional, inline, or nothing."""
    required: bool
    write: _Write | None
    """Makes JSON of its values; None: they are JSON."""


@cache
def _fields_of(kind: Any) -> tuple[_Field, ...]:
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        hint = _without_none(hints[one.name])
        found.append(
            _Field(
                one.name,
                hint,
                _reader(hints[one.name]),
                one.metadata.get("json", ""),
                one.default is MISSING and one.default_factory is MISSING,
                _writer(hint),
            )
        )
    return tuple(found)


@cache
def _names_of(kind: Any) -> frozenset[str]:
    """The names that a JSON object for a dataclass may have."""
    names: set[str] = set()
    for one in _fields_of(kind):
        names |= _names_of(one.type) if one.kind == "inline" else {one.name}
    return frozenset(names)


def _without_none(hint: Any) -> Any:
    """The type of what a field has when it has something."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    return hint


def _read_object(kind: Any, value: Any, name: str, exact: bool) -> Any:
    """A dataclass; `name` is where it is, empty for the outermost."""
    if not isinstance(value, dict):
        raise FieldError(f"{name or 'it'} is not an object with fields")
    unknown = value.keys() - _names_of(kind) if exact else ()
    if unknown:
        raise FieldError(f"there is no field {_inside(name, min(map(str, unknown)))}")
    arguments: Object = {}
    for one in _fields_of(kind):
        if one.kind == "inline":
            names = _names_of(one.type)
            inner = {key: part for key, part in value.items() if key in names}
            arguments[one.name] = _read_object(one.type, inner, name, exact) if inner else None
        elif one.name in value:
            arguments[one.name] = one.read(value[one.name], _inside(name, one.name), exact)
        elif one.required:
            raise FieldError(f"the field {_inside(name, one.name)} is missing")
    return kind(**arguments)


def _inside(name: str, field_name: str) -> str:
    return f"{name}.{field_name}" if name else field_name


@cache
def _reader(hint: Any) -> _Read:
    """What checks the values of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _or_none(_reader(_without_none(hint)))
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        return _tuple_of(arguments[0])
    if origin is dict:
        return _dict_of(arguments[1])
    if is_typeddict(hint):
        return _of_class(dict, "an object")
    if is_dataclass(hint):
        return lambda value, name, exact: _read_object(hint, value, name, exact)
    if hint in _NAMES:
        return _of_class(hint, _NAMES[hint])
    raise TypeError(f"{hint} has no JSON")


def _of_class(kind: type, text: str) -> _Read:
    kinds = (int, float) if kind is float else kind

    def read(value: Any, name: str, exact: bool) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise FieldError(f"{name} has to be {text}")
        return value

    return read


def _or_none(inner: _Read) -> _Read:
    return lambda value, name, exact: None if value is None else inner(value, name, exact)


def _one_of(values: tuple[Any, ...]) -> _Read:
    def read(value: Any, name: str, exact: bool) -> Any:
        if value not in values:
            raise FieldError(f"{name} has to be one of {', '.join(map(str, values))}")
        return value

    return read


def _tuple_of(hint: Any) -> _Read:
    inner = None if is_typeddict(hint) else _reader(hint)

    def read(value: Any, name: str, exact: bool) -> Any:
        if not isinstance(value, (list, tuple)):
            raise FieldError(f"{name} has to be a list")
        return tuple(value if inner is None else (inner(part, name, exact) for part in value))

    return read


def _dict_of(hint: Any) -> _Read:
    inner = None if is_typeddict(hint) else _reader(hint)

    def read(value: Any, name: str, exact: bool) -> Any:
        if not isinstance(value, dict):
            raise FieldError(f"{name} has to be an object")
        if inner is None:
            return dict(value)
        return {key: inner(part, _inside(name, key), exact) for key, part in value.items()}

    return read


def _writer(hint: Any) -> _Write | None:
    """What makes JSON of the values of a type; None: they are JSON."""
    if is_dataclass(hint):
        return to_json
    origin, arguments = get_origin(hint), get_args(hint)
    inner = _writer(_without_none(arguments[-1 if origin is dict else 0])) if arguments else None
    if origin is tuple:
        return list if inner is None else lambda value: [inner(part) for part in value]
    if origin is dict and inner is not None:
        return lambda value: {name: inner(part) for name, part in value.items()}
    return None
