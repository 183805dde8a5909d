"""The text that a failed step leaves in its row: complete enough for a repair, and always fit for Postgres."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgtask
from pgtask import EnqueueError, PgtaskError, Policy
from pgtask._error_text import MAX_BYTES, describe, sanitise, summary
from pgtask._traceback import MAX_TEXT, traceback_of
from pgtask.errors import DecodeError, OutcomeError, StepTimeout


def raised(function: Callable[[], Any]) -> BaseException:
    """Return the exception of a call, as the engine gets it."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def lines(error: BaseException) -> list[str]:
    """Return the lines of an error's text, without the places."""
    return [re.sub(r" \(at .* in \w+\)$", "", line) for line in describe(error).split("\n")]


def fit(text: str) -> bool:
    """Tell if Postgres can store the text, and the row stays small."""
    return "\0" not in text and len(text.encode()) <= MAX_BYTES


# --- content --------------------------------------------------------------------------------------------------------


def test_error_is_described_with_its_place() -> None:
    def fails() -> None:
        raise ValueError("wrong colour")

    error = raised(fails)
    where = f"{__file__}:{fails.__code__.co_firstlineno + 1} in fails"
    assert describe(error) == f"ValueError: wrong colour (at {where})"


def test_place_is_where_error_was_raised() -> None:
    def outer() -> None:
        int("x" * 3)

    def outermost() -> None:
        outer()

    assert describe(raised(outermost)).endswith(" in outer)")


def test_place_is_on_first_line_of_message() -> None:
    def fails() -> None:
        raise ValueError("wrong colour\nof the sky")

    where = f"{__file__}:{fails.__code__.co_firstlineno + 1} in fails"
    assert describe(raised(fails)) == f"ValueError: wrong colour (at {where})\nof the sky"


def test_summary_keeps_place_and_causes() -> None:
    def fails() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("outer\nsecond line\nthird") from error

    said = re.sub(r"/\S+:\d+", "FILE", summary(describe(raised(fails))))
    assert said == "ValueError: outer (at FILE in fails); caused by KeyError: 'first' (at FILE in fails)"
    assert summary("a reason\nof two lines") == "a reason"
    assert len(summary("\n".join(["caused by " + "x" * 1000] * 100))) <= 600


def test_error_never_raised_has_no_place() -> None:
    assert describe(KeyError("key")) == "KeyError: 'key'"


class Strange(Exception):
    class Inner(Exception):
        pass


def test_error_of_other_module_is_qualified() -> None:
    assert describe(Strange("odd")) == "test_error_text.Strange: odd"
    assert describe(Strange.Inner()) == "test_error_text.Strange.Inner"


def test_place_of_error_in_compiled_code_is_in_user_code() -> None:
    code = compile("def inside(): raise ValueError('deep')", "library/protocol/protocol.pyx", "exec")
    space: dict[str, Any] = {}
    exec(code, space)

    def fails() -> None:
        space["inside"]()

    assert describe(raised(fails)).endswith(" in fails)")


def test_chain_of_causes_begins_with_outermost() -> None:
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


def test_error_while_handling_another_shows_both() -> None:
    def fails() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    assert lines(raised(fails)) == ["ValueError: second", "while handling KeyError: 'first'"]


def test_suppressed_context_is_left_out() -> None:
    def fails() -> None:
        try:
            raise KeyError("secret")
        except KeyError:
            raise ValueError("second") from None

    assert lines(raised(fails)) == ["ValueError: second"]


def test_cause_precedes_context() -> None:
    def fails() -> None:
        try:
            raise KeyError("context")
        except KeyError:
            raise ValueError("second") from OSError("cause")

    assert lines(raised(fails)) == ["ValueError: second", "caused by OSError: cause"]


def test_group_shows_members_and_their_causes() -> None:
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


def test_reason_given_as_text_is_unchanged() -> None:
    assert describe("no such customer: Zoë ☃ 😀\nsecond line") == "no such customer: Zoë ☃ 😀\nsecond line"


@pytest.mark.parametrize(
    "error", [OutcomeError("returned None"), StepTimeout("ran long"), DecodeError("A.B cannot be decoded: wrong")]
)
def test_error_of_engine_is_its_message_alone(error: PgtaskError) -> None:
    def fails() -> None:
        raise error

    assert describe(raised(fails)).endswith(str(error))
    assert "_fastpath" not in describe(error)


def test_engine_error_in_user_code_keeps_its_chain() -> None:
    def fails() -> None:
        try:
            raise KeyError("customer")
        except KeyError as error:
            raise EnqueueError("Greeter.SayHello cannot be stored") from error

    text = describe(raised(fails))
    assert "Greeter.SayHello cannot be stored" in text
    assert "caused by KeyError: 'customer'" in text


# --- fit for Postgres -----------------------------------------------------------------------------------------------


def test_characters_that_postgres_refuses_are_replaced() -> None:
    assert sanitise("a\0b") == "a␀b"
    assert sanitise("a\ud800b\udfff") == "a?b?"
    assert describe(ValueError("a\0b\udcff")) == "ValueError: a␀b?"


