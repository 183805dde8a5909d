"""The pages of what holds tasks back, starts them and gathers them: limits, schedules and groups.

Invariant: as that of the other pages: a bounded number of rows, in one snapshot.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pgtask._observe.web.questions import parse_fields
from pgtask._observe.web.site import Site
from pgtask._postgres.console import MAX_FOLDED, fold_group
from pgtask._postgres.groups import read_rows
from pgtask._postgres.limits import read_keys, read_limits
from pgtask._postgres.schedules import read_schedules
from pgtask.groups import status_of

__all__ = ["groups", "limits", "schedules"]

COUNTED = 1_000  # tasks of a limit, and of a key
MAX_SCHEDULES = 500
MAX_GROUPS = 50


async def limits(request: Request) -> Response:
    """Show the limits, or one with the keys that hold up most."""
    site: Site = request.app.state.site
    name = parse_fields(request.scope["query_string"], ("name",)).get("name") or None
    async with site.reading.reading() as connection:
        found = await read_limits(connection, name, counted=COUNTED)
        keys, is_cut = await read_keys(connection, name, counted=COUNTED) if name and found else ([], False)
    if name and not found:
        text = f"there is no limit {name}: its row was deleted, or it never was"
        return site.render(request, "error.html", status=404, title="Not found", text=text)
    return site.render(request, "limits.html", limits=found, keys=keys, is_cut=is_cut, chosen=name, most=COUNTED)


async def schedules(request: Request) -> Response:
    """Show what starts when, and what has become of the last occurrences."""
    site: Site = request.app.state.site
    async with site.reading.reading() as connection:
        found = await read_schedules(connection)
    shown, left = found[:MAX_SCHEDULES], len(found) - MAX_SCHEDULES
    return site.render(request, "schedules.html", schedules=shown, left=max(0, left))


async def groups(request: Request) -> Response:
    """Show the groups that were started last, or one with its failures by cause."""
    site: Site = request.app.state.site
    name = parse_fields(request.scope["query_string"], ("name",)).get("name") or None
    async with site.reading.reading() as connection:
        rows = await read_rows(connection, [name] if name else None, MAX_GROUPS)
        found = list(map(status_of, rows))
        causes = await fold_group(connection, name) if name and found and found[0].parked else []
    if name and not found:
        text = f"there is no group {name}: it was removed, or it never was"
        return site.render(request, "error.html", status=404, title="Not found", text=text)
    is_cut = sum(one.tasks for one in causes) >= MAX_FOLDED
    values: dict[str, Any] = {"causes": causes, "is_cut": is_cut, "most": MAX_FOLDED, "shown": MAX_GROUPS}
    return site.render(request, "groups.html", groups=found, chosen=name, **values)
