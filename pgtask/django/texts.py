"""The texts of the steps of functions, for the rows and the archive."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pgtask._fastpath import Codec
from pgtask._validate import encode_by, envelope_of
from pgtask.django.invocation import FAMILY, Invocation, Returned

__all__ = ["call_text", "returned_text"]


@lru_cache(maxsize=4096)
def _codec(cls: Any, path: str) -> Codec:
    return Codec(cls, FAMILY, path, False)


def call_text(path: str, call: Invocation, max_bytes: int) -> str:
    """Return a call of the function at a path. Raises `EnqueueError` for arguments that no row can hold."""
    codec = _codec(Invocation, path)
    step: Any = call
    return envelope_of(codec, encode_by(codec, step, max_bytes))


def returned_text(path: str, returned: Returned) -> str:
    """Return a call that has returned. Raises `ValueError` and msgspec's errors for a value that JSON would change."""
    step: Any = returned
    return _codec(Returned, path).encode(step)
