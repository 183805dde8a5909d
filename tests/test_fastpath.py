"""Envelope, codec, table, leases, outcomes and COPY rows of `_fastpath`, compared with the plain reference."""

from __future__ import annotations

import ast
import asyncio
import enum
import io
import json
import mmap
import struct
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID, uuid4

import msgspec
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from pgtask import App, Context, DecodeError, Done, Next, Policy, Task, UnknownStepError, _fastpath
from pgtask._fastpath import Codec, CopyRows, Dispatcher, Entry, Lease, Leases, Marks, Outcomes, Table, scan_envelope

T = TypeVar("T")


# --- the steps that are stored here -------------------------------------------------------------------------------


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
    """Names need not be ASCII."""


class Über(Grüße):
    wen: str

    async def run(self, ctx: Context) -> Done:
        return Done()


APP = App(Kit, Grüße)
TABLE = Table(APP)
ORACLE = reference.Table(APP)


def codec(cls: type[Task]) -> Codec:
    return TABLE.entry(cls).codec


def result(function: Any, *arguments: Any) -> Any:
    """What a call returns, or the class of pgtask's error; messages may differ, other errors may not occur."""
    try:
        return function(*arguments)
    except (DecodeError, UnknownStepError) as error:
        return type(error)


# --- strategies ---------------------------------------------------------------------------------------------------

SPACE = st.text(" \t\n\r", max_size=3)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["}}", '"', "\\", '{"a":{"b":1}}', "}", "{", '\\"}}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["Kit", "One", "Unit", "Bare", "Row", "BareText", "Grüße", "Über", "", "😀"]) | st.text(
    max_size=5
)


@st.composite
def written(draw: st.DrawFn, value: Any) -> str:
    """A value as JSON, with white space wherever it may be, and escapes that need not be."""
    if isinstance(value, str):
        return draw(quoted(value))
    if isinstance(value, list):
        parts = [draw(SPACE) + draw(written(item)) + draw(SPACE) for item in value]
        return "[" + (",".join(parts) or draw(SPACE)) + "]"
    if isinstance(value, dict):
        parts = [
            draw(SPACE) + draw(quoted(name)) + draw(SPACE) + ":" + draw(SPACE) + draw(written(item)) + draw(SPACE)
            for name, item in value.items()
        ]
        return "{" + (",".join(parts) or draw(SPACE)) + "}"
    return msgspec.json.encode(value).decode() if not isinstance(value, int) or value is True else repr(value).lower()


@st.composite
def quoted(draw: st.DrawFn, text: str) -> str:
    style = draw(st.sampled_from(["plain", "ascii", "escaped"]))
    if style == "plain":
        return msgspec.json.encode(text).decode()
    units = text.encode("utf-16-be")
    if style == "ascii":
        return '"' + "".join(f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2)) + '"'
    short = {"/": "\\/", "e": "\\u0065", "a": "\\u0061", "\n": "\\n", '"': '\\"', "\\": "\\\\"}
    return '"' + "".join(short.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in text) + '"'


