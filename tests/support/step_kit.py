"""One step for each form that serde knows and for each kind of field, with their table, and steps drawn at random."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Annotated
from uuid import UUID

import msgspec
import reference
from hypothesis import strategies as st

from pgtask import App, Context, Done, Next, Task
from pgtask._fastpath import Codec, Table


class Kit(Task):
    """One step for each form that serde knows, and for each kind of field."""


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dataclass
class Place:
    name: str
    at: Point | None = None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Everything(Kit):
    text: str
    whole: int
    real: float
    yes: bool
    nothing: None
    numbers: list[int]
    table: dict[str, float | None]
    by_number: dict[int, str]
    point: Point
    place: Place
    id: UUID
    at: datetime
    day: date
    span: timedelta
    raw: bytes
    exact: Decimal
    colour: Colour
    pair: tuple[int, str]
    labels: set[str]
    maybe: int | None = None
    many: list[Point] = msgspec.field(default_factory=list)

    async def run(self, ctx: Context) -> Done:
        return Done()


class One(Kit):
    filename: str

    async def run(self, ctx: Context) -> Next[Everything]:
        raise NotImplementedError


class Unit(Kit):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Bare(Kit):
    transparent = True
    count: Annotated[int, msgspec.Meta(ge=0)]

    async def run(self, ctx: Context) -> Done:
        return Done()


class BareText(Kit):
    transparent = True
    text: str | None = "default"

    async def run(self, ctx: Context) -> Done:
        return Done()


class BarePlace(Kit):
    transparent = True
    place: Place

    async def run(self, ctx: Context) -> Done:
        return Done()


class BareKeyword(Kit, kw_only=True):
    transparent = True
    count: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Row(Kit, array_like=True):
    number: int
    text: str = ""

    async def run(self, ctx: Context) -> Done:
        return Done()


class Renamed(Kit, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    file_name: str
    byte_count: int = 0
    type_: str = msgspec.field(name="type", default="")

    async def run(self, ctx: Context) -> Done:
        return Done()


class Checked(Kit):
    even: int

    def __post_init__(self) -> None:
        if self.even % 2:
            raise ValueError("must be even")

    async def run(self, ctx: Context) -> Done:
        return Done()


class Grüße(Task):
    """A task whose name is not ASCII."""


class Über(Grüße):
    wen: str

    async def run(self, ctx: Context) -> Done:
        return Done()


APP = App(Kit, Grüße)
TABLE = Table(APP)
ORACLE = reference.Table(APP)


def codec(cls: type[Task]) -> Codec:
    return TABLE.entry(cls).codec


WHOLE = st.integers(-(2**63), 2**64 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.builds(Point, WHOLE, WHOLE)
PLACES = st.builds(Place, st.text(), st.none() | POINTS)
ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30)), timezone(-timedelta(hours=9))])
STEPS = st.one_of(
    st.builds(
        Everything,
        text=st.text(),
        whole=WHOLE,
        real=REAL,
        yes=st.booleans(),
        nothing=st.none(),
        numbers=st.lists(WHOLE, max_size=3),
        table=st.dictionaries(st.text(), REAL | st.none(), max_size=3),
        by_number=st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.text(), max_size=3),
        point=POINTS,
        place=PLACES,
        id=st.uuids(),
        at=ZONES.flatmap(lambda zone: st.datetimes(timezones=st.just(zone))),
        day=st.dates(),
        span=st.timedeltas(timedelta(days=-1000), timedelta(days=1000)),
        raw=st.binary(),
        exact=st.decimals(allow_nan=False, allow_infinity=False),
        colour=st.sampled_from(Colour),
        pair=st.tuples(WHOLE, st.text()),
        labels=st.sets(st.text(), max_size=3),
        maybe=st.none() | WHOLE,
        many=st.lists(POINTS, max_size=3),
    ),
    st.builds(One, st.text()),
    st.builds(Unit),
    st.builds(Bare, st.integers(0, 2**63)),
    st.builds(BareText, st.none() | st.text()),
    st.builds(BarePlace, PLACES),
    st.builds(Row, WHOLE, st.text()),
    st.builds(Renamed, st.text(), st.integers(0, 3), st.text(max_size=1)),
    st.builds(Checked, WHOLE.map(lambda number: number // 2 * 2)),
    st.builds(Über, st.text()),
)
