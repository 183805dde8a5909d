"""Tasks that show which worker runs them, and beside which others. Each leaves a file in a directory when it begins."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pgtask import App, Context, Done, Task


def begin(place: str, name: object) -> None:
    """Leave a file that names the step that has begun, and its process."""
    Path(place, f"{name}.{os.getpid()}").touch()


def begun(place: str) -> int:
    return sum(path.suffix[1:].isdigit() for path in Path(place).iterdir())


def processes(place: Path) -> set[str]:
    return {path.suffix for path in place.iterdir() if path.suffix[1:].isdigit()}


class Share(Task): ...


class Noop(Share):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


class Touch(Share):
    place: str
    name: str

    async def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        return Done()


class Compute(Share):
    """Has the loop until so many like it have begun."""

    place: str
    name: str
    until: int

    async def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while begun(self.place) < self.until:
            time.sleep(0.01)
        return Done()


class ComputeLater(Share):
    """Computes like `Compute`, after it has suspended."""

    place: str
    name: str
    until: int

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(0)
        begin(self.place, self.name)
        while begun(self.place) < self.until:
            time.sleep(0.01)
        return Done()


class ComputeInThread(Share):
    """Computes like `Compute`, in a thread that keeps the interpreter busy."""

    place: str
    name: str
    until: int

    def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while begun(self.place) < self.until:
            spin(0.02)
        return Done()


class WaitInThread(Share):
    """Waits in a thread until so many like it have begun."""

    place: str
    name: str
    until: int

    def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while begun(self.place) < self.until:
            time.sleep(0.02)
        return Done()


class Await(Share):
    """Computes for a while, then waits until a file is there, without the loop."""

    place: str
    name: str
    compute: float = 0.0
    go: str = "go"

    async def run(self, ctx: Context) -> Done:
        spin(self.compute)
        begin(self.place, self.name)
        while not Path(self.place, self.go).exists():
            await asyncio.sleep(0.05)
        return Done()


class Block(Share):
    """Has the loop until a file is there."""

    place: str
    name: str

    async def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while not Path(self.place, "go").exists():
            time.sleep(0.01)
        return Done()


class BlockLater(Share):
    """Has the loop until a file is there, from when a claim of its worker waits for a lock on."""

    place: str
    name: str

    async def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while not await ctx.db.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE wait_event = 'advisory' AND datname = current_database() AND application_name ~ '^pgtask worker'"
        ):
            await asyncio.sleep(0.01)
        begin(self.place, "has the loop")
        while not Path(self.place, "go").exists():
            time.sleep(0.01)
        return Done()


class ComputeUntil(Share):
    """Keeps the interpreter busy from a thread until a file is there."""

    place: str
    name: str

    def run(self, ctx: Context) -> Done:
        begin(self.place, self.name)
        while not Path(self.place, "go").exists():
            spin(0.02)
        return Done()


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


app = App(Share)


@asynccontextmanager
async def few_threads() -> AsyncIterator[None]:
    """The system gives this worker three threads for its steps, and from the file `more` on as many as it wants."""
    start = threading.Thread.start
    given = 0

    def scarce(thread: threading.Thread) -> None:
        nonlocal given
        if thread.name.startswith("pgtask-step"):
            if given >= int(os.environ["SHARING_THREADS"]) and not Path(os.environ["SHARING_PLACE"], "more").exists():
                raise RuntimeError("can't start new thread")
            given += 1
        start(thread)

    threading.Thread.start = scarce  # type: ignore[method-assign,assignment]
    yield


scarce = App(Share, lifespan=few_threads)


@asynccontextmanager
async def factory() -> AsyncIterator[None]:
    """A task factory as tracing tools install it: it drives each task through a coroutine of its own."""

    async def follow(coroutine: Any) -> Any:
        return await coroutine

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        options.pop("eager_start", None)
        return asyncio.Task(follow(coroutine), loop=loop, name="followed", **options)

    asyncio.get_running_loop().set_task_factory(make)
    yield


@asynccontextmanager
async def eager() -> AsyncIterator[None]:
    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory", None))
    yield


followed = App(Share, lifespan=factory)
eagerly = App(Share, lifespan=eager)
