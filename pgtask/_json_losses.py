"""Silent losses of JSON: a NaN or an infinity becomes null, and where the type may be anything, a tuple becomes a list
and a date a text.

Decoding an encoded value finds most losses, since its type excludes the value that comes back. This module is about the
types that do not: those that allow null, and those that allow anything. They are found once per type, and a value of
another type costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import msgspec
import msgspec.inspect

__all__ = ["Losses", "losses_of", "losses_of_step", "refuse_numbers"]

_PLAIN = (str, int, type(None))
_ATOMS = frozenset((str, int, bool, type(None), bytes))
_PLAIN_TYPES = tuple(getattr(msgspec.inspect, f"{name}Type") for name in ("None", "Bool", "Int", "Float", "Str"))


class Losses:
    """The possible losses in values of one type. `fields`: its attributes that may be anything; "" is the value itself.
    Without any, a value whose JSON has no null has no loss."""

    __slots__ = ("fields",)

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields

    def refuse(self, value: Any, payload: bytes) -> None:
        """Raise `ValueError` if the JSON `payload` of a value does not say the same as the value."""
        refuse_numbers(value, payload)
        for name in self.fields:
            _refuse_objects(getattr(value, name) if name else value, f"$.{name}" if name else "$")


def losses_of(annotation: Any) -> Losses | None:
    """Return the possible losses in values of a type; None if its decoder finds all. Raises the errors of msgspec."""
    described: Any = msgspec.inspect.type_info(annotation)
    return Losses(("",) if _is_loose(described) else ()) if _takes_null(described, set()) else None


def losses_of_step(cls: type[msgspec.Struct]) -> Losses | None:
    """Return the possible losses in the fields of a step, as `losses_of` does."""
    described: Any = msgspec.inspect.type_info(cls)
    if not _takes_null([field.type for field in described.fields], set()):
        return None
    return Losses(tuple(field.name for field in described.fields if _is_loose(field.type)))


def _takes_null(part: Any, seen: set[int]) -> bool:
    """Return whether a value of this type can contain null."""
    if isinstance(part, (tuple, list)):
        return any(_takes_null(item, seen) for item in part)
    if isinstance(part, (msgspec.inspect.AnyType, msgspec.inspect.NoneType, msgspec.inspect.CustomType)):
        return True
    if not isinstance(part, (msgspec.inspect.Type, msgspec.inspect.Field)) or id(part) in seen:
        return False
    seen.add(id(part))  # types may contain themselves
    return any(_takes_null(getattr(part, name), seen) for name in part.__struct_fields__)


def _is_loose(part: Any) -> bool:
    """Return whether a type allows anything, or is a list, dict or union of such a type and plain JSON."""
    match part:
        case msgspec.inspect.AnyType():
            return True
        case msgspec.inspect.CustomType():
            return part.cls is object
        case msgspec.inspect.ListType():
            return _is_loose(part.item_type)
        case msgspec.inspect.DictType():
            has_texts = isinstance(part.key_type, (msgspec.inspect.StrType, msgspec.inspect.AnyType))
            return has_texts and _is_loose(part.value_type)
        case msgspec.inspect.UnionType():
            rest = [one for one in part.types if not isinstance(one, _PLAIN_TYPES)]
            return bool(rest) and all(map(_is_loose, rest))
    return False


def refuse_numbers(value: Any, payload: bytes) -> None:
    """Raise `ValueError` for a NaN or an infinity in a value; a value whose JSON has no null has none."""
    if b"null" not in payload or _is_finite(value):
        return
    for path, number in _numbers(value, "$"):
        if not math.isfinite(number):
            raise ValueError(f"{path} is {number}, which JSON cannot hold and would be read back as None")


def _is_finite(value: Any) -> bool:
    """Return whether a quick check finds no NaN and no infinity in a value, as in nearly all values that have a
    null."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is float:
        return math.isfinite(value)
    if kind is list or kind is tuple:
        return all(map(_is_finite, value))
    if kind is dict:
        return all(map(_is_finite, value.values()))
    if isinstance(value, msgspec.Struct):
        return all(map(_is_finite, msgspec.structs.astuple(value)))
    return False


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield the floats in a value that msgspec has encoded, with their paths."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, _PLAIN):
        return
    elif isinstance(value, Enum):
        yield from _numbers(value.value, path)
    else:
        for name, part in _named_parts(value):
            yield from _numbers(part, path + name)


def _named_parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((f"[{key!r}]", item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ((f"[{at}]", item) for at, item in enumerate(value))
    if isinstance(value, msgspec.Struct):
        names: Iterable[str] = value.__struct_fields__
    else:  # a dataclass, one of attrs, or something without parts
        names = getattr(value, "__dataclass_fields__", ()) or [
            one.name for one in getattr(value, "__attrs_attrs__", ())
        ]
    return ((f".{name}", getattr(value, name)) for name in names if hasattr(value, name))


def _refuse_objects(value: Any, path: str) -> None:
    """Raise `ValueError` for an object that is no plain JSON, in a value whose type allows anything."""
    if isinstance(value, (*_PLAIN, float)):
        return
    if not isinstance(value, (list, dict)):
        raise ValueError(
            f"{path} is of type {type(value).__name__}, and would not be read back as that, since its annotation does "
            "not say so; annotate it with its type, or make it plain JSON"
        )
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(
                    f"{path} has the key {key!r:.80}, which would be read back as a text; annotate it with the type of "
                    "its keys, or make them texts"
                )
    for name, part in _named_parts(value):
        _refuse_objects(part, path + name)
