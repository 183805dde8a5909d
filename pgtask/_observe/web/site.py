"""What the pages share: sessions, templates, the drawings of the app, and the keys of those who may act.

Invariant: templates escape all that they show; no text of the table reaches a browser as HTML.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from pgtask._observe.looks import FleetLooks
from pgtask._observe.web.chart import BOX_HEIGHT, BOX_WIDTH, MachineChart
from pgtask._observe.web.questions import with_query
from pgtask._observe.web.sessions import WebSessions
from pgtask._postgres.task_status import step_label

__all__ = ["ActionKeys", "Site", "make_templates"]

Formats = Mapping[str, Callable[..., str]]


class ActionKeys:
    """The keys of a console that may act: the token that starts a session, its cookie, and the mark of its forms."""

    def __init__(self, token: str, port: int) -> None:
        self._token = token
        self.cookie_name = f"pgtask_{port}"  # browsers share cookies among the ports of a host
        self.cookie = self._derive("cookie")
        self.mark = self._derive("form")

    def _derive(self, purpose: str) -> str:
        return hmac.new(self._token.encode(), purpose.encode(), hashlib.sha256).hexdigest()

    def opens(self, text: str) -> bool:
        """Return whether a text is the token."""
        return hmac.compare_digest(text.strip().encode(), self._token.encode())

    def knows(self, request: Request) -> bool:
        """Return whether the browser of a request has given the token before."""
        given = request.cookies.get(self.cookie_name, "")
        return hmac.compare_digest(given.encode(), self.cookie.encode())

    def has_marked(self, form: Mapping[str, str]) -> bool:
        """Return whether a form comes from a page of ours."""
        return hmac.compare_digest(form.get("mark", "").encode(), self.mark.encode())


class Site(msgspec.Struct, frozen=True):
    """A console. `writing` and `keys` are None where it only reads; `operator` names those who act in its name."""

    reading: WebSessions
    looks: FleetLooks
    templates: Environment
    charts: Sequence[MachineChart] | None
    operator: str
    writing: WebSessions | None = None
    keys: ActionKeys | None = None

    def may_act(self, request: Request) -> bool:
        return self.keys is not None and self.keys.knows(request)

    def render(self, request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page; of a page that its script asks for again, the live part."""
        base = "fragment.html" if "x-fragment" in request.headers else "page.html"
        text = self.templates.get_template(name).render(
            base=base,
            path=request.url.path,
            writes=self.keys is not None,
            may_act=self.may_act(request),
            mark=self.keys.mark if self.keys is not None and self.may_act(request) else "",
            **values,
        )
        return HTMLResponse(text, status_code=status)


def make_templates(formats: Formats) -> Environment:
    """Return the templates, with the formats that the commands use: `ago`, `time`, `elapsed`, `rate` and `size`."""
    environment = Environment(
        loader=PackageLoader("pgtask._observe.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**formats, "label": step_label, "pretty": _pretty, "line": _first_line}
    environment.filters |= {"number": _number, "short": _short_number}
    environment.globals |= {"with_query": with_query, "box": {"width": BOX_WIDTH, "height": BOX_HEIGHT}}
    return environment


def _pretty(text: str) -> str:
    try:
        return msgspec.json.format(text, indent=2)
    except (msgspec.DecodeError, RecursionError):
        return text


def _number(value: int) -> str:
    return f"{value:,}"


def _short_number(value: int) -> str:
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if value >= max(size, 100_000):
            return f"{value / size:.3g}{unit}"
    return _number(value)


def _first_line(text: str, characters: int = 160) -> str:
    first = text.partition("\n")[0]
    return first if len(first) <= characters else f"{first[: characters - 1]}…"
