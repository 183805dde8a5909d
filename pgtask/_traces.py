"""OpenTelemetry in a producer: its spans, and the trace context that a row carries to a worker.

Invariants: a process traces once it has set a tracer provider of OpenTelemetry; before that nothing of OpenTelemetry is
imported, and no statement names the column `trace`. Only a span that is sampled is written into a row.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

from pgtask._log import EventLog

__all__ = [
    "adopt_environment",
    "checkpointing",
    "current_span",
    "find_tracer",
    "guarded",
    "operation",
    "sending",
    "trace_to_write",
    "written",
]

log = EventLog("pgtask.traces")

MAX_STATE = 512  # characters of a tracestate, which comes from the header of a request; W3C lets us drop it
_API = "opentelemetry.trace"
_OFF: AbstractContextManager[None] = nullcontext()
_SAMPLED = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][13579bdf]")
_outer: str | None = None  # the trace of the program's environment, as a row has it


def find_tracer() -> Any:
    """Return the tracer of pgtask, or None if this process does not trace."""
    read_provider = getattr(sys.modules.get(_API), "get_tracer_provider", None)
    return None if read_provider is None else _tracer_of(read_provider())


@lru_cache(maxsize=2)
def _tracer_of(provider: Any) -> Any:
    return None if isinstance(provider, sys.modules[_API].ProxyTracerProvider) else provider.get_tracer("pgtask")


def operation(name: str, queue: str, step: str | None) -> dict[str, Any]:
    """Return the attributes of a span, by the conventions of OpenTelemetry for messaging. Without a step there are
    several."""
    attributes = {
        "messaging.system": "pgtask",
        "messaging.operation.name": name,
        "messaging.operation.type": name,
        "messaging.destination.name": queue,
    }
    return attributes if step is None else attributes | {"pgtask.step": step}


def sending(queue: str, step: str | None) -> AbstractContextManager[Any]:
    """Make a span of a producer the current one, if this process traces: it is the parent of what is enqueued inside.
    Yields the span, or None."""
    tracer = find_tracer()
    return _OFF if tracer is None else _send(tracer, queue, step)


@contextmanager
def _send(tracer: Any, queue: str, step: str | None) -> Iterator[Any]:
    kind = sys.modules[_API].SpanKind.PRODUCER
    with current_span(tracer, f"send {queue}", kind=kind, attributes=operation("send", queue, step)) as span:
        yield span


def checkpointing(name: str) -> AbstractContextManager[Any]:
    """Make a span of a step of a workflow the current one, below that of the try that runs it, if that is traced."""
    tracer = find_tracer()
    if tracer is None or not sys.modules[_API].get_current_span().is_recording():
        return _OFF
    return _checkpoint(tracer, name)


@contextmanager
def _checkpoint(tracer: Any, name: str) -> Iterator[Any]:
    attributes = {"messaging.system": "pgtask", "pgtask.checkpoint": name}
    with current_span(tracer, name, attributes=attributes) as span:
        yield span


@contextmanager
def current_span(tracer: Any, name: str, **options: Any) -> Iterator[Any]:
    """Make a span the current one. What a sampler, a processor or an exporter of the user's raises is logged: the
    caller's work is done, or has failed, all the same."""
    trace = sys.modules[_API]
    span = trace.INVALID_SPAN
    with guarded():
        span = tracer.start_span(name, **options)
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield span
    except BaseException as error:
        with guarded():
            span.set_attribute("error.type", type(error).__qualname__)
            if isinstance(error, Exception):
                span.record_exception(error)
                span.set_status(trace.Status(trace.StatusCode.ERROR, f"{type(error).__qualname__}: {error}"))
        raise
    finally:
        with guarded():
            span.end()


@contextmanager
def guarded() -> Iterator[None]:
    """Log what a sampler, a processor or an exporter of the user's raises, in place of raising it."""
    try:
        yield
    except Exception as error:
        log.warning("trace.failed", error=f"{type(error).__name__}: {error}")


def adopt_environment(environ: Mapping[str, str]) -> AbstractContextManager[None]:
    """Let the trace that the environment of a program names, by TRACEPARENT and TRACESTATE as OpenTelemetry has it, be
    that of what it enqueues inside: also where the program itself does not trace."""
    parent, state = environ.get("TRACEPARENT", ""), environ.get("TRACESTATE", "")
    if _SAMPLED.fullmatch(parent) is None:
        return _OFF
    return _adopt(f"{parent} {state}" if 0 < len(state) <= MAX_STATE and state.isprintable() else parent)


@contextmanager
def _adopt(trace: str) -> Iterator[None]:
    global _outer
    before, _outer = _outer, trace
    try:
        if find_tracer() is None:
            yield
        else:
            propagator = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
            context = importlib.import_module("opentelemetry.context")
            parent, _, state = trace.partition(" ")
            carrier = {"traceparent": parent, "tracestate": state}
            token = context.attach(propagator.TraceContextTextMapPropagator().extract(carrier))
            try:
                yield
            finally:
                context.detach(token)
    finally:
        _outer = before


def trace_to_write() -> str | None:
    """Return the context of the current span as a row has it: traceparent, and after a space tracestate, if any.
    None if there is no span, or it is not sampled. Without a tracer, that of `adopt_environment`."""
    if find_tracer() is None:
        return _outer
    return written(sys.modules[_API].get_current_span())


def written(span: Any) -> str | None:
    """Return the context of a span as a row has it; None if it is not sampled."""
    context = span.get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = context.trace_state.to_header()
    return f"{parent} {state}" if 0 < len(state) <= MAX_STATE else parent
