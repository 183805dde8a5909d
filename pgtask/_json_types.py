"""Values of annotated types as JSON, and the classes within a type that msgspec cannot decode.

msgspec would pass them to a hook of the user. There is none here, so every row would fail to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import msgspec.inspect

from pgtask._json_losses import losses_of, refuse_numbers

__all__ = ["JsonCodec", "codec_of", "undecodable_field"]

_SAMPLES: tuple[Any, ...] = (None, True, 1, 1.5, "", [], {})  # the results of reading JSON without a type


def undecodable_field(cls: type[msgspec.Struct]) -> tuple[str, type] | None:
    """Find the first field that no JSON can fill, and the class in its type that prevents it. Raises the errors of
    msgspec."""
    described: Any = msgspec.inspect.type_info(cls)
    for field in described.fields:
        for found in _undecodable_types(field.type, set()):
            return field.name, found
    return None


def _undecodable_types(part: Any, seen: set[int]) -> Iterator[type]:
    if isinstance(part, tuple):
        for item in part:
            yield from _undecodable_types(item, seen)
    elif isinstance(part, msgspec.inspect.CustomType):
        if not _accepts_plain_value(part.cls):
            yield part.cls
    elif isinstance(part, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(part) not in seen:
        seen.add(id(part))  # types may contain themselves
        for name in part.__struct_fields__:
            yield from _undecodable_types(getattr(part, name), seen)


def _accepts_plain_value(cls: type) -> bool:
    """Return whether a plain value is an instance of the class: as of `object`, or of `Iterable`."""
    try:
        return any(isinstance(sample, cls) for sample in _SAMPLES)
    except TypeError:  # a protocol that is not runtime_checkable
        return False


class JsonCodec:
    """Values of one type, to JSON and back. Raises `TypeError` for a type that cannot be read from JSON."""

    def __init__(self, annotation: Any) -> None:
        self.decode = msgspec.json.Decoder(annotation).decode
        self._losses = losses_of(annotation)
        for found in _undecodable_types(msgspec.inspect.type_info(annotation), set()):
            raise TypeError(
                f"the class {found.__name__} cannot be read from JSON; make it a msgspec.Struct, a dataclass or an "
                "Enum, or store plain values that it can be made from"
            )

    def encode(self, value: Any) -> bytes:
        """Return the JSON of a value that is read back at once. Raises the errors of msgspec, and `ValueError` for a
        NaN or an infinity that would be read back as None."""
        payload = _encoder.encode(value)
        if self._losses is not None:
            refuse_numbers(value, payload)
        return payload

    def encode_for_others(self, value: Any) -> bytes:
        """Return the JSON of a value that is read back elsewhere. Raises as `encode`, and `ValueError` for an object
        that its type does not name."""
        payload = _encoder.encode(value)
        if self._losses is not None:
            self._losses.refuse(value, payload)
        return payload


_encoder = msgspec.json.Encoder()
_codecs: dict[Any, JsonCodec] = {}


def codec_of(annotation: Any) -> JsonCodec:
    """Return the codec of a type, made once."""
    try:
        found = _codecs.get(annotation)
    except TypeError:  # not hashable
        return JsonCodec(annotation)
    if found is None:
        found = _codecs[annotation] = JsonCodec(annotation)
    return found
