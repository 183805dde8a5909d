"""The pages that act: the token, the question before an action, and the action.

Invariants: an action is a POST with the cookie of the token and the mark of our forms; it changes no more tasks than
the number that its question has shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from uuid import UUID

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pgtask._observe.web.questions import FILTERS, BadQuestion, parse_fields, parse_filter, parse_id
from pgtask._observe.web.site import ActionKeys, Site
from pgtask._postgres.actions import begin_action, note_action
from pgtask._postgres.listing import TaskFilter, filter_words, find_tasks
from pgtask._postgres.pauses import Paused, pause, resume
from pgtask._postgres.runs import read_statuses, resume_runs
from pgtask._postgres.task_changes import PORTION, Cancel, Change, Retry, apply_change, change_portion
from pgtask.policy import check_queue

__all__ = ["act", "confirm", "lock", "pause_or_resume", "unlock"]

MAX_FORM = 64 * 1024
_FIELDS = ("mark", "token", "do", "id", "number", "kind", "name", "reason", *FILTERS)
CHANGES: dict[str, Change] = {"retry": Retry(), "cancel": Cancel()}
DONE = {"retry": "made due", "cancel": "cancelled", "resume": "resumed"}
View = Callable[[Request, Site, Mapping[str, str]], Awaitable[Response]]


async def _read_form(request: Request) -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM:
            raise BadQuestion("the form is too large")
    return parse_fields(body, _FIELDS)


def _guarded(view: View) -> Callable[[Request], Awaitable[Response]]:
    """Let a POST through that has the cookie and the mark."""

    @wraps(view)
    async def check(request: Request) -> Response:
        site: Site = request.app.state.site
        form = await _read_form(request)
        keys = _keys(site)
        if not keys.knows(request):
            return site.render(request, "unlock.html", status=403, failed=False)
        if not keys.has_marked(form):
            return site.render(request, "error.html", status=403, title="refused", text="the form is not of this page")
        return await view(request, site, form)

    return check


def _keys(site: Site) -> ActionKeys:
    assert site.keys is not None  # a console that only reads has none of these pages
    return site.keys


async def unlock(request: Request) -> Response:
    """Ask for the token; if it is right, let this browser act."""
    site: Site = request.app.state.site
    if request.method != "POST":
        return site.render(request, "unlock.html", failed=False)
    keys = _keys(site)
    if not keys.opens((await _read_form(request)).get("token", "")):
        return site.render(request, "unlock.html", status=403, failed=True)
    response = RedirectResponse("/", status_code=303)
    response.set_cookie(keys.cookie_name, keys.cookie, httponly=True, samesite="strict")
    return response


@_guarded
async def lock(request: Request, site: Site, form: Mapping[str, str]) -> Response:
    """Let this browser act no more."""
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(_keys(site).cookie_name, httponly=True, samesite="strict")
    return response


async def confirm(request: Request) -> Response:
    """Show how many tasks an action would change, and ask."""
    site: Site = request.app.state.site
    query = parse_fields(request.scope["query_string"], ("do", "id", *FILTERS))
    if not site.may_act(request):
        return site.render(request, "unlock.html", status=403, failed=False)
    do = _parse_action(query)
    fields = {name: query[name] for name in ("id", *FILTERS) if query.get(name)}
    async with site.reading.reading() as connection:
        if "id" in query:
            task = parse_id(query["id"])
            wanted, more = [task] if await _exists(connection, task) else [], False
        else:
            wanted, following = await find_tasks(connection, _parse_bulk(query, do), limit=PORTION)
            more = following is not None
    return site.render(request, "confirm.html", do=do, number=len(wanted), more=more, fields=fields)


def _parse_action(fields: Mapping[str, str]) -> str:
    do = fields.get("do", "")
    if do not in DONE:
        raise BadQuestion(f"there is no action {do!r}; there are {', '.join(DONE)}")
    return do


def _parse_bulk(fields: Mapping[str, str], do: str) -> TaskFilter:
    if do == "resume":
        raise BadQuestion("runs are resumed one by one: name its id")
    wanted = parse_filter(fields)
    if wanted.states != ("parked",):
        raise BadQuestion("many tasks are changed at once only among those that are parked")
    return wanted


async def _exists(connection: object, task: UUID) -> bool:
    found = await connection.fetchval("SELECT true FROM pg_task WHERE id = $1", task)  # type: ignore[attr-defined]
    return bool(found) or bool(await read_statuses(connection, [task]))


@_guarded
async def act(request: Request, site: Site, form: Mapping[str, str]) -> Response:
    """Change what the question has named."""
    do = _parse_action(form)
    assert site.writing is not None
    async with site.writing.session() as connection:
        if "id" not in form:
            wanted, number = _parse_bulk(form, do), _parse_number(form)
            action = await begin_action(connection, site.operator, do, _chosen_by(wanted, number))
            done, _ = await change_portion(connection, wanted, CHANGES[do], limit=number, after=None)
            await note_action(connection, action, done, "done")
            asked = number
        elif do == "resume":
            done, asked = len((await resume_runs(connection, [parse_id(form["id"])])).runs), 1
        else:
            changes = await apply_change(connection, [parse_id(form["id"])], CHANGES[do])
            done, asked = sum(one.is_done for one in changes), len(changes)
    return site.render(
        request, "done.html", done=done, asked=asked, what=DONE[do], is_run=do == "resume", id=form.get("id", "")
    )


def _chosen_by(wanted: TaskFilter, number: int) -> str:
    """Return what the command of the same name would have chosen by."""
    return shlex.join(["--parked", *filter_words(wanted), "--limit", str(number)])


def _parse_number(form: Mapping[str, str]) -> int:
    text = form.get("number", "")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= PORTION):
        raise BadQuestion(f"number {text}: give 1 to {PORTION:,}")
    return int(text)


@_guarded
async def pause_or_resume(request: Request, site: Site, form: Mapping[str, str]) -> Response:
    """Pause a queue, a task or a step, or let its tasks start again."""
    kind, name = form.get("kind", ""), form.get("name", "").strip()
    thing = _parse_paused(kind, name)
    assert site.writing is not None
    async with site.writing.session() as connection:
        if form.get("do") == "resume":
            await resume(connection, [thing], site.operator)
        else:
            await pause(connection, [thing], form.get("reason", "").strip() or None, site.operator)
    return RedirectResponse("/", status_code=303)


def _parse_paused(kind: str, name: str) -> Paused:
    try:
        if kind == "queue":
            return Paused("queue", check_queue(name))
    except ValueError as error:
        raise BadQuestion(str(error)) from None
    task, dot, step = name.partition(".")
    if kind == "task" and task and not dot:
        return Paused("task", name)
    if kind == "step" and task and step and "." not in step:
        return Paused("step", name)
    raise BadQuestion(f"{kind} {name!r}: name a queue, a task as Greeter, or a step as Greeter.ReadName")
