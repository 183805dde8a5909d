"""Tasks that fork, start programs, and register exit handlers, for `test_processes`. They write marks as in `apps`.

They write their findings to files whose names they are given: a forked process has no database.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from apps import mark

from pgtask import App, Context, Done, Policy, Task, WorkflowContext, workflow

FORK = multiprocessing.get_context("fork")
SIGNALS = ("INT", "QUIT", "TERM", "HUP", "USR1", "USR2", "TTIN", "TTOU")

crunchers = ProcessPoolExecutor(2, mp_context=FORK)


def write(path: str, text: str) -> None:
    """Append a line, in one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Forks(Task):
    """A family of steps that must leave their worker unchanged."""


class Terminates(Forks):
    """Ends forked processes right after their start, so early that no hook in them may have run."""

    times: int = 30

    async def run(self, ctx: Context) -> Done:
        codes = set()
        for _ in range(self.times):
            process = FORK.Process(target=nap, args=(60,))
            process.start()
            process.terminate()
            await asyncio.to_thread(process.join)
            codes.add(process.exitcode)
        await mark(ctx, f"{codes}")
        return Done()


class FirstAnswer(Forks):
    """The exit of the pool ends its processes."""

    def run(self, ctx: Context) -> Done:
        with FORK.Pool(2) as pool:
            assert next(iter(pool.imap_unordered(nap, [0.01, 60, 60]))) == 0.01
        return Done()


class Breaks(Forks):
    """The executor ends the other processes when one has died."""

    async def run(self, ctx: Context) -> Done:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(2, mp_context=FORK) as pool:
            other = loop.run_in_executor(pool, nap, 60)
            for future in (loop.run_in_executor(pool, die), other):
                try:
                    await future
                except BrokenProcessPool as error:
                    await mark(ctx, type(error).__name__)
        return Done()


class Forked(Forks):
    """Forks a process that runs `what`; its exit code is the mark."""

    what: str
    path: str = ""

    async def run(self, ctx: Context) -> Done:
        if (pid := os.fork()) == 0:
            await misbehave(self.what, self.path)
            return Done()
        await mark(ctx, str(await asyncio.to_thread(ended, pid)))
        return Done()


class ForkedWhileOthersWait(Forked):
    """The same, after it was suspended: other steps may be next in the loop."""

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(0)
        return await Forked.run(self, ctx)


class ForkedInBranch(Forked):
    """The same in a task of asyncio's."""

    async def run(self, ctx: Context) -> Done:
        async with asyncio.TaskGroup() as group:
            group.create_task(Forked.run(self, ctx))
        return Done()


class ForkedInThread(Forks):
    what: str
    path: str

    def run(self, ctx: Context) -> Done:
        if (pid := os.fork()) == 0:
            asyncio.run(misbehave(self.what, self.path))
            return Done()
        write(self.path, f"code {ended(pid)}")
        return Done()


async def misbehave(what: str, path: str) -> None:
    match what:
        case "raises":
            raise LookupError("in the copy")
        case "exits":
            sys.exit(7)
        case "exits with words":
            sys.exit("words of the copy")
        case "awaits":
            await asyncio.sleep(0)
            write(path, "went on")
        case "reports":
            write(path, json.dumps(report()))
            os._exit(0)


@workflow("forking", policy=Policy())
async def forking(ctx: WorkflowContext, what: str) -> str:
    return await ctx.step("fork", fork_in_a_step, what)


@workflow("forking_in_thread", policy=Policy())
async def forking_in_thread(ctx: WorkflowContext, what: str) -> str:
    return await ctx.step("fork", fork_in_thread, what)


def fork_in_thread(what: str) -> str:
    if (pid := os.fork()) == 0:
        asyncio.run(misbehave(what, ""))
        return "of the copy"
    return str(ended(pid))


async def fork_in_a_step(what: str) -> str:
    if (pid := os.fork()) == 0:
        await misbehave(what, "")
        return "of the copy"
    return str(await asyncio.to_thread(ended, pid))


def report() -> dict[str, Any]:
    """Return the signals and descriptors that this process has inherited."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    ignored, blocked = int(status["SigIgn"], 16), int(status["SigBlk"], 16)
    numbers = {name: getattr(signal, f"SIG{name}") for name in SIGNALS}
    handlers = {name: str(getattr(signal.getsignal(number), "__name__", "")) for name, number in numbers.items()}
    return {
        "ignored": [name for name, number in numbers.items() if ignored >> (number - 1) & 1],
        "blocked": blocked,
        "handlers": {name: handler for name, handler in handlers.items() if handler},
        "wakeup": signal.set_wakeup_fd(-1),
        "faulthandler": faulthandler.is_enabled(),
        "links": links(),
    }


def links(pid: int | str = "self") -> list[str]:
    """Return the targets of a process's descriptors, beyond the standard three."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if int(fd) > 2:
                found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return found


