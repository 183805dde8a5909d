"""Tasks that are functions."""

from __future__ import annotations

import threading

from pgtask import App, Context, Done, Fail, task


@task("note")
async def note(ctx: Context, text: str, *, times: int = 1) -> Done:
    for _ in range(times):
        await ctx.db.execute("INSERT INTO noted VALUES ($1)", text)
    return Done()


@task("note in thread", archive=True)
def note_in_thread(ctx: Context, text: str) -> Done | Fail:
    is_main = threading.current_thread() is threading.main_thread()
    return Fail(f"{text} is not in a thread") if is_main else Done()


@task("refuse")
async def refuse(ctx: Context, why: str) -> Fail:
    return Fail(why)


app = App(note, note_in_thread, refuse)
