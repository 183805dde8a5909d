"""The metrics of a fleet as Prometheus reads them, from its pages and from what the database has counted.

Names follow OpenTelemetry's conventions for messaging where these have one, and else begin with `pgtask`; base units,
`_total` for counters. Labels are few: never an id or a key. docs/operations.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from pgtask._observe.database import QueueDepth
from pgtask._observe.pages import BOUNDS, Histogram, Snapshot, StepCounts, StepEdge

__all__ = ["encode"]

_OUTCOMES = ("done", "next", "retried", "parked", "expired", "postponed", "lost")
_STEP = ["task", "step"]
_OTEL = ["messaging_system", "messaging_operation_name"]


def encode(snapshot: Snapshot, depth: Sequence[QueueDepth] | None, accept: str) -> tuple[bytes, str]:
    """Return the text for a client that accepts these formats, and its content type. `depth` is None while the database
    does not answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fleet(snapshot, depth))
    write, content_type = choose_encoder(accept)
    return write(registry), content_type


class _Fleet(Collector):
    """All families of one moment."""

    def __init__(self, snapshot: Snapshot, depth: Sequence[QueueDepth] | None) -> None:
        self._snapshot = snapshot
        self._depth = depth

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from _step_families(self._snapshot.steps)
        yield _edge_family(self._snapshot.edges)
        yield from _loop_families(self._snapshot)
        yield from _worker_families(self._snapshot)
        yield from _queue_families(self._depth)


def _step_families(steps: Sequence[StepCounts]) -> Iterator[Metric]:
    run = HistogramMetricFamily(
        "messaging_process_duration_seconds",
        "How long runs of a step took, repeated ones included.",
        labels=_OTEL + _STEP,
    )
    wait = HistogramMetricFamily(
        "pgtask_queue_wait_seconds", "How long tasks had been due when their step began.", labels=_STEP
    )
    outcomes = CounterMetricFamily(
        "pgtask_step_outcomes",
        "Outcomes of steps that are in the database, and those lost.",
        labels=[*_STEP, "outcome"],
    )
    for step in steps:
        name = [step.task or "(unknown)", step.step or "(unknown)"]
        if step.run.count:
            run.add_metric(["pgtask", "process", *name], _buckets(step.run), step.run.sum)
        if step.wait.count:
            wait.add_metric(name, _buckets(step.wait), step.wait.sum)
        for outcome in _OUTCOMES:
            outcomes.add_metric([*name, outcome], getattr(step, outcome))
    yield from (run, wait, outcomes)


def _edge_family(edges: Sequence[StepEdge]) -> Metric:
    family = CounterMetricFamily(
        "pgtask_step_transitions", "Tasks that went on from a step to the next one.", labels=[*_STEP, "next"]
    )
    for edge in edges:
        family.add_metric([edge.task or "(unknown)", edge.step or "(unknown)", edge.next or "(unknown)"], edge.count)
    return family


def _loop_families(snapshot: Snapshot) -> Iterator[Metric]:
    claimed = CounterMetricFamily(
        "messaging_client_consumed_messages", "Tasks that workers have claimed or held.", labels=_OTEL
    )
    claimed.add_metric(["pgtask", "claim"], snapshot.claimed)
    yield claimed
    yield CounterMetricFamily("pgtask_claims", "Claims and turns, empty ones included.", snapshot.claims)
    yield CounterMetricFamily("pgtask_flushes", "Statements that have written outcomes.", snapshot.flushes)
    yield CounterMetricFamily("pgtask_flushed_outcomes", "Outcomes in these statements.", snapshot.flushed)
    yield CounterMetricFamily("pgtask_loop_busy_seconds", "Seconds for which steps had the loops.", snapshot.busy)
    lag = HistogramMetricFamily(
        "pgtask_loop_lag_seconds", "By how much the loops of workers were late, sampled twice a second.", labels=[]
    )
    lag.add_metric([], _buckets(snapshot.lag), snapshot.lag.sum)
    yield lag


def _worker_families(snapshot: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("pgtask_workers_wanted", "Workers that the supervisor was started with.", snapshot.wanted)
    ready = sum(worker.is_ready for worker in snapshot.workers)
    yield GaugeMetricFamily("pgtask_workers_ready", "Workers that take tasks.", ready)
    for name, text in (
        ("leases", "Tasks that a worker has leased."),
        ("executing", "Steps that are suspended or in a thread."),
        ("waiting", "Leased tasks that have not started."),
        ("unwritten", "Outcomes that are not in the database yet."),
    ):
        family = GaugeMetricFamily(f"pgtask_worker_{name}", text, labels=["worker"])
        numbers: dict[str, int] = {}
        for worker in snapshot.workers:  # a replacement has the number of the worker that it replaces
            number = str(worker.number)
            numbers[number] = numbers.get(number, 0) + getattr(worker, name)
        for number, value in numbers.items():
            family.add_metric([number], value)
        yield family


def _queue_families(depth: Sequence[QueueDepth] | None) -> Iterator[Metric]:
    yield GaugeMetricFamily("pgtask_database_up", "Whether the database has answered this scrape.", depth is not None)
    if depth is None:
        return
    tasks = GaugeMetricFamily("pgtask_tasks", "Tasks by queue and state.", labels=["queue", "state"])
    estimated = GaugeMetricFamily(
        "pgtask_tasks_estimated", "Whether that number is an estimate.", labels=["queue", "state"]
    )
    oldest = GaugeMetricFamily(
        "pgtask_oldest_due_seconds", "For how long the oldest due task of a queue has been due.", labels=["queue"]
    )
    ages: dict[str, float] = {}
    for row in depth:
        tasks.add_metric([row.queue, row.state], row.tasks)
        estimated.add_metric([row.queue, row.state], row.is_estimate)
        ages[row.queue] = max(ages.get(row.queue, 0.0), row.oldest_due or 0.0)
    for queue, age in ages.items():
        oldest.add_metric([queue], age)
    yield from (tasks, estimated, oldest)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" if bound < 1 else str(float(bound)) for bound in BOUNDS), "+Inf"]
    return list(zip(bounds, accumulate(histogram.buckets), strict=True))