@st.composite
def envelopes(draw: st.DrawFn) -> str:
    names = [draw(NAMES), draw(NAMES)]
    text = draw(written(draw(JSON)))
    for name in reversed(names):
        parts = ["", "{", draw(quoted(name)), ":", text, "}", ""]
        text = "".join(part + draw(SPACE) for part in parts)
    return text


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An envelope after an accident or two: cut, or with characters lost, added or changed."""
    text = draw(envelopes())
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["head", "tail", "lose", "add", "change", "wrap"])):
            case "head":
                text = text[at:]
            case "tail":
                text = text[:at]
            case "lose":
                text = text[:at] + text[at + draw(st.integers(1, 3)) :]
            case "add":
                text = text[:at] + draw(DAMAGE) + text[at:]
            case "change":
                text = text[:at] + draw(DAMAGE) + text[at + 1 :]
            case "wrap":
                text = draw(st.sampled_from(['{"Kit":%s}', "[%s]", '"%s"', "%s%s"])).replace("%s", text)
    return text


DAMAGE = st.text('{}[]":,\\ \t\n0-1.e/utfn\0\x0b\x7f\x85\u00a0é\u2028\ufeff😀', min_size=1, max_size=2)
ANY_TEXT = st.text() | st.text('{}":,[] \\"1aKitOne', max_size=30) | envelopes() | damaged()


# --- envelope -----------------------------------------------------------------------------------------------------


def scanned(text: str) -> Any:
    """What `scan_envelope` makes of a text that turns out to be valid: payload and names are only read afterwards."""
    try:
        task, step, payload = scan_envelope(text)
        reference.parse(payload.decode())
        if any(character < " " for character in task + step) and "\\" not in text:
            return DecodeError  # a raw control character in a name: left to the table, which does not know such a name
    except DecodeError:
        return DecodeError
    return task, step, payload


@given(envelopes())
def test_an_envelope_is_scanned_as_the_reference_reads_it(text: str) -> None:
    assert scanned(text) == reference.scan_envelope(text)


@given(ANY_TEXT)
def test_any_text_is_scanned_or_refused_as_by_the_reference(text: str) -> None:
    expected = result(reference.scan_envelope, text)
    found = scanned(text)
    if found != expected:
        # A name given twice: JSON allows both readings, to refuse it and to take the last one.
        assert expected is DecodeError
        assert isinstance(reference.parse(text), reference.Members)
        assert json_last(text) == found


def json_last(text: str) -> Any:
    """The scan of an envelope in which the last of several members of one name counts."""
    outer = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    ((task, rest),) = outer.items()
    ((step, payload),) = msgspec.json.decode(rest, type=dict[str, msgspec.Raw]).items()
    return task, step, bytes(payload)


@given(ANY_TEXT)
def test_the_table_decodes_any_text_as_the_reference(text: str) -> None:
    expected = result(ORACLE.decode, text)
    found = result(TABLE.decode, text)
    if isinstance(found, tuple):
        found = APP.steps[found[0].codec.cls], found[1]
    if found != expected:
        assert (found, expected) == (UnknownStepError, DecodeError)
        assert json_last(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "null",
        "{}",
        '"Kit"',
        "[]",
        '{"Kit"',
        '{"Kit":',
        '{"Kit":}',
        '{"Kit":{}}',
        '{"Kit":{"Unit"}}',
        '{"Kit":{"Unit":}}',
        '{"Kit":{"Unit":null}',
        '{"Kit":{"Unit":null}}}',
        '{"Kit":{"Unit":null}} x',
        '{"Kit":{"Unit":null},"Kit2":{"Unit":null}}',
        '{"Kit":{"Unit":null,"One":null}}',
        '{"Kit":{"Bare":1},"Kit":{"Bare":2}}',
        '{"Kit":{"Bare":1,"Bare":2}}',
        '{"Kit":{"Bare":1,}}',
        '{"Kit":{"Bare":01}}',
        '{"Kit":{"Bare":NaN}}',
        '{"Kit":["Unit"]}',
        '{"Kit":"Unit"}',
        '{"Kit":{"Bare":1} "x"}',
        "{'Kit':{'Unit':null}}",
        '{"K\\ud800it":{"Unit":null}}',
        '{"K\\qit":{"Unit":null}}',
        '{"Kit\\',
        '{"Kit":{"BareText":"\\ud800"}}',
        '{"Kit":{"BareText":"a\nb"}}',
        '{"Kit":{"BareText":"}}',
        "\ufeff" + '{"Kit":{"Unit":null}}',
        "}}",
        "{{{{}}}}",
    ],
)
def test_a_text_that_is_no_envelope_is_a_decode_error(text: str) -> None:
    assert result(TABLE.decode, text) is result(ORACLE.decode, text) is DecodeError


@pytest.mark.parametrize("depth", [100, 20_000])
@pytest.mark.parametrize(
    "bomb",
    ["[%s]", '{"Kit":%s}', '{"Kit":{"BareText":%s}}', '{"Kit":{"Unknown":[%s]}}', '{"Kit":{"One":{"filename":[%s]}}}'],
)
def test_a_deep_text_is_refused_and_does_no_harm(bomb: str, depth: int) -> None:
    before, after = bomb.split("%s")
    for inner in (before * depth + after * depth, before + "[" * depth + "]" * depth + after, before * depth):
        assert result(TABLE.decode, inner) in (DecodeError, UnknownStepError)


def test_names_with_escapes_are_found() -> None:
    entry, step = TABLE.decode('{"\\u004bit" : {"\\u004f\\u006ee":{"filename":"\\u0041"}}}')
    assert (entry.codec.cls, step) == (One, One("A"))


def test_an_unknown_step_is_named() -> None:
    for text, name in [
        ('{"Kit":{"Two":null}}', "Kit.Two"),
        ('{"Kitten":{"One":{}}}', "Kitten.One"),
        ('{"\\u004bit":{"\\u00e9":1}}', "Kit.é"),
        ('{"KitOne":{"":1}}', "KitOne."),
        ('{"":{"KitOne":1}}', ".KitOne"),
        ('{"Ki":{"tOne":1}}', "Ki.tOne"),
    ]:
        with pytest.raises(UnknownStepError) as caught:
            TABLE.decode(text)
        assert caught.value.name == name


# --- codec --------------------------------------------------------------------------------------------------------

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


@given(STEPS)
def test_what_is_encoded_is_decoded_to_the_same_step(step: Task) -> None:
    mine = codec(type(step))
    text = mine.encode(step)
    assert mine.decode(mine.payload(step)) == step
    assert text.encode() == mine.prefix + mine.payload(step) + b"}}"
    entry, again = TABLE.decode(text)
    assert (entry, again) == (TABLE.entry(type(step)), step)
    # And the reference reads and writes the same JSON.
    assert ORACLE.decode(text) == (APP.steps[type(step)], step)
    assert unordered(text) == unordered(reference.encode(APP.steps[type(step)], step))


def unordered(text: str) -> Any:
    """Parsed JSON; the list that comes of a set in one order."""
    value = json.loads(text)
    for name, inner in value.get("Kit", {}).items():
        if name == "Everything":
            inner["labels"].sort()
    return value


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (One("name.txt"), '{"Kit":{"One":{"filename":"name.txt"}}}'),
        (One('a"b\\c\n\0\x7f/'), '{"Kit":{"One":{"filename":"a\\"b\\\\c\\n\\u0000\x7f/"}}}'),
        (One("Zoë ☃ 😀"), '{"Kit":{"One":{"filename":"Zoë ☃ 😀"}}}'),
        (Unit(), '{"Kit":{"Unit":null}}'),
        (Bare(5), '{"Kit":{"Bare":5}}'),
        (BareText("x"), '{"Kit":{"BareText":"x"}}'),
        (BareText(None), '{"Kit":{"BareText":null}}'),
        (BarePlace(Place("here", Point(1))), '{"Kit":{"BarePlace":{"name":"here","at":{"x":1,"y":0}}}}'),
        (Row(1, "a"), '{"Kit":{"Row":[1,"a"]}}'),
        (Renamed("a"), '{"Kit":{"Renamed":{"fileName":"a"}}}'),
        (Renamed("a", 1, "t"), '{"Kit":{"Renamed":{"fileName":"a","byteCount":1,"type":"t"}}}'),
        (Über("Jürgen"), '{"Grüße":{"Über":{"wen":"Jürgen"}}}'),
    ],
)
def test_the_stored_form_is_serdes(step: Task, text: str) -> None:
    assert codec(type(step)).encode(step) == text == reference.encode(APP.steps[type(step)], step)
    assert TABLE.decode(text)[1] == step


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{"Kit":{"Unit":{}}}', Unit()),
        (' { "Kit" : { "Unit" : null } } ', Unit()),
        ('{"Kit":{"Unit":{"unknown":1}}}', Unit()),
        ('{"Kit":{"One":{"filename":"a","unknown":[{}]}}}', One("a")),
        ('{"Kit":{"Row":[1]}}', Row(1)),
    ],
)
def test_other_forms_that_are_read(text: str, step: Task) -> None:
    assert TABLE.decode(text)[1] == step == ORACLE.decode(text)[1]


def test_a_transparent_step_may_have_a_keyword_only_field() -> None:
    assert codec(BareKeyword).encode(BareKeyword(count=3)) == '{"Kit":{"BareKeyword":3}}'
    assert TABLE.decode('{"Kit":{"BareKeyword":3}}')[1] == BareKeyword(count=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Kit":{"One":{"filename":5}}}', "Kit.One cannot be decoded: Expected `str`, got `int` - at `$.filename`"),
        ('{"Kit":{"One":{}}}', "Kit.One cannot be decoded: Object missing required field `filename`"),
        ('{"Kit":{"One":null}}', "Kit.One cannot be decoded: Expected `object`, got `null`"),
        ('{"Kit":{"One":{"filename":"a"},}}', "the step is not valid JSON: "),
        ('{"Kit":{"Bare":-1}}', "Kit.Bare cannot be decoded: Expected `int` >= 0"),
        ('{"Kit":{"Bare":{"count":1}}}', "Kit.Bare cannot be decoded: Expected `int`, got `object`"),
        ('{"Kit":{"Unit":5}}', "Kit.Unit cannot be decoded: Expected `object`, got `int`"),
        ('{"Kit":{"Checked":{"even":3}}}', "Kit.Checked cannot be decoded: must be even"),
        (
            '{"Kit":{"Renamed":{"fileName":"a","x":1}}}',
            "Kit.Renamed cannot be decoded: Object contains unknown field `x`",
        ),
    ],
)
def test_a_row_that_does_not_decode_says_why(text: str, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        TABLE.decode(text)
    assert str(caught.value).startswith(message)
    assert result(ORACLE.decode, text) is DecodeError


def test_a_step_that_cannot_be_encoded_raises() -> None:
    for step in (One(object()), One("\ud800"), Bare(2**70), Row(1, lambda: 0)):  # type: ignore[arg-type]
        try:
            payload = codec(type(step)).payload(step)
        except (TypeError, UnicodeEncodeError, OverflowError):
            continue
        assert codec(type(step)).decode(payload) == step


def test_an_entry_holds_what_the_definition_says() -> None:
    entry = Entry(
        msgspec.structs.replace(
            APP.steps[One], policy=Policy(timeout=timedelta(milliseconds=1500), queue="q", priority=-3)
        )
    )
    assert (entry.codec.cls, entry.codec.label, entry.edges) == (One, "Kit.One", frozenset({Everything}))
    assert (entry.timeout, entry.queue, entry.priority) == (1.5, "q", -3)
    assert TABLE.entry(Unit).timeout == 0
    with pytest.raises(KeyError):
        TABLE.entry(Kit)


# --- leases -------------------------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.lists(st.integers(0, 7), max_size=4, unique=True), st.floats(0, 9)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("renew"), st.lists(st.integers(0, 30), max_size=4), st.floats(0, 9)),
        st.tuples(st.just("due"), st.floats(0, 9)),
    ),
    max_size=30,
)


@given(ACTIONS)
def test_the_lease_table_is_a_dict_by_task(actions: list[tuple[Any, ...]]) -> None:
    table, model = Leases(), reference.LeaseTable()
    ids = [uuid4() for _ in range(8)]
    known: list[tuple[Lease, reference.Held]] = []  # all that ever were

    def pairs(leases: list[Lease]) -> list[tuple[UUID, UUID]]:
        return [(lease.id, lease.token) for lease in leases]

    def model_pairs(held: list[reference.Held]) -> list[tuple[UUID, UUID]]:
        return [(one.id, one.token) for one in held]

    for action, *arguments in actions:
        match action:
            case "claim":
                numbers, sent = arguments
                token = uuid4()
                rows = [(ids[number], f'"{number}"', number, 1, None) for number in numbers]
                leases, displaced = table.claimed(rows, token, sent)
                held, model_displaced = model.claimed((ids[number] for number in numbers), token, sent)
                assert pairs(leases) == model_pairs(held)
                assert [lease.tried for lease in leases] == numbers
                assert pairs(displaced) == model_pairs(model_displaced)
                known += zip(leases, held, strict=True)
            case "remove" if known:
                lease, one = known[arguments[0] % len(known)]
                table.remove(lease)
                model.remove(one)
            case "renew" if known:
                chosen = [known[number % len(known)] for number in arguments[0]]
                table.renewed([lease for lease, _ in chosen], arguments[1])
                for _, one in chosen:
                    one.renewed = arguments[1]
            case "due":
                assert pairs(table.due(arguments[0])) == model_pairs(model.due(arguments[0]))
        assert len(table) == len(model.by_id)
        for id in ids:
            mine, other = table.get(id), model.by_id.get(id)
            assert (mine is None) == (other is None)
            assert mine is None or other is None or (mine, other) in known
        assert pairs(table.open()) == model_pairs(list(model.by_id.values()))
    assert table.due(float("inf")) == table.open()


def test_a_new_lease_waits_for_its_turn_and_is_not_decoded() -> None:
    id, token = uuid4(), uuid4()
    ((lease,), _) = Leases().claimed([(id, '{"Kit":{"Unit":null}}', 2, 3, 700)], token, 5.0)
    assert (lease.id, lease.token, lease.tried, lease.claims, lease.size) == (id, token, 2, 3, 700)
    assert lease.entry is None
    assert lease.is_open
    assert lease.label == "(not decoded)"
    assert str(id) in repr(lease)
    assert '"Kit"' not in repr(lease)  # payloads are never logged


# --- outcomes -----------------------------------------------------------------------------------------------------

TEXTS = st.none() | st.text(max_size=5)
OUTCOMES = st.lists(
    st.one_of(
        st.tuples(st.just("done")),
        st.tuples(st.just("kept"), st.text(max_size=5)),
        st.tuples(
            st.just("moved"),
            TEXTS,
            st.none() | st.integers(0, 9),
            TEXTS,
            st.floats(0, 9),
            TEXTS,
            st.none() | st.integers(-9, 9),
            st.none() | st.integers(1, 9),
        ),
    ),
    max_size=12,
)


POOL = [UUID(int=number) for number in range(8)]  # a task that was lost and claimed again may have two outcomes


def filled(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> tuple[Outcomes, list[reference.Entry]]:
    buffer = Outcomes()
    entries = []
    for (kind, *columns), id in zip(outcomes, ids, strict=False):
        ((lease,), _) = Leases().claimed([(id, "", 0, 1, None)], uuid4(), 0.0)
        match kind:
            case "done":
                buffer.add_done(lease)
                entries.append(reference.Entry("done", lease.id, lease.token))
            case "kept":
                buffer.add_kept(lease, *columns)
                entries.append(reference.Entry("kept", lease.id, lease.token, *columns))
            case "moved":
                buffer.add_moved(lease, *columns)
                entries.append(reference.Entry("moved", lease.id, lease.token, *columns))
    entries.sort(key=lambda entry: ["done", "kept", "moved"].index(entry.kind))
    return buffer, entries


def leases_of(buffer: Outcomes) -> list[Lease]:
    return buffer.done + buffer.kept + buffer.moved


IDS = st.lists(st.sampled_from(POOL), min_size=12, max_size=12)


@given(OUTCOMES, IDS)
def test_the_buffer_holds_what_was_added(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    assert buffer.parameters() == reference.parameters(entries)
    assert len(buffer) == len(entries)
    assert [lease.id for lease in leases_of(buffer)] == buffer.ids() == [entry.id for entry in entries]
    assert [lease.token for lease in leases_of(buffer)] == [entry.token for entry in entries]


@given(OUTCOMES, IDS)
def test_halves_hold_each_outcome_once(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    before = buffer.parameters()
    first, second = buffer.halves()
    tokens = {lease.token for lease in leases_of(first)}
    assert first.parameters() == reference.parameters(entry for entry in entries if entry.token in tokens)
    assert second.parameters() == reference.parameters(entry for entry in entries if entry.token not in tokens)
    assert {*leases_of(first), *leases_of(second)} == set(leases_of(buffer))
    assert buffer.parameters() == before
    if len(entries) > 1:
        assert len(first) < len(buffer) > len(second)  # so that bisecting ends


@given(OUTCOMES, IDS, st.sets(st.sampled_from(POOL)))
def test_a_buffer_is_divided_by_task(outcomes: list[tuple[Any, ...]], ids: list[UUID], chosen: set[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    first, second = buffer.divide(chosen)
    among = [entry for entry in entries if entry.id in chosen]
    others = [entry for entry in entries if entry.id not in chosen]
    assert (first.parameters(), second.parameters()) == (reference.parameters(among), reference.parameters(others))
    first.extend(second, set(), among=False)
    assert sorted(first.ids()) == sorted(buffer.ids())
    assert first.notify == buffer.notify


# --- COPY ---------------------------------------------------------------------------------------------------------


def rows_of(data: bytes) -> list[tuple[int, str, str, int]]:
    """Read COPY's binary format as the manual of Postgres describes it."""
    stream = io.BytesIO(data)
    assert stream.read(19) == b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
    rows = []
    while (columns := struct.unpack("!h", stream.read(2))[0]) != -1:
        assert columns == 4
        values = []
        for _ in range(columns):
            (length,) = struct.unpack("!i", stream.read(4))
            values.append(stream.read(length))
            assert len(values[-1]) == length
        assert len(values[0]) == 16
        rows.append(
            (
                int.from_bytes(values[0], "big"),
                values[1].decode(),
                values[2].decode(),
                struct.unpack("!h", values[3])[0],
            )
        )
    assert stream.read() == b""
    return rows