def test_long_text_keeps_head_and_tail() -> None:
    for character in "a", "é", "☃", "😀", "\0", "\ud800":
        text = sanitise("head " + character * 20_000 + " tail")
        assert fit(text)
        assert text.startswith("head ")
        assert text.endswith(" tail")
        assert "\n[...]\n" in text
        assert len(text.encode()) > MAX_BYTES - 20  # the cut leaves as much as possible


@pytest.mark.parametrize("size", range(MAX_BYTES - 2, MAX_BYTES + 3))
def test_the_cap_counts_bytes(size: int) -> None:
    for text in ("a" * size, "é" * (size // 2) + "a" * (size % 2)):
        assert (sanitise(text) == text) == (size <= MAX_BYTES)
        assert fit(sanitise(text))


@pytest.mark.parametrize("base", [Exception, PgtaskError])
@pytest.mark.parametrize("stop", [ValueError, SystemExit, GeneratorExit, RecursionError])
def test_error_with_failing_str_is_still_named(stop: type[BaseException], base: type[Exception]) -> None:
    class Silent(base):  # type: ignore[misc,valid-type]
        def __str__(self) -> str:
            raise stop("no text")

    text = describe(Silent())
    assert "Silent: " in text
    assert stop.__name__ in text


def test_str_that_returns_no_text_is_survived() -> None:
    class Wrong(Exception):
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    assert "Wrong: " in describe(Wrong())


def test_cycle_of_causes_ends() -> None:
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


def test_endless_chain_is_cut() -> None:
    error: Exception = ValueError("0")
    for number in range(1, 100_000):
        outer = ValueError(str(number))
        outer.__context__ = error
        error = outer
    told = lines(error)
    assert told[0] == "ValueError: 99999"
    assert len(told) <= 30


def test_deep_and_wide_groups_are_cut() -> None:
    deep: Exception = ValueError("innermost")
    for _ in range(500):
        deep = ExceptionGroup("deep", [deep])
    wide = ExceptionGroup("wide", [ValueError(str(number)) for number in range(5_000)])
    for error in (deep, wide):
        text = describe(error)
        assert fit(text)
        assert text.count("\n") <= 30


def test_undecodable_file_name_is_survived() -> None:
    code = compile("def fails():\n    raise ValueError('x')", "/tmp/\udcff.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    assert describe(raised(names["fails"])) == "ValueError: x (at /tmp/?.py:2 in fails)"


ANY_TEXT = st.text(st.characters(codec=None)) | st.text("\0\ud800a☃\n", max_size=20).map(lambda text: text * 2_000)
CLASSES = st.sampled_from([ValueError, KeyError, OSError, Strange, PgtaskError, SystemExit, StopIteration])


@st.composite
def errors(draw: st.DrawFn) -> BaseException:
    """Generate exceptions, chained and grouped in any way, cycles included."""
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
def test_description_of_any_error_can_be_stored(error: BaseException) -> None:
    assert fit(describe(error))


@given(errors())
def test_traceback_of_any_error_is_bounded(error: BaseException) -> None:
    assert len(traceback_of(error)) <= 2 * MAX_TEXT


def test_traceback_keeps_engine_frames_only_without_others() -> None:
    def fails() -> None:
        Policy(retry_limit=-1)

    assert "policy.py" not in traceback_of(raised(fails))
    assert " in fails\n" in traceback_of(raised(fails))
    space: dict[str, Any] = {}
    exec(compile("def inside(): raise ValueError('deep')", f"{Path(pgtask.__file__).parent}/_x.py", "exec"), space)
    error = raised(space["inside"])
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # without the frame of this test
    assert "_x.py" in traceback_of(error)
    assert traceback_of(OutcomeError("never raised")) == ""


def test_traceback_of_group_has_its_members() -> None:
    def fails() -> None:
        raise BaseExceptionGroup("two", [raised(lambda: int("x")), raised(lambda: int("y"))])

    text = traceback_of(raised(fails))
    assert "ExceptionGroup: two (2 sub-exceptions)" in text
    assert "  | ValueError: invalid literal for int() with base 10: 'x'" in text
    assert text.count("  | Traceback (most recent call last):") == 2


def test_deep_recursion_has_short_traceback() -> None:
    def fails(depth: int = 500) -> int:
        return fails(depth - 1) if depth else 1 // 0

    assert traceback_of(raised(fails)).count("File ") < 20


@given(ANY_TEXT)
def test_any_text_can_be_stored(text: str) -> None:
    safe = sanitise(text)
    assert fit(safe)
    assert sanitise(safe) == safe
    if fit(text.encode("utf-8", "ignore").decode()) and text.isprintable():
        assert safe == text


@pytest.mark.parametrize("reason", ["", " \n"])
def test_empty_reason_is_replaced(reason: str) -> None:
    assert describe(reason) == "failed without a reason"
