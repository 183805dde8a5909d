"""What a sampler, a processor or an exporter of the user's raises harms neither an enqueue nor a step of a workflow."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from pgtask import _traces


class BrokenSpan(trace.NonRecordingSpan):
    """One that can be begun, and no more."""

    def __init__(self) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)

    def set_attribute(self, *_: Any) -> None:
        raise OSError("set_attribute")

    def record_exception(self, *_: Any, **__: Any) -> None:
        raise OSError("record_exception")

    def end(self, *_: Any) -> None:
        raise OSError("end")


class BrokenTracer:
    def __init__(self, *, begins: bool) -> None:
        self._begins = begins

    def start_span(self, *_: Any, **__: Any) -> Any:
        if not self._begins:
            raise OSError("start_span")
        return BrokenSpan()


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", ["sending", "checkpointing"])
def test_broken_span_harms_nothing(name: str, begins: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(_traces, "find_tracer", lambda: BrokenTracer(begins=begins))
    recording = type("Recording", (trace.NonRecordingSpan,), {"is_recording": lambda self: True})
    with trace.use_span(recording(trace.INVALID_SPAN_CONTEXT)):
        with begin(name):
            pass
        with pytest.raises(ValueError, match="ours"), begin(name):
            raise ValueError("ours")
    assert "trace.failed" in caplog.text


def begin(name: str) -> Any:
    return _traces.sending("q", "A.B") if name == "sending" else _traces.checkpointing("x")


@pytest.mark.parametrize(("characters", "is_kept"), [(400, True), (600, False)])
def test_state_of_a_trace_that_is_long_is_dropped(characters: int, is_kept: bool) -> None:
    """It comes from the header of a request, and would be in each row."""
    state = TraceState([(f"k{number}", "v" * 100) for number in range(characters // 100)])
    context = SpanContext(1, 2, False, TraceFlags(TraceFlags.SAMPLED), state)
    text = _traces.written(trace.NonRecordingSpan(context))
    assert text is not None
    assert text.startswith("00-")
    assert ("k0=" in text) == is_kept
