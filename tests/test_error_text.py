"""The text a failed step leaves in its row: complete enough to repair from, and always fit to be stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtask import DecodeError, EnqueueError, OutcomeError, PgtaskError, StepTimeout
from pgtask._worker.error_text import MOST_BYTES, describe, sanitise


def raised(function: Callable[[], Any]) -> BaseException:
    """The exception that a call ends with, as the engine gets it."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def lines(error: BaseException) -> list[str]:
    """The text of an error by lines, without the places."""
    return [re.sub(r" \(at .* in \w+\)$", "", line) for line in describe(error).split("\n")]


def fit(text: str) -> bool:
    """Whether Postgres can store it, and the row stays small."""
    return "\0" not in text and len(text.encode()) <= MOST_BYTES


# --- what is said -------------------------------------------------------------------------------------------------


def test_an_error_is_named_with_its_place() -> None:
    def fails() -> None:
        raise ValueError("wrong colour")

    error = raised(fails)
    where = f"{__file__}:{fails.__code__.co_firstlineno + 1} in fails"
    assert describe(error) == f"ValueError: wrong colour (at {where})"


def test_the_place_is_where_it_was_raised_and_not_where_it_passed() -> None:
    def outer() -> None:
        int("x" * 3)

    def outermost() -> None:
        outer()

    assert describe(raised(outermost)).endswith(" in outer)")


def test_an_error_that_was_never_raised_has_no_place() -> None:
    assert describe(KeyError("key")) == "KeyError: 'key'"


class Strange(Exception):
    class Inner(Exception):
        pass


def test_an_error_of_another_module_is_named_with_it() -> None:
    assert describe(Strange("odd")) == "test_error_text.Strange: odd"
    assert describe(Strange.Inner()) == "test_error_text.Strange.Inner"


def test_the_place_is_in_the_code_of_the_user_also_when_compiled_code_raised() -> None:
    code = compile("def inside(): raise ValueError('deep')", "library/protocol/protocol.pyx", "exec")
    space: dict[str, Any] = {}
    exec(code, space)

    def fails() -> None:
        space["inside"]()

    assert describe(raised(fails)).endswith(" in fails)")


def test_the_chain_of_causes_is_told_outermost_first() -> None:
    def fails() -> None:
        try:
            try:
                raise KeyError("innermost")
            except KeyError as error:
                raise ValueError("middle") from error
        except ValueError as error:
            raise RuntimeError("outermost") from error

    error = raised(fails)
    assert lines(error) == [
        "RuntimeError: outermost",
        "caused by ValueError: middle",
        "caused by KeyError: 'innermost'",
    ]
    assert describe(error).count(" in fails)") == 3


def test_an_error_while_handling_another_tells_both() -> None:
    def fails() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    assert lines(raised(fails)) == ["ValueError: second", "while handling KeyError: 'first'"]


def test_a_context_that_was_suppressed_is_not_told() -> None:
    def fails() -> None:
        try:
            raise KeyError("secret")
        except KeyError:
            raise ValueError("second") from None

    assert lines(raised(fails)) == ["ValueError: second"]


def test_a_cause_goes_before_the_context() -> None:
    def fails() -> None:
        try:
            raise KeyError("context")
        except KeyError:
            raise ValueError("second") from OSError("cause")

    assert lines(raised(fails)) == ["ValueError: second", "caused by OSError: cause"]


def test_a_group_tells_its_members_and_their_causes() -> None:
    def fails() -> None:
        inner = ValueError("one")
        inner.__cause__ = OSError("disk")
        raise ExceptionGroup("two things", [inner, ExceptionGroup("nested", [KeyError("deep")])]) from TypeError("why")

    told = lines(raised(fails))
    assert told[0] == "ExceptionGroup: two things (2 sub-exceptions)"
    assert [line.strip() for line in told[1:]] == [
        "| ValueError: one",
        "caused by OSError: disk",
        "| ExceptionGroup: nested (1 sub-exception)",
        "| KeyError: 'deep'",
        "caused by TypeError: why",
    ]


def test_a_reason_given_as_text_stays_as_it_is() -> None:
    assert describe("no such customer: Zoë ☃ 😀\nsecond line") == "no such customer: Zoë ☃ 😀\nsecond line"


@pytest.mark.parametrize(
    "error", [OutcomeError("returned None"), StepTimeout("ran long"), DecodeError("A.B cannot be decoded: wrong")]
)
def test_an_error_of_the_engine_is_its_message_alone(error: PgtaskError) -> None:
    def fails() -> None:
        raise error

    assert describe(raised(fails)).endswith(str(error))
    assert "_fastpath" not in describe(error)


def test_an_error_of_ours_that_user_code_met_keeps_its_chain() -> None:
    def fails() -> None:
        try:
            raise KeyError("customer")
        except KeyError as error:
            raise EnqueueError("Greeter.SayHello cannot be stored") from error

    text = describe(raised(fails))
    assert "Greeter.SayHello cannot be stored" in text
    assert "caused by KeyError: 'customer'" in text


