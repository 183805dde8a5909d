"""The things of a worker that a check does not have: `ctx.db`, `ctx.client` and `ctx.resources`.

Invariant: a workflow may hand them, and what hangs on them, to a step, which does not run. Any other use ends the
replay with its explanation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["Absent", "refuse_use"]


class Absent:
    """A thing that a check does not have, by its name; `refuse` ends the replay."""

    def __init__(self, name: str, refuse: Callable[[str], NoReturn]) -> None:
        self._pgtask = name, refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own, refuse = self._pgtask
        return Absent(f"{own}.{name}", refuse)

    def __getitem__(self, key: object) -> Any:
        own, refuse = self._pgtask
        return Absent(f"{own}[{key!r:.40}]", refuse)

    __hash__ = object.__hash__


def refuse_use(thing: Absent, *_: object, **__: object) -> NoReturn:
    """End the replay, as it uses a thing that is absent."""
    name, refuse = thing._pgtask
    refuse(name)


_USES = (
    *("call", "bool", "len", "iter", "aiter", "await", "contains", "enter", "exit", "aenter", "aexit", "next"),
    *("eq", "ne", "lt", "le", "gt", "ge", "str", "format", "bytes", "int", "float", "index"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "and", "or", "neg"),
)
for _use in _USES:
    setattr(Absent, f"__{_use}__", refuse_use)