class Reports(Forks):
    """Reports the inheritance of forked processes, from the loop and from a thread, and of started programs."""

    path: str

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("SELECT 1")
        write(self.path, json.dumps({"worker": {"links": links()}, "supervisor": {"links": links(os.getppid())}}))
        if (pid := os.fork()) == 0:
            write(self.path, json.dumps({"forked": report()}))
            os._exit(0)
        await asyncio.to_thread(ended, pid)
        process = FORK.Process(target=reports, args=(self.path, "multiprocessing"))
        await asyncio.to_thread(process.start)
        await asyncio.to_thread(process.join)
        program = f"import forks; forks.reports({self.path!r}, 'NAME')"
        command = (sys.executable, "-c")
        hooked: dict[str, Any] = {"preexec_fn": nothing}
        for name, options in {"popen": {}, "preexec": hooked, "open": {"close_fds": False}}.items():
            words = [*command, program.replace("NAME", name)]
            await asyncio.to_thread(partial(subprocess.run, words, check=True, **options))
        for name, options in {"asyncio": {}, "asyncio preexec": hooked}.items():
            started = await asyncio.create_subprocess_exec(*command, program.replace("NAME", name), **options)
            assert await started.wait() == 0
        return Done()


def nothing() -> None:
    pass


def reports(path: str, name: str) -> None:
    write(path, json.dumps({name: report()}))


class Interrupts(Forks):
    """SIGINT ends a program, as it does from a plain one."""

    async def run(self, ctx: Context) -> Done:
        started: list[Any] = [
            subprocess.Popen(["sleep", "60"]),  # noqa: ASYNC220 - a user may
            subprocess.Popen(["sleep", "60"], preexec_fn=nothing),  # noqa: ASYNC220
            await asyncio.create_subprocess_exec("sleep", "60"),
            await asyncio.create_subprocess_exec("sleep", "60", preexec_fn=nothing),
        ]
        codes = []
        for one in started:
            one.send_signal(signal.SIGINT)
            codes.append(one.wait() if isinstance(one, subprocess.Popen) else await one.wait())
        await mark(ctx, f"{codes}")
        return Done()


class RunsProgram(Forks):
    """Fails when its program is interrupted, as `subprocess.run(check=True)` does."""

    def run(self, ctx: Context) -> Done:
        with subprocess.Popen(["sleep", "60"]) as program:
            Path("started").touch()
            if program.wait():
                raise subprocess.CalledProcessError(program.returncode, "sleep")
        return Done()


class UsesItsOwn(Forks):
    """A forked process works on what it has, closes all, opens other things and is garbage-collected, while the worker
    goes on with its connections."""

    def run(self, ctx: Context) -> Done:
        process = FORK.Process(target=collect)
        process.start()
        process.join()
        assert process.exitcode == 0, process.exitcode
        return Done()


def collect() -> None:
    import gc

    files = [tempfile.TemporaryFile() for _ in range(20)]  # noqa: SIM115
    gc.unfreeze()
    for one in gc.get_objects():
        if type(one).__name__ in ("Connection", "TCPTransport", "UnixTransport") and hasattr(one, "close"):
            try:
                getattr(one, "terminate", getattr(one, "abort", one.close))()
            except Exception:
                continue
    gc.collect()
    for file in files:
        file.write(b"x")
        file.close()


class Crunch(Forks):
    """Uses the executor of the module; its processes go to a file."""

    path: str

    async def run(self, ctx: Context) -> Done:
        assert await asyncio.get_running_loop().run_in_executor(crunchers, nap, 0.0) == 0.0
        write(self.path, " ".join(map(str, [os.getpid(), *crunchers._processes])))
        return Done()


class Waits(Forks):
    """Says that it has begun, then waits until it is cancelled."""

    name: str = "waits"

    async def run(self, ctx: Context) -> Done:
        await mark(ctx, self.name)
        await asyncio.Event().wait()
        return Done()


class LeavesToDo(Forks):
    """Registers each kind of exit handler; each writes a line."""

    path: str

    async def run(self, ctx: Context) -> Done:
        atexit.register(write, self.path, "atexit of a step")
        queue = ThreadPoolExecutor(1)
        queue.submit(nap, 0.1)
        queue.submit(write, self.path, "queued in a thread")
        FORK.Process(target=write_later, args=(self.path, "of a process")).start()
        daemon = FORK.Process(target=nap, args=(60,), daemon=True)
        daemon.start()
        directory = tempfile.TemporaryDirectory()
        KEPT.append(directory)
        write(self.path, f"directory {directory.name}")
        write(self.path, f"daemon {daemon.pid}")
        return Done()


KEPT: list[Any] = []


def write_later(path: str, text: str) -> None:
    time.sleep(0.2)
    write(path, text)


class Hangs(Forks):
    """Registers an exit handler that does not end."""

    what: str
    path: str

    async def run(self, ctx: Context) -> Done:
        atexit.register(write, self.path, "before")  # they run in the opposite order
        match self.what:
            case "atexit":
                atexit.register(time.sleep, 600)
            case "executor":
                crunchers.submit(nap, 600)
            case "process":
                FORK.Process(target=stubborn).start()
            case "thread":
                ThreadPoolExecutor(1).submit(nap, 600)
            case "plain thread":
                threading.Thread(target=nap, args=(600,)).start()
            case _:
                asyncio.get_running_loop().run_in_executor(None, nap, 600)
        children = [*(crunchers._processes or ()), *(child.pid for child in multiprocessing.active_children())]
        write(self.path, " ".join(map(str, children)))
        return Done()


def stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    yield
    if path := os.environ.get("FORKS_LIFESPAN"):
        write(path, "lifespan")


if path := os.environ.get("FORKS_LIFESPAN"):
    atexit.register(write, path, "atexit of the module")

app = App(Forks, forking, forking_in_thread, lifespan=lifespan)
