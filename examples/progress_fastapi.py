"""A page that follows a run while it goes on, by server-sent events. A reader that was cut off misses nothing.

    uvicorn examples.progress_fastapi:server &
    pgtask-supervisor examples.progress_fastapi:app --procs 1

Each recorded step of the run is an event, and its number the id of the event. A browser that connects again sends the
last id that it has seen, and gets the events after it: the run itself is the record, so the server keeps none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

import msgspec
from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import HTMLResponse, StreamingResponse

from pgtask import App, Run, WorkflowContext, workflow
from pgtask.errors import RunNotFound
from pgtask.fastapi import Pgtask, lifespan

PARTS = ("fetch", "parse", "count", "index", "publish")
ENDED = ("SUCCESS", "ERROR", "CANCELLED")
LOOK_INTERVAL = 0.2  # seconds between two looks at a run that goes on


class Report(msgspec.Struct):
    seconds: float = 1.0  # for each part


async def work(part: str, seconds: float) -> str:
    await asyncio.sleep(seconds)
    return part


@workflow("report")
async def report(ctx: WorkflowContext, request: Report) -> str:
    done = [await ctx.step(part, work, part, request.seconds) for part in PARTS]
    return " ".join(done)


app = App(report)
server = FastAPI(lifespan=lifespan())

PAGE = """<!doctype html><title>A report</title><button>Make a report</button><ol></ol><p></p>
<script>
document.querySelector("button").onclick = async () => {
  const {id} = await (await fetch("/reports", {method: "POST"})).json();
  const events = new EventSource(`/reports/${id}/events`);  // connects again by itself, with the last id
  events.addEventListener("step", (e) => {
    const line = document.createElement("li");
    line.textContent = JSON.parse(e.data).step;
    document.querySelector("ol").append(line);
  });
  events.addEventListener("end", (e) => {
    document.querySelector("p").textContent = JSON.parse(e.data).state;
    events.close();
  });
};
</script>
"""


@server.get("/", response_class=HTMLResponse)
async def page() -> str:
    return PAGE


@server.post("/reports")
async def begin(client: Pgtask, seconds: float = 1.0) -> dict[str, str]:
    run = await client.trigger(report, Report(seconds))
    return {"id": str(run.id)}


@server.get("/reports/{id}/events")
async def follow(id: UUID, client: Pgtask, last_event_id: Annotated[int, Header()] = 0) -> StreamingResponse:
    run = client.run(id, report)
    try:
        await run.status()
    except RunNotFound as error:
        raise HTTPException(404, str(error)) from None
    return StreamingResponse(events(run, last_event_id), media_type="text/event-stream")


async def events(run: Run[Any], last: int) -> AsyncIterator[str]:
    """Yield the events after the number `last`, as they come, up to the end of the run."""
    while True:
        status = await run.status()
        for number in range(last + 1, status.recorded + 1):
            yield event(number, "step", {"step": PARTS[number - 1], "of": len(PARTS)})
        last = max(last, status.recorded)
        if status.state in ENDED:
            yield event(last, "end", {"state": status.state, "output": status.output, "error": status.error})
            return
        await asyncio.sleep(LOOK_INTERVAL)


def event(number: int, name: str, data: dict[str, Any]) -> str:
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