# --- that it can be stored ----------------------------------------------------------------------------------------


def test_what_postgres_cannot_store_is_replaced() -> None:
    assert sanitise("a\0b") == "a␀b"
    assert sanitise("a\ud800b\udfff") == "a?b?"
    assert describe(ValueError("a\0b\udcff")) == "ValueError: a␀b?"


def test_a_long_text_keeps_head_and_tail() -> None:
    for character in "a", "é", "☃", "😀", "\0", "\ud800":
        text = sanitise("head " + character * 20_000 + " tail")
        assert fit(text)
        assert text.startswith("head ")
        assert text.endswith(" tail")
        assert "\n[...]\n" in text
        assert len(text.encode()) > MOST_BYTES - 20  # it is not cut more than it must be


@pytest.mark.parametrize("size", range(MOST_BYTES - 2, MOST_BYTES + 3))
def test_the_cap_counts_bytes(size: int) -> None:
    for text in ("a" * size, "é" * (size // 2) + "a" * (size % 2)):
        assert (sanitise(text) == text) == (size <= MOST_BYTES)
        assert fit(sanitise(text))


@pytest.mark.parametrize("base", [Exception, PgtaskError])
@pytest.mark.parametrize("stop", [ValueError, SystemExit, GeneratorExit, RecursionError])
def test_an_error_whose_text_cannot_be_had_is_still_named(stop: type[BaseException], base: type[Exception]) -> None:
    class Silent(base):  # type: ignore[misc,valid-type]
        def __str__(self) -> str:
            raise stop("no text")

    text = describe(Silent())
    assert "Silent: " in text
    assert stop.__name__ in text


def test_a_text_that_is_no_text_is_survived() -> None:
    class Wrong(Exception):
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    assert "Wrong: " in describe(Wrong())


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert lines(first) == ["ValueError: first", "caused by KeyError: 'second'"]
    itself = ValueError("itself")
    itself.__cause__ = itself
    assert lines(itself) == ["ValueError: itself"]
    members: list[Exception] = [KeyError("member")]
    group = ExceptionGroup("group", members)
    members[0].__cause__ = group
    assert lines(group) == ["ExceptionGroup: group (1 sub-exception)", "  | KeyError: 'member'"]


def test_a_chain_without_end_is_cut() -> None:
    error: Exception = ValueError("0")
    for number in range(1, 100_000):
        outer = ValueError(str(number))
        outer.__context__ = error
        error = outer
    told = lines(error)
    assert told[0] == "ValueError: 99999"
    assert len(told) <= 30


def test_a_deep_and_a_wide_group_are_cut() -> None:
    deep: Exception = ValueError("innermost")
    for _ in range(500):
        deep = ExceptionGroup("deep", [deep])
    wide = ExceptionGroup("wide", [ValueError(str(number)) for number in range(5_000)])
    for error in (deep, wide):
        text = describe(error)
        assert fit(text)
        assert text.count("\n") <= 30


def test_a_file_with_a_name_that_is_no_text_is_survived() -> None:
    code = compile("def fails():\n    raise ValueError('x')", "/tmp/\udcff.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    assert describe(raised(names["fails"])) == "ValueError: x (at /tmp/?.py:2 in fails)"


ANY_TEXT = st.text(st.characters(codec=None)) | st.text("\0\ud800a☃\n", max_size=20).map(lambda text: text * 2_000)
CLASSES = st.sampled_from([ValueError, KeyError, OSError, Strange, PgtaskError, SystemExit, StopIteration])


@st.composite
def errors(draw: st.DrawFn) -> BaseException:
    """Exceptions chained and grouped in any way, circles too."""
    made: list[BaseException] = [draw(CLASSES)(draw(ANY_TEXT))]
    for _ in range(draw(st.integers(0, 6))):
        parts = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))
        error = draw(CLASSES)(draw(ANY_TEXT)) if draw(st.booleans()) else BaseExceptionGroup(draw(ANY_TEXT), parts)
        if draw(st.booleans()):
            error = raised(lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]
        made.append(error)
    for _ in range(draw(st.integers(0, 8))):
        link, other = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        if draw(st.booleans()):
            link.__cause__ = other
        else:
            link.__context__ = other
    return made[-1]


@given(errors())
def test_the_text_of_any_error_can_be_stored(error: BaseException) -> None:
    assert fit(describe(error))


@given(ANY_TEXT)
def test_any_text_can_be_stored(text: str) -> None:
    safe = sanitise(text)
    assert fit(safe)
    assert sanitise(safe) == safe
    if fit(text.encode("utf-8", "ignore").decode()) and text.isprintable():
        assert safe == text


@pytest.mark.parametrize("reason", ["", " \n"])
def test_a_reason_without_words_is_given_some(reason: str) -> None:
    assert describe(reason) == "failed without a reason"