@given(
    st.lists(st.tuples(STEPS, st.text(max_size=3), st.integers(-32768, 32767), st.booleans()), max_size=6),
    st.integers(0, 2**128 - 10),
)
def test_copy_rows_are_postgres_binary_format(steps: list[tuple[Task, str, int, bool]], first: int) -> None:
    rows = CopyRows(first)
    data = b""
    for step, queue, priority, take in steps:
        size = rows.add(codec(type(step)), codec(type(step)).payload(step), queue.encode(), priority)
        if take:
            taken = rows.take()
            assert len(taken) == size
            data += taken
    data += rows.take() + CopyRows.TRAILER
    assert rows.count == len(steps)
    assert rows.take() == b""
    assert rows_of(data) == [
        (first + number, codec(type(step)).encode(step), queue, priority)
        for number, (step, queue, priority, _) in enumerate(steps)
    ]


# --- types --------------------------------------------------------------------------------------------------------


def test_the_stub_names_only_what_there_is() -> None:
    stub = ast.parse(Path(_fastpath.__file__).with_name("_fastpath.pyi").read_text())
    for thing in stub.body:
        if isinstance(thing, ast.ClassDef):
            for member in thing.body:
                target: Any = member.target if isinstance(member, ast.AnnAssign) else member
                name = target.id if isinstance(target, ast.Name) else target.name
                assert hasattr(getattr(_fastpath, thing.name), name), f"{thing.name}.{name}"
        elif isinstance(thing, ast.FunctionDef):
            assert callable(getattr(_fastpath, thing.name))


