"""Values of annotated types as JSON, and which classes within a type msgspec cannot make of JSON.

It would hand them to a hook of the user's, of which there is none here, so that every row would fail to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect

__all__ = ["JsonCodec", "codec_of", "strange_class"]

_SAMPLES: tuple[Any, ...] = (None, True, 1, 1.5, "", [], {})  # what JSON is read as where its type is not known


def strange_class(cls: type[msgspec.Struct]) -> tuple[str, type] | None:
    """The first field that no JSON can fill, and the class in its type that is why. Raises what msgspec does."""
    described: Any = msgspec.inspect.type_info(cls)
    for field in described.fields:
        for stranger in _strangers(field.type, set()):
            return field.name, stranger
    return None


def _strangers(part: Any, seen: set[int]) -> Iterator[type]:
    if isinstance(part, tuple):
        for item in part:
            yield from _strangers(item, seen)
    elif isinstance(part, msgspec.inspect.CustomType):
        if not _is_met_by_a_plain_value(part.cls):
            yield part.cls
    elif isinstance(part, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(part) not in seen:
        seen.add(id(part))  # types may contain themselves
        for name in part.__struct_fields__:
            yield from _strangers(getattr(part, name), seen)


def _is_met_by_a_plain_value(cls: type) -> bool:
    """Whether something that JSON is read as is an instance of it: as of `object`, or of `Iterable`."""
    try:
        return any(isinstance(sample, cls) for sample in _SAMPLES)
    except TypeError:  # a protocol that is not runtime_checkable
        return False


class JsonCodec:
    """Values of one type, to JSON and back. Raises `TypeError` for a type that cannot be read from JSON."""

    def __init__(self, annotation: Any) -> None:
        self.decode = msgspec.json.Decoder(annotation).decode
        self.encode = _encoder.encode
        for stranger in _strangers(msgspec.inspect.type_info(annotation), set()):
            raise TypeError(
                f"the class {stranger.__name__} cannot be read from JSON; make it a msgspec.Struct, a dataclass or an "
                "Enum, or store plain values that it can be made from"
            )


_encoder = msgspec.json.Encoder()
_codecs: dict[Any, JsonCodec] = {}


def codec_of(annotation: Any) -> JsonCodec:
    """The codec of a type, made once."""
    try:
        found = _codecs.get(annotation)
    except TypeError:  # not hashable
        return JsonCodec(annotation)
    if found is None:
        found = _codecs[annotation] = JsonCodec(annotation)
    return found
