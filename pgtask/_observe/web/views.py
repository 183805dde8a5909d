"""The pages that read.

Invariant: each reads a bounded number of rows, in one snapshot, and says where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pgtask._observe.fleet_database import MAX_LEASES
from pgtask._observe.web.questions import FILTERS, parse_cursor, parse_fields, parse_filter, parse_id, parse_run_state
from pgtask._observe.web.site import Site
from pgtask._postgres.causes import fold_causes
from pgtask._postgres.console import (
    MAX_CHECKPOINTS,
    MAX_CHILDREN,
    MAX_FOLDED,
    StepCount,
    count_steps,
    read_children,
    read_last_checkpoints,
)
from pgtask._postgres.listing import STATES, TaskFilter, list_tasks
from pgtask._postgres.pauses import read_pauses
from pgtask._postgres.runs import CheckpointRow, RunStatus, list_runs, read_statuses
from pgtask._postgres.tasks import show_tasks
from pgtask.workflow import RunState

__all__ = ["machine", "now", "parked", "run", "runs", "task", "tasks"]

PAGE = 50  # rows
MAX_TASKS, MAX_RUNS = 10_000, 2_000  # read by a page with a filter
CHARACTERS = 1024  # of steps, results and errors in lists
_QUEUE_STATES = ("due", "limited", "scheduled", "leased", "parked")
_STEP_STATES = ("due", "scheduled", "leased", "parked")


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


async def now(request: Request) -> Response:
    """Show what happens: queues, steps and workers as `pgtask top` has them, what runs longest, and pauses."""
    site = _site(request)
    async with site.reading.reading() as connection:
        pauses = await read_pauses(connection)
    frame = await site.looks.look()
    # The queue whose oldest task has waited longest comes first.
    queues = sorted(frame.queues, key=lambda row: (-(row.oldest_due or 0.0), row.queue))
    return site.render(
        request,
        "now.html",
        frame=frame,
        queues=queues,
        states=_QUEUE_STATES,
        totals={state: sum(getattr(row, state) for row in queues) for state in _QUEUE_STATES},
        estimated={state for row in queues for state in row.estimated},
        oldest=max((row.oldest_due or 0.0 for row in queues), default=0.0),
        is_cut=sum(row.leases for row in frame.workers) >= MAX_LEASES,
        most=MAX_LEASES,
        pauses=pauses,
        paused_queues={one.name for one in pauses if one.kind == "queue"},
    )


async def tasks(request: Request) -> Response:
    """List tasks, by the filters of the address."""
    site = _site(request)
    query = parse_fields(request.scope["query_string"], (*FILTERS, "after"))
    wanted, after = parse_filter(query), parse_cursor(query.get("after"))
    async with site.reading.reading() as connection:
        page = await list_tasks(connection, wanted, limit=PAGE, after=after, characters=CHARACTERS, max_read=MAX_TASKS)
    filters = {name: query.get(name, "") for name in FILTERS}
    return site.render(
        request, "tasks.html", page=page, filters=filters, states=STATES, scan=MAX_TASKS, after=after is not None
    )


async def task(request: Request) -> Response:
    """Show all columns of a task."""
    site, wanted = _site(request), parse_id(request.path_params["id"])
    async with site.reading.reading() as connection:
        rows = await show_tasks(connection, [wanted])
        is_run = any(map(_is_of_workflow, await read_statuses(connection, [wanted])))
    if not rows:
        return site.render(request, "gone.html", status=404, id=wanted, is_run=is_run, is_task=False)
    return site.render(request, "task.html", row=rows[0], is_run=is_run)


def _is_of_workflow(status: RunStatus) -> bool:
    """Return whether a status is that of a run: a task without a workflow has one too, with no name."""
    return status.name is not None


async def runs(request: Request) -> Response:
    """List the runs of workflows, latest first."""
    site, query = _site(request), parse_fields(request.scope["query_string"], ("name", "state", "before"))
    name, state = query.get("name", ""), parse_run_state(query.get("state", ""))
    before = parse_id(query["before"]) if query.get("before") else None
    async with site.reading.reading() as connection:
        found, following = await list_runs(
            connection, name=name or None, state=state, limit=PAGE, before=before, max_read=MAX_RUNS
        )
    filters = {"name": name, "state": state or ""}
    states = get_args(RunState)
    return site.render(
        request,
        "runs.html",
        runs=found,
        following=following,
        is_cut=following is not None and len(found) < PAGE,
        most=MAX_RUNS,
        filters=filters,
        states=states,
        before=before,
    )


class TimelineBar(msgspec.Struct, frozen=True):
    """A checkpoint or a child in the time of its run: where its bar begins, and its width, in per cent."""

    x: float
    width: float


async def run(request: Request) -> Response:
    """Show a run as a timeline of its checkpoints and children."""
    site, wanted = _site(request), parse_id(request.path_params["id"])
    async with site.reading.reading() as connection:
        found = await read_statuses(connection, [wanted])
        statuses = list(filter(_is_of_workflow, found))
        checkpoints = await read_last_checkpoints(connection, wanted, CHARACTERS) if statuses else []
        children = await read_statuses(connection, await read_children(connection, wanted)) if statuses else []
    if not statuses:
        return site.render(request, "gone.html", status=404, id=wanted, is_run=False, is_task=bool(found))
    span = _span(statuses[0], checkpoints)
    return site.render(
        request,
        "run.html",
        run=statuses[0],
        steps=[(one, _checkpoint_bar(one, span)) for one in checkpoints],
        children=[(one, _bar(one.created_at, one.ended_at or one.seen_at, span)) for one in children],
        span=span,
        max_checkpoints=MAX_CHECKPOINTS,
        max_children=MAX_CHILDREN,
    )


def _span(status: RunStatus, checkpoints: Sequence[CheckpointRow]) -> tuple[datetime, datetime]:
    """Return the time that the timeline shows; if older checkpoints are left out, from the first that is shown."""
    first = status.started_at or status.created_at
    if checkpoints:
        begun = checkpoints[0].recorded_at - timedelta(seconds=checkpoints[0].seconds)
        first = begun if checkpoints[0].number > 1 else min(first, begun)
    return first, max(status.ended_at or status.seen_at, first)


def _checkpoint_bar(row: CheckpointRow, span: tuple[datetime, datetime]) -> TimelineBar:
    return _bar(row.recorded_at - timedelta(seconds=row.seconds), row.recorded_at, span)


def _bar(start: datetime, end: datetime, span: tuple[datetime, datetime]) -> TimelineBar:
    whole = max((span[1] - span[0]).total_seconds(), 1e-6)
    left = min(max((start - span[0]).total_seconds() / whole, 0.0), 1.0)
    right = min(max((end - span[0]).total_seconds() / whole, left), 1.0)
    return TimelineBar(round(100 * left, 2), max(round(100 * (right - left), 2), 0.4))


async def parked(request: Request) -> Response:
    """Show parked tasks by their cause."""
    site = _site(request)
    async with site.reading.reading() as connection:
        causes = await fold_causes(connection, TaskFilter(states=("parked",)), last=MAX_FOLDED)
    is_cut = sum(one.tasks for one in causes) >= MAX_FOLDED
    return site.render(request, "parked.html", causes=causes, most=MAX_FOLDED, is_cut=is_cut)


async def machine(request: Request) -> Response:
    """Show the state machine of the app, with the tasks that are at each step, and those that took each edge."""
    site = _site(request)
    async with site.reading.reading() as connection:
        counts = await count_steps(connection)
    frame = await site.looks.look()
    by_step: dict[str, dict[str, StepCount]] = {}
    for one in counts:
        by_step.setdefault(f"{one.task}.{one.step}", {})[one.state] = one
    charts = site.charts or ()
    known = {f"{box.task}.{box.step}" for chart in charts for box in chart.boxes}
    others = {label: states for label, states in sorted(by_step.items()) if label not in known}
    flows = {(one.task, one.step, one.next): one for one in frame.edges}
    ends = {one.step: one for one in frame.steps}
    values: dict[str, Any] = {"flows": flows, "ends": ends, "supervisors": frame.supervisors, "silent": frame.silent}
    values |= {"counts": by_step, "others": others, "states": _STEP_STATES, "most": MAX_FOLDED}
    return site.render(request, "machine.html", charts=charts, has_app=site.charts is not None, **values)
