"""Tasks that kill their worker, for the tests of crashes. They write marks as in `apps`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from apps import mark

from pgtask import App, Context, Done, Next, Policy, Task


class Poison(Task):
    """A family of steps that end their process."""


class Segfault(Poison):
    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        ctypes.string_at(0)
        return Done()


class SegfaultAmongThreads(Poison):
    """Crashes while younger threads are deep in calls of their own."""

    async def run(self, ctx: Context) -> Done:
        for _ in range(20):
            threading.Thread(target=deep, args=(20,), daemon=True).start()
        ctypes.string_at(0)
        return Done()


def deep(more: int) -> None:
    if more:
        deep(more - 1)
    else:
        threading.Event().wait()


class Exit(Poison):
    code: int = 7

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        os._exit(self.code)


class DiesAfterwards(Poison):
    """Returns, and leaves a callback behind that kills the process."""

    suspends: bool

    async def run(self, ctx: Context) -> Done:
        if self.suspends:
            await mark(ctx, "begin")
        asyncio.get_running_loop().call_soon(os._exit, 9)
        return Done()


class LeavesADeath(Poison):
    """Ends at once, and leaves a timer behind that kills the process when a file exists."""

    path: str

    async def run(self, ctx: Context) -> Done:
        self.look()
        return Done()

    def look(self) -> None:
        if Path(self.path).exists():
            os._exit(9)
        asyncio.get_running_loop().call_later(0.01, self.look)


class KillsItsHost(Poison):
    """Kills all processes of its supervisor, and the supervisor."""

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        os.killpg(os.getpgrp(), signal.SIGKILL)
        return Done()


class NeedsRoom(Poison):
    """Ends its process if too many of its kind run there, like an out-of-memory kill."""

    most: int
    executing: ClassVar[int] = 0

    async def run(self, ctx: Context) -> Done:
        NeedsRoom.executing += 1
        if NeedsRoom.executing > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.5)
        NeedsRoom.executing -= 1
        return Done()


class ForksACrash(Poison):
    """Forks a process that crashes, and goes on."""

    async def run(self, ctx: Context) -> Done:
        if (pid := os.fork()) == 0:
            ctypes.string_at(0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV
        await mark(ctx, "begin")
        await asyncio.sleep(60)
        return Done()


class KillsItself(Poison):
    """Kills its process like the out-of-memory killer, also from a thread and without yielding to the loop."""

    async def run(self, ctx: Context) -> Done:
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class KillsItselfInThread(Poison):
    def run(self, ctx: Context) -> Done:
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class Recovers(Poison):
    """Kills its first process, and marks its run in the second."""

    path: str
    go: str

    async def run(self, ctx: Context) -> Done:
        if not Path(self.path).exists():
            Path(self.path).touch()
            os._exit(1)
        await mark(ctx, "alone")
        while not Path(self.go).exists():
            await asyncio.sleep(0.01)
        await mark(ctx, "alone no more")
        return Done()


class DiesLate(Poison):
    """Kills its process after some seconds, when other steps run beside it again."""

    seconds: float

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        await asyncio.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class Neighbours(Task):
    """A family of steps that run beside the poisoned ones."""


class Short(Neighbours):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "Short")
        return Done()


class Wide(Neighbours):
    """Marks its start and its end, to show the steps that ran beside it."""

    seconds: float = 0.05

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        await asyncio.sleep(self.seconds)
        await mark(ctx, "end")
        return Done()


class Gated(Neighbours):
    """A `Wide` that ends when its file exists."""

    path: str

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            await asyncio.sleep(0.01)
        await mark(ctx, "end")
        return Done()


class Follows(Neighbours):
    """Is followed by a `Wide`, when its file exists."""

    path: str

    async def run(self, ctx: Context) -> Next[Wide]:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            await asyncio.sleep(0.01)
        return Next(Wide())


class Chained(Neighbours):
    """Marks its number and continues with the next one. The first waits for its file, the last never ends."""

    path: str
    number: int = 0
    last: int = 3

    async def run(self, ctx: Context) -> Next[Chained]:
        await mark(ctx, f"step {self.number}")
        while (self.number == 0 and not Path(self.path).exists()) or self.number == self.last:
            await asyncio.sleep(0.01)
        return Next(Chained(self.path, self.number + 1, self.last))


class Begins(Neighbours):
    """Marks its start, then waits until it is cancelled or killed; ends at once if its file exists."""

    path: str = "/nonexistent"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            await asyncio.sleep(0.01)
        return Done()


class Blocked(Neighbours):
    """Blocks the loop from its first line until its file exists; writes a file when it begins."""

    path: str

    async def run(self, ctx: Context) -> Done:
        Path(f"{self.path}.{os.getpid()}").touch()
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class BlockedThread(Neighbours):
    """The same in a thread."""

    path: str

    def run(self, ctx: Context) -> Done:
        Path(f"{self.path}.{os.getpid()}").touch()
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class Threaded(Neighbours):
    """Runs in a thread until its file exists."""

    path: str = "/nonexistent"

    def run(self, ctx: Context) -> Done:
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class Overlong(Neighbours):
    """Times out at once, but its thread runs until its file exists."""

    policy = Policy(timeout=timedelta(milliseconds=50))
    path: str

    def run(self, ctx: Context) -> Done:
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class Stubborn(Neighbours):
    """Waits for its file, and has retries: a counted failure shows in its row."""

    policy = Policy(retry_limit=5)
    path: str = "/nonexistent"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, f"attempt {ctx.attempt}")
        while not Path(self.path).exists():
            await asyncio.sleep(0.01)
        return Done()


class One(Neighbours):
    number: int = 0

    async def run(self, ctx: Context) -> Next[Two]:
        return Next(Two(self.number))


class Two(Neighbours):
    number: int = 0

    async def run(self, ctx: Context) -> Next[Three]:
        await asyncio.sleep(0)
        return Next(Three(self.number))


class Three(Neighbours):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        return Done()


app = App(Poison, Neighbours)
