"""Tasks that kill their worker, for the tests of the crash story. Marks are written as in `apps`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

from apps import mark

from pgtask import App, Context, Done, Next, Policy, Task


class Poison(Task):
    """Each of these is the end of a process."""


class Segfault(Poison):
    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        ctypes.string_at(0)
        return Done()


class SegfaultAmongThreads(Poison):
    """Younger threads are deep in calls of their own."""

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
    """Has returned when a callback that it left behind kills the process."""

    suspends: bool

    async def run(self, ctx: Context) -> Done:
        if self.suspends:
            await mark(ctx, "begin")
        asyncio.get_running_loop().call_soon(os._exit, 9)
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
    """As the kernel does it when memory is out. Also from a thread, and without ever giving the loop a turn."""

    async def run(self, ctx: Context) -> Done:
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class KillsItselfInThread(Poison):
    def run(self, ctx: Context) -> Done:
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class Recovers(Poison):
    """Kills its first process, and says when it runs in the second."""

    path: str
    seconds: float = 0.3

    async def run(self, ctx: Context) -> Done:
        if not Path(self.path).exists():
            Path(self.path).touch()
            os._exit(1)
        await mark(ctx, "alone")
        await asyncio.sleep(self.seconds)
        await mark(ctx, "alone no more")
        return Done()


class DiesLate(Poison):
    """Kills its process when it has had company again."""

    seconds: float

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        await asyncio.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)
        return Done()


class Neighbours(Task):
    """What runs beside them."""


class Short(Neighbours):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "Short")
        return Done()


class Wide(Neighbours):
    """Says when it begins and when it ends, so that it shows what ran beside it."""

    seconds: float = 0.05

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        await asyncio.sleep(self.seconds)
        await mark(ctx, "end")
        return Done()


class Begins(Neighbours):
    """Says that it has begun, then waits until it is cancelled or killed; once there is a file, it ends at once."""

    path: str = "/nonexistent"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, "begin")
        while not Path(self.path).exists():
            await asyncio.sleep(0.01)
        return Done()


class Blocked(Neighbours):
    """Holds the loop from its first line on, of which a file tells, until there is another."""

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
    """In a thread, until there is a file."""

    path: str = "/nonexistent"

    def run(self, ctx: Context) -> Done:
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class Overlong(Neighbours):
    """Given up at once, but its thread goes on until there is a file."""

    policy = Policy(timeout=timedelta(milliseconds=50))
    path: str

    def run(self, ctx: Context) -> Done:
        while not Path(self.path).exists():
            time.sleep(0.01)
        return Done()


class Stubborn(Neighbours):
    """Retried, if it were charged for it."""

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
