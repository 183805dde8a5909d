"""The board and the alerts ask for metrics, with labels, that the exporter serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
from deploy_kit import DEPLOY

from ci.deploy_files import queries, rules
from pgtask._observe import database, metrics, pages

BY_PROMETHEUS = {"instance", "job"}  # labels that it adds to what it scrapes


def served() -> dict[str, set[str]]:
    """Return the labels of each metric that the exporter serves for a fleet of one worker, one step and one queue."""
    from prometheus_client.parser import text_string_to_metric_families

    some = pages.Histogram(1.0, (1,) * (len(pages.BOUNDS) + 1))
    step = pages.StepCounts(task="T", step="S", run=some, wait=some)
    numbers: Any = {"leases": 0, "executing": 0, "waiting": 0, "unwritten": 0, "started": 0.0, "heard": 0.0}
    flags: Any = {"is_ready": True, "is_connected": True, "is_listening": True, "is_renewing": True}
    worker = pages.WorkerState(number=1, pid=1, steps=(step,), **numbers, **flags)
    counts: Any = {"claims": 0, "claimed": 0, "flushes": 0, "flushed": 0, "busy": 0.0, "started": 0.0, "heard": 0.0}
    snapshot = pages.Snapshot(pid=1, wanted=1, is_stopping=False, workers=(worker,), steps=(step,), lag=some, **counts)
    depth = [database.QueueDepth("default", state, 1, False, 1.0) for state in ("due", "scheduled", "leased", "parked")]
    text = metrics.encode(snapshot, depth, "text/plain")[0].decode()
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


def selectors(expression: Any) -> Iterator[Any]:
    """Yield the selectors of series within an expression."""
    found: list[Any] = []
    promql.walk(expression, lambda part: found.append(part) if isinstance(part, promql.VectorSelector) else None)
    yield from found


def groupings(expression: Any) -> Iterator[str]:
    """Yield the labels that an expression groups by."""
    found: list[Any] = []
    promql.walk(expression, lambda part: found.append(part) if isinstance(part, promql.AggregateExpr) else None)
    for part in found:
        yield from part.modifier.labels if part.modifier else ()


def test_board_and_alerts_ask_for_what_is_served() -> None:
    known = served()
    asked = set()
    for where, text in [*rules(DEPLOY), *queries(DEPLOY)]:
        expression = promql.parse(text)
        labels: set[str] = set()
        for selector in selectors(expression):
            assert selector.name in known, f"{where}: no metric {selector.name}"
            asked.add(selector.name)
            labels |= known[selector.name]
            for matcher in selector.matchers.matchers:
                assert matcher.name in known[selector.name] | BY_PROMETHEUS, (
                    f"{where}: {selector.name} has no {matcher.name}"
                )
        assert set(groupings(expression)) <= labels | BY_PROMETHEUS, where
    assert len(asked) > 15


def test_values_of_labels_are_those_that_are_served() -> None:
    outcomes = set(metrics._OUTCOMES)
    states = {"due", "limited", "scheduled", "leased", "parked"}
    for where, text in [*rules(DEPLOY), *queries(DEPLOY)]:
        for selector in selectors(promql.parse(text)):
            for matcher in selector.matchers.matchers:
                allowed = {"outcome": outcomes, "state": states}.get(matcher.name)
                if allowed is not None:
                    assert set(matcher.value.split("|")) <= allowed, where
