"""The limits of steps: how many run at once, how fast they start, at what cost, and in which turn.

Invariants: a limit is checked when it is made, so that the engine can trust it; nothing here touches a database.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

import msgspec

from pgtask.errors import DefinitionError

__all__ = ["MAX_KEY", "Breaker", "Limit", "Rate", "limit_key"]

MAX_KEY = 500
"""Characters of the key of a limit, at most."""
MAX_NAME = 64
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}", re.ASCII)
_BURST_SECONDS = 0.1  # a rate saves up so much by default, so that a worker need not claim each task at its time
_SECOND = timedelta(seconds=1)


class Rate(msgspec.Struct, frozen=True):
    """So many starts in a time, or so many units of a cost: `Rate(3_000, per=timedelta(minutes=1))`.

    - `count`: starts, or units, in each `per`.
    - `burst`: what an idle key saves up, and may then use at once; by default what the rate allows in a tenth of a
      second, at least one start. No second has more than the rate of a second and the burst.
    - `of`: of a cost, the name of the field of the step that says how many units it will use.

    Raises `DefinitionError` naming the argument.
    """

    count: float
    per: timedelta = _SECOND
    burst: float | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        _check_positive(f"Rate(count={self.count!r})", self.count)
        if not isinstance(self.per, timedelta) or self.per <= timedelta(0):
            raise DefinitionError(f"Rate(per={self.per!r}) must be a positive timedelta")
        if self.burst is not None:
            _check_positive(f"Rate(burst={self.burst!r})", self.burst)
            if self.of is None and self.burst < 1:
                raise DefinitionError(f"Rate(burst={self.burst!r}) must be 1 or more, or no step could start")
        if self.of is not None and (not isinstance(self.of, str) or not self.of.isidentifier()):
            raise DefinitionError(f"Rate(of={self.of!r}) must be the name of a field of the step")

    @property
    def per_second(self) -> float:
        return self.count / self.per.total_seconds()

    @property
    def saved(self) -> float:
        """The burst, given or by default."""
        if self.burst is not None:
            return self.burst
        return max(1.0, self.per_second * _BURST_SECONDS)


class Breaker(msgspec.Struct, frozen=True):
    """Stop a key after `failures` failed tries in a row, for a `pause`. Then one step probes: if it ends well the key
    goes on; if it fails, the key pauses again. Raises `DefinitionError` naming the argument."""

    failures: int
    pause: timedelta

    def __post_init__(self) -> None:
        if isinstance(self.failures, bool) or not isinstance(self.failures, int) or self.failures < 1:
            raise DefinitionError(f"Breaker(failures={self.failures!r}) must be a whole number, 1 or more")
        if not isinstance(self.pause, timedelta) or self.pause <= timedelta(0):
            raise DefinitionError(f"Breaker(pause={self.pause!r}) must be a positive timedelta")


class Limit(msgspec.Struct, frozen=True):
    """A limit that steps share, on all hosts: `Policy(limit=Limit("host", key=host_of, concurrency=2))`.

    Steps whose policies have the same limit count together. Declare it once and use the object in all of them.

    - `name`: 1 to 64 letters, digits, `_`, `.` and `-`. Rows and commands know the limit by it.
    - `key`: a function of the step that returns a text or a whole number. Each key has the limit for itself. None as
      the key of a step means that the limit does not apply to it. Without the function all steps share one key.
    - `concurrency`: how many steps of a key run at once. What runs is counted in the leased rows themselves, so a
      worker that dies frees its places as soon as its leases are released.
    - `rate`: how many steps of a key start in a time.
    - `cost`: how many units the steps of a key may use in a time. `of` names the field that says how many a step will
      use; `ctx.charge(n)` adds what it has used beside that, and a negative number gives back.
    - `breaker`: stops a key after failed tries in a row.
    - `share`: the keys take turns, so that one with a million tasks does not hold up the others. A mapping gives keys a
      weight; a key that it does not name has the weight 1.
    - `order="strict"`, with `concurrency=1`: the steps of a key run one after the other in the order in which they fell
      due. One that waits for its retry, or is parked, holds up those behind it.

    People change a limit while workers run by `pgtask limit`; see docs/limits.md. Raises `DefinitionError` naming the
    argument.
    """

    name: str
    key: Callable[[Any], str | int | None] | None = None
    concurrency: int | None = None
    rate: Rate | None = None
    cost: Rate | None = None
    breaker: Breaker | None = None
    share: bool | Mapping[str, float] = False
    order: Literal["due", "strict"] = "due"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise DefinitionError(
                f"Limit(name={self.name!r}) must be 1 to {MAX_NAME} letters, digits, underscores, dots and hyphens"
            )
        if self.key is not None and not callable(self.key):
            raise DefinitionError(f"Limit({self.name!r}, key={self.key!r}) must be a function of the step, or None")
        self._check_numbers()
        self._check_share()
        if self.order not in ("due", "strict"):
            raise DefinitionError(f'Limit({self.name!r}, order={self.order!r}) must be "due" or "strict"')
        if self.order == "strict" and self.concurrency != 1:
            raise DefinitionError(f'Limit({self.name!r}, order="strict") needs concurrency=1')
        if not (self.concurrency or self.rate or self.cost or self.breaker or self.share):
            raise DefinitionError(
                f"Limit({self.name!r}) limits nothing; give it concurrency=, rate=, cost=, breaker= or share="
            )

    def _check_numbers(self) -> None:
        count = self.concurrency
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1_000_000):
            raise DefinitionError(f"Limit({self.name!r}, concurrency={count!r}) must be a whole number, 1 or more")
        for what, kind in (("rate", Rate), ("cost", Rate), ("breaker", Breaker)):
            value = getattr(self, what)
            if value is not None and not isinstance(value, kind):
                raise DefinitionError(f"Limit({self.name!r}, {what}={value!r}) must be a {kind.__name__}, or None")
        if self.cost is not None and self.cost.of is None:
            raise DefinitionError(
                f'Limit({self.name!r}, cost=) needs the field that says how much: Rate(..., of="tokens")'
            )
        if self.rate is not None and self.rate.of is not None:
            raise DefinitionError(
                f"Limit({self.name!r}, rate=): a rate counts starts; use cost= for of={self.rate.of!r}"
            )

    def _check_share(self) -> None:
        share = self.share
        if isinstance(share, bool):
            return
        if not isinstance(share, Mapping) or not all(isinstance(key, str) for key in share):
            raise DefinitionError(f"Limit({self.name!r}, share={share!r}) must be True, or a weight for each key")
        for key, weight in share.items():
            _check_positive(f"Limit({self.name!r}, share={{{key!r}: {weight!r}}})", weight)

    @property
    def prefix(self) -> str:
        """The beginning of all keys of this limit, as rows have them."""
        return f"{self.name} "


def limit_key(limit: Limit, step: object) -> str | None:
    """Return the key of a step under a limit as its row has it; None if the limit does not apply to it.

    Raises `ValueError` for a key that is no text of at most 500 characters and no whole number, and what the function
    of the user raises.
    """
    if limit.key is None:
        return limit.prefix
    key = limit.key(step)
    if key is None:
        return None
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{limit.prefix}{key}"
    if not isinstance(key, str):
        raise ValueError(f"the key of the limit {limit.name} is {key!r:.80}; return a text, a whole number, or None")
    if len(key) > MAX_KEY or "\0" in key:
        raise ValueError(f"the key of the limit {limit.name} is {key!r:.80}; it must have at most {MAX_KEY} characters")
    return limit.prefix + key


def _check_positive(shown: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise DefinitionError(f"{shown} must be a number greater than 0")
