"""Tasks for a producer: one with each trait that shows in a row, and some that no app takes."""

from __future__ import annotations

from datetime import datetime, tzinfo
from typing import Annotated, Any

import msgspec

from pgtask import Context, Done, Policy, Task, WorkflowContext, workflow


class Post(Task):
    """The family; its policy is the default of its steps."""

    policy = Policy(queue="post", priority=3)


class Write(Post):
    text: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Send(Post):
    """Has a policy of its own."""

    policy = Policy(queue="outgoing", priority=-7)
    to: str
    copies: int = 1

    async def run(self, ctx: Context) -> Done:
        return Done()


class Sweep(Post):
    """Without fields: serde's unit struct."""

    async def run(self, ctx: Context) -> Done:
        return Done()


class Wait(Post):
    """Serde's newtype."""

    transparent = True
    seconds: float

    async def run(self, ctx: Context) -> Done:
        return Done()


class Numbered(Post):
    n: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Address(msgspec.Struct):
    street: str
    number: int | None = None


class Everything(Post):
    flag: bool
    ratio: float
    large: int
    tags: list[str]
    home: Address
    counts: dict[str, int]
    nothing: None = None

    async def run(self, ctx: Context) -> Done:
        return Done()


class Anything(Post):
    value: Any

    async def run(self, ctx: Context) -> Done:
        return Done()


class Small(Post):
    n: Annotated[int, msgspec.Meta(le=10)]

    async def run(self, ctx: Context) -> Done:
        return Done()


class Nowhere(tzinfo):
    """A time zone that does not say where it is: a datetime with it is naive all the same."""

    def utcoffset(self, _at: datetime | None) -> None:
        return None

    dst = tzname = utcoffset


class Unfit(Task):
    """Steps that `App(Unfit)` refuses, but a producer needs no `App`."""


class UnknownType(Unfit):
    field: NotThere  # type: ignore[name-defined]  # noqa: F821


class BareTwo(Unfit):
    transparent = True
    one: int = 1
    two: int = 2


class NoPolicy(Unfit):
    policy = {"queue": "post"}  # type: ignore[assignment]  # noqa: RUF012


@workflow("doubled")
async def doubled(ctx: WorkflowContext, number: int) -> int:
    return 2 * number