# --- marks --------------------------------------------------------------------------------------------------------


def test_what_executes_is_marked_in_memory_that_outlives_the_process() -> None:
    """A step that has the loop, is suspended, or has a thread; not one that waits for its turn, or has ended."""
    memory = mmap.mmap(-1, Marks.size(3))
    seen: dict[str, list[bytes]] = {}

    class Family(Task): ...

    class Ends(Family):
        async def run(self, ctx: Context) -> Done:
            seen["ends"] = Marks(memory).executing()
            return Done()

    class Fails(Family):
        async def run(self, ctx: Context) -> Done:
            raise ValueError

    class Suspends(Family):
        async def run(self, ctx: Context) -> Done:
            await go.wait()
            seen["suspends"] = Marks(memory).executing()
            return Done()

    class InThread(Family):
        def run(self, ctx: Context) -> Done:
            return Done()

    class Threads(Dispatcher):
        def start_thread(self, lease: Lease, run: Any, context: Context) -> None:
            started.append(lease)

    app = App(Family)
    started: list[Lease] = []
    go = asyncio.Event()

    async def main() -> None:
        leases = Leases()
        dispatch = Threads(
            *(asyncio.get_running_loop(), Table(app), leases),
            concurrency=3,
            max_step_bytes=1000,
            marks=Marks(memory),
        )
        kinds = ("Ends", "Fails", "Suspends", "InThread", "Suspends", "Ends")
        ids = [UUID(int=number) for number in range(len(kinds))]
        rows = [(id, f'{{"Family":{{"{kind}":null}}}}', 0, 1, None) for id, kind in zip(ids, kinds, strict=True)]
        dispatch.admit(leases.claimed(rows, uuid4(), 0.0)[0])
        while dispatch.suspended < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert seen["ends"] == [ids[0].bytes]
        assert Marks(memory).executing() == [ids[2].bytes, ids[3].bytes, ids[4].bytes]  # the last one waits for a slot
        dispatch.end(started[0], Done(), None)
        go.set()
        while len(dispatch.outcomes) < len(kinds):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert seen["suspends"][-1] == ids[4].bytes
        assert Marks(memory).executing() == []
        assert Marks(memory).charged() == [ids[4].bytes]  # it ended last: what it has left behind may do harm

    asyncio.run(main())
