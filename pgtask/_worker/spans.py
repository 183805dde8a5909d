"""The spans of the steps of one worker, in OpenTelemetry.

Invariants: a step has a span if its row carries the context of a producer. The first try of a step is a child of the
producer; a later one begins a trace of its own, with a link to the producer; so does a call of a batch, with a link for
each of its tasks. A span that cannot be made or ended harms no step.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pgtask._fastpath import TaskLease
from pgtask._log import EventLog
from pgtask._retry import throttled_seconds
from pgtask._sparing import SparingLog
from pgtask._traces import operation
from pgtask.outcome import Fail

__all__ = ["StepSpans", "link_to", "read_context"]

log = EventLog("pgtask.dispatch")

FLUSH_TIME = 2.0  # seconds for the export of what is left when a worker ends
_PROPAGATOR = TraceContextTextMapPropagator()


def read_context(text: str) -> context.Context:
    """Return the context in which a span is a child of the one that a row names; an empty one if that is not valid."""
    parent, _, state = text.partition(" ")
    return _PROPAGATOR.extract({"traceparent": parent, "tracestate": state}, context=context.Context())


def link_to(text: str) -> list[trace.Link]:
    """Return a link to the span that a row names; none if that is not valid."""
    named = trace.get_current_span(read_context(text)).get_span_context()
    return [trace.Link(named)] if named.is_valid else []


class StepSpans:
    """Makes the spans of steps, and ends them. Safe for all threads."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._failed_log = SparingLog(log, logging.WARNING, "trace.failed")

    def begin(self, lease: TaskLease) -> None:
        """Begin the span of a try whose row carries a trace, and make it the current one of this context."""
        lease.span = None
        try:
            assert lease.trace is not None
            text, queue = lease.trace
            attributes = operation("process", queue, lease.label)
            attributes |= {"messaging.message.id": str(lease.id), "pgtask.attempt": lease.tried + 1}
            is_first = lease.tried == 0
            lease.span = self._start(
                queue, attributes, read_context(text) if is_first else None, [] if is_first else link_to(text)
            )
        except Exception as error:
            self._failed_log.log_or_count(error=repr(error)[:200])

    def begin_call(self, leases: Sequence[TaskLease]) -> Any:
        """Begin the span of a call of a batch, and make it the current one of this context. None if no row carries a
        trace."""
        span = None
        try:
            traced = [lease.trace for lease in leases if lease.trace is not None]
            if traced:
                queue = traced[0][1]
                attributes = operation("process", queue, leases[0].label)
                attributes["messaging.batch.message_count"] = len(leases)
                span = self._start(queue, attributes, None, [link for text, _ in traced for link in link_to(text)])
            for lease in leases:
                lease.span = span if lease.trace is not None else None
        except Exception as error:
            self._failed_log.log_or_count(error=repr(error)[:200])
        return span

    def _start(
        self, queue: str, attributes: dict[str, Any], parent: context.Context | None, links: list[trace.Link]
    ) -> trace.Span:
        span = self._tracer.start_span(
            f"process {queue}",
            context=parent or context.Context(),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
        )
        context.attach(trace.set_span_in_context(span))  # the context of the step ends with it
        return span

    def end(self, lease: TaskLease, outcome: Any, error: BaseException | None) -> None:
        """End the span of a try."""
        if lease.was_stopped and isinstance(error, asyncio.CancelledError):
            self.end_span(lease.span, "released", None)
        elif lease.has_timed_out and isinstance(error, asyncio.CancelledError):
            self.end_span(lease.span, None, error, kind="StepTimeout")
        else:
            self.end_span(lease.span, outcome, error)

    def end_span(self, span: Any, outcome: Any, error: BaseException | None, *, kind: str | None = None) -> None:
        """End a span. `kind` is the name of the error, if not that of its class."""
        try:
            if error is None:
                name = outcome if isinstance(outcome, str) else type(outcome).__name__
                span.set_attribute("pgtask.outcome", name)
                if isinstance(outcome, Fail):
                    span.set_attribute("error.type", name)
                    span.set_status(trace.StatusCode.ERROR, str(outcome.reason))
            elif throttled_seconds(error) is not None:
                span.set_attribute("pgtask.outcome", type(error).__name__)
            else:
                span.record_exception(error)
                span.set_attribute("error.type", kind or type(error).__qualname__)
                span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
            span.end()
        except Exception as broken:
            self._failed_log.log_or_count(error=repr(broken)[:200])

    async def flush(self) -> None:
        """Have the provider export what is left. A worker does not run the handlers of atexit of its parent, which may
        have set the provider before the fork."""
        force_flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if force_flush is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIME):
                    await asyncio.to_thread(force_flush, int(1000 * FLUSH_TIME))
