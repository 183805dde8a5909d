"""The keys of `pgtask top`: what each makes of the view."""

from __future__ import annotations

import msgspec

from pgtask._cli.top_lines import PAGES, TopView

__all__ = ["press"]

ENTER, ESCAPE, ERASE = ("\n", "\r"), "\x1b", ("\x7f", "\b")
MAX_FILTER = 100


def press(view: TopView, key: str) -> TopView | None:
    """Return the view after a key, a character; None to quit."""
    if view.typed is not None:
        return _type(view, view.typed, key)
    replace = msgspec.structs.replace
    if key == "q":
        return None
    if view.shows_help:
        return replace(view, shows_help=False)
    if key in ("1", "2", "3"):
        return replace(view, page=list(PAGES)[int(key) - 1])
    match key:
        case "s" | "S":
            return replace(view, sorts={**view.sorts, view.page: _next_sort(view, 1 if key == "s" else -1)})
        case "f" | "/":
            return replace(view, typed=view.filter)
        case "p" | " ":
            return replace(view, is_paused=not view.is_paused)
        case "?" | "h":
            return replace(view, shows_help=True)
        case "\x1b":
            return replace(view, filter="")
    return view


def _next_sort(view: TopView, by: int) -> int:
    page = PAGES[view.page]
    return (view.sorts.get(view.page, page.first) + by) % len(page.columns)


def _type(view: TopView, typed: str, key: str) -> TopView:
    replace = msgspec.structs.replace
    if key in ENTER:
        return replace(view, filter=typed, typed=None)
    if key == ESCAPE:
        return replace(view, filter="", typed=None)
    if key in ERASE:
        return replace(view, typed=typed[:-1])
    return replace(view, typed=(typed + key)[:MAX_FILTER]) if key.isprintable() else view
