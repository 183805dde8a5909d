"""Envelope, codec and table, compared with the oracle."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from step_kit import (
    APP,
    ORACLE,
    STEPS,
    TABLE,
    Bare,
    BareKeyword,
    BarePlace,
    BareText,
    Everything,
    Kit,
    One,
    Place,
    Point,
    Renamed,
    Row,
    Unit,
    Über,
    codec,
)

from pgtask import Policy, Task
from pgtask._fastpath import StepEntry, scan_envelope
from pgtask.errors import DecodeError, UnknownStepError


def result(function: Any, *arguments: Any) -> Any:
    """Return the result of a call, or the class of pgtask's error. Messages may differ; other errors must not occur."""
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
    """Write a value as JSON, with white space wherever JSON allows it, and needless escapes."""
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
    """Draw an envelope after an accident or two: cut, or with characters lost, added or changed."""
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
    """Return the scan of a text, and check the payload and the names, which `scan_envelope` leaves to its callers."""
    try:
        task, step, payload = scan_envelope(text)
        reference.parse(payload.decode())
        if any(character < " " for character in task + step) and "\\" not in text:
            return DecodeError  # a raw control character in a name: the table does not know such a name
    except DecodeError:
        return DecodeError
    return task, step, payload


@given(envelopes())
def test_envelope_scan_matches_oracle(text: str) -> None:
    assert scanned(text) == reference.scan_envelope(text)


@given(ANY_TEXT)
def test_scan_of_any_text_matches_oracle(text: str) -> None:
    expected = result(reference.scan_envelope, text)
    found = scanned(text)
    if found != expected:
        # A name given twice: JSON allows a reader to refuse it, and to take the last one.
        assert expected is DecodeError
        assert isinstance(reference.parse(text), reference.Members)
        assert json_last(text) == found


def json_last(text: str) -> Any:
    """Scan an envelope so that the last of several members of one name counts."""
    outer = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    ((task, rest),) = outer.items()
    ((step, payload),) = msgspec.json.decode(rest, type=dict[str, msgspec.Raw]).items()
    return task, step, bytes(payload)


@given(ANY_TEXT)
def test_table_decodes_any_text_as_oracle(text: str) -> None:
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
def test_text_without_envelope_is_decode_error(text: str) -> None:
    assert result(TABLE.decode, text) is result(ORACLE.decode, text) is DecodeError


@pytest.mark.parametrize("depth", [100, 20_000])
@pytest.mark.parametrize(
    "bomb",
    ["[%s]", '{"Kit":%s}', '{"Kit":{"BareText":%s}}', '{"Kit":{"Unknown":[%s]}}', '{"Kit":{"One":{"filename":[%s]}}}'],
)
def test_deeply_nested_text_is_refused(bomb: str, depth: int) -> None:
    before, after = bomb.split("%s")
    for inner in (before * depth + after * depth, before + "[" * depth + "]" * depth + after, before * depth):
        assert result(TABLE.decode, inner) in (DecodeError, UnknownStepError)


def test_escaped_names_are_found() -> None:
    entry, step = TABLE.decode('{"\\u004bit" : {"\\u004f\\u006ee":{"filename":"\\u0041"}}}')
    assert (entry.codec.cls, step) == (One, One("A"))


def test_unknown_step_is_named() -> None:
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


@given(STEPS)
def test_encoded_step_decodes_to_the_same_step(step: Task) -> None:
    mine = codec(type(step))
    text = mine.encode(step)
    assert mine.decode(mine.payload(step)) == step
    assert text.encode() == mine.prefix + mine.payload(step) + b"}}"
    entry, again = TABLE.decode(text)
    assert (entry, again) == (TABLE.entry(type(step)), step)
    # The oracle reads and writes the same JSON.
    assert ORACLE.decode(text) == (APP.steps[type(step)], step)
    assert unordered(text) == unordered(reference.encode(APP.steps[type(step)], step))


def unordered(text: str) -> Any:
    """Parse JSON, and sort the list that stands for a set."""
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
def test_stored_form_is_that_of_serde(step: Task, text: str) -> None:
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
def test_alternative_forms_are_decoded(text: str, step: Task) -> None:
    assert TABLE.decode(text)[1] == step == ORACLE.decode(text)[1]


def test_transparent_step_may_have_keyword_only_field() -> None:
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
def test_undecodable_row_names_the_reason(text: str, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        TABLE.decode(text)
    assert str(caught.value).startswith(message)
    assert result(ORACLE.decode, text) is DecodeError


def test_unencodable_step_raises() -> None:
    for step in (One(object()), One("\ud800"), Bare(2**70), Row(1, lambda: 0)):  # type: ignore[arg-type]
        try:
            payload = codec(type(step)).payload(step)
        except (TypeError, UnicodeEncodeError, OverflowError):
            continue
        assert codec(type(step)).decode(payload) == step


def test_step_entry_holds_the_definition() -> None:
    entry = StepEntry(
        msgspec.structs.replace(
            APP.steps[One], policy=Policy(timeout=timedelta(milliseconds=1500), queue="q", priority=-3)
        )
    )
    assert (entry.codec.cls, entry.codec.label, entry.edges) == (One, "Kit.One", frozenset({Everything}))
    assert (entry.timeout, entry.queue, entry.priority) == (1.5, "q", -3)
    assert TABLE.entry(Unit).timeout == 0
    with pytest.raises(KeyError):
        TABLE.entry(Kit)
