"""The spans of a consumer, in OpenTelemetry: one for each claim that has brought traced tasks, and one for each task
that the caller works on within `Lease.span`.

Invariants: without a tracer provider nothing of OpenTelemetry is imported; a span that cannot be made or ended harms no
task.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pgtask._fastpath import scan_envelope
from pgtask._traces import current_span, find_tracer, guarded, operation
from pgtask.errors import DecodeError

if TYPE_CHECKING:
    from pgtask._consumer.leases import Lease

__all__ = ["processing", "receiving"]


def processing(lease: Lease) -> AbstractContextManager[Any]:
    """Make the span of a try the current one, as that of a worker is: of the first try a child of the producer."""
    tracer = find_tracer()
    if tracer is None or lease.trace is None:
        return nullcontext()
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind

    from pgtask._worker.spans import link_to, read_context

    attributes = operation("process", lease.queue, _label(lease))
    attributes |= {"messaging.message.id": str(lease.task_id), "pgtask.attempt": lease.tried + 1}
    is_first = lease.tried == 0
    return current_span(
        tracer,
        f"process {lease.queue}",
        context=read_context(lease.trace) if is_first else Context(),
        kind=SpanKind.CONSUMER,
        attributes=attributes,
        links=[] if is_first else link_to(lease.trace),
    )


def receiving(leases: Sequence[Lease], began: float) -> None:
    """Make the span of a claim that began at a time (seconds since the epoch), with a link for each task that is
    traced."""
    traces = [lease.trace for lease in leases if lease.trace is not None]
    if not traces or (tracer := find_tracer()) is None:
        return
    with guarded():
        from opentelemetry.trace import SpanKind

        from pgtask._worker.spans import link_to

        attributes = operation("receive", leases[0].queue, None) | {"messaging.batch.message_count": len(leases)}
        tracer.start_span(
            f"receive {leases[0].queue}",
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[link for trace in traces for link in link_to(trace)],
            start_time=int(began * 1e9),
        ).end(int(time.time() * 1e9))


def _label(lease: Lease) -> str | None:
    try:
        family, step, _ = scan_envelope(lease.raw)
    except DecodeError:
        return None
    return f"{family}.{step}"
