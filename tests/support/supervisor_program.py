"""A program for `fix_supervisor`: the real supervisor with workers that follow a script.

    python -W error tests/support/supervisor_program.py DESCRIPTOR BEHAVIOUR SETTINGS_AS_JSON

Each event is a line `pid what` on DESCRIPTOR, the journal. Every process inherits it, so its end means that all
processes are gone. A line is one write, so lines do not mix.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pgtask._cli.logging import HOOKS, configure
from pgtask._cli.progress import share_terminal
from pgtask._log import LogEvent
from pgtask._status import ExitNotice, Ready, StatusPipe, StopNotice, Tick, Totals
from pgtask._supervisor.parent import Supervisor
from pgtask._worker.boot import boot_worker
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import AppLoadError, DatabaseRefused

JOURNAL = int(sys.argv[1])


def journal(what: str) -> None:
    os.write(JOURNAL, f"{os.getpid()} {what}\n".encode())


class ToJournal(logging.Handler):
    """Writes the supervisor's events to the journal, and stops the supervisor at the first event `stop_at`."""

    def __init__(self, stop_at: str) -> None:
        super().__init__()
        self._stop_at = stop_at

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, LogEvent):
            journal(f"log {record.msg}")
            if record.msg.name == self._stop_at:
                self._stop_at = ""
                os.kill(os.getpid(), signal.SIGTERM)


class Orders:
    """The orders to a worker: TERM, QUIT, or the end of its parent."""

    def __init__(self, parent_fd: int) -> None:
        self._parent_fd = parent_fd
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.wakeup_before = signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)

    def wait(self) -> str:
        while self.reader in select.select([self.reader, self._parent_fd], [], [])[0]:
            number = signal.Signals(os.read(self.reader, 1)[0])
            if number in (signal.SIGTERM, signal.SIGQUIT):
                return number.name
        return "orphaned"


def first_time(name: str) -> bool:
    """Tell if no process has asked for this name before, in this directory."""
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def obedient(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    journal(orders.wait())
    status.send(ExitNotice("drained"))
    return 0


def stubborn(status: StatusPipe, orders: Orders) -> int:
    """Leave only when told to stop now."""
    status.send(Ready())
    while (order := orders.wait()) != "SIGQUIT":
        journal(order)
    journal(order)
    status.send(ExitNotice("drained"))
    return 0


def deaf(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    while True:
        journal(orders.wait())


def silent(status: StatusPipe, orders: Orders) -> int:
    """Never get ready."""
    journal("booting")
    journal(orders.wait())
    return 0


def crashes_once(status: StatusPipe, orders: Orders) -> int:
    if first_time("crashed"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return obedient(status, orders)


def crashes_at_boot(status: StatusPipe, orders: Orders) -> int:
    os.kill(os.getpid(), signal.SIGABRT)
    return 0


def fails_at_boot(status: StatusPipe, orders: Orders) -> int:
    raise TypeError("two\nlines")


def is_refused(status: StatusPipe, orders: Orders) -> int:
    raise DatabaseRefused("run: pgtask migrate")


def is_refused_later(status: StatusPipe, orders: Orders) -> int:
    """Lose the database permanently after one of the workers was ready."""
    status.send(Ready())
    if first_time("refused"):
        raise DatabaseRefused("permission denied")
    journal(orders.wait())
    status.send(ExitNotice("drained"))
    return 0


def is_refused_for_a_while(status: StatusPipe, orders: Orders) -> int:
    """Be ready in the first process. The others follow the file `answer`: they wait for it, and may be refused."""
    if first_time("ready"):
        return obedient(status, orders)
    while not Path("answer").exists():
        select.select([], [], [], 0.02)
    if Path("answer").read_text() == "refused":
        raise DatabaseRefused("no more sessions")
    return obedient(status, orders)


def exits_on_its_own(status: StatusPipe, orders: Orders) -> int:
    """End the process with one of our codes, as user code can: a death like any other."""
    status.send(Ready())
    if first_time("exited"):
        os._exit(5)
    return obedient(status, orders)


def breaks_later(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    if first_time("broke"):
        raise TypeError("a bug of ours")
    return obedient(status, orders)


def is_notified(status: StatusPipe, orders: Orders) -> int:
    """Hear the notification in the first worker; the others are not listening yet."""
    if first_time("notified"):
        status.send(Ready())
        status.send(StopNotice())
        status.send(ExitNotice("notified"))
        return 0
    journal(orders.wait())
    status.send(ExitNotice("drained"))
    return 0


def bursts(status: StatusPipe, orders: Orders) -> int:
    """Do ten tasks and leave; the first worker is killed after seven of them."""
    status.send(Ready())
    status.send(Tick(Totals(done=7, steps=21), waiting=20))
    if first_time("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    status.send(ExitNotice("burst", Totals(done=10, steps=30, errors=1, parked=1), parked_left=1))
    return 0


def prints(status: StatusPipe, orders: Orders) -> int:
    """Print as steps do, while the supervisor draws the progress."""
    status.send(Ready())
    status.send(Tick(Totals(done=1), waiting=2))
    for number in range(100):
        print("line", number)
        print("error", number, file=sys.stderr)
        status.send(Tick(Totals(done=1, steps=number)))
    status.send(ExitNotice("burst", Totals(done=2)))
    return 0


def prints_in_two(status: StatusPipe, orders: Orders) -> int:
    """Print half a line, then the other half when the test has seen the progress after the first."""
    status.send(Ready())
    print("the beginning", end="", flush=True)
    while not Path("drawn").exists():
        status.send(Tick(Totals(done=8, steps=8), waiting=20))
        select.select([], [], [], 0.02)
    print("the end")
    status.send(ExitNotice("burst", Totals(done=9)))
    return 0


def has_done_something(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    status.send(Tick(Totals(done=3, steps=5, errors=2, parked=1)))
    journal("ticked")
    journal(orders.wait())
    status.send(ExitNotice("drained"))
    return 0


def lists_descriptors(status: StatusPipe, orders: Orders) -> int:
    """Count the descriptors: the standard three, the journal, the status pipe, the lifeline, the crash file, the two
    ends of the leash for forked processes; and those of the test."""
    orders_and_listing = 3
    journal(f"descriptors {len(os.listdir('/dev/fd')) - orders_and_listing}")
    return obedient(status, orders)


def shows_itself(status: StatusPipe, orders: Orders) -> int:
    of_groups = (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1)
    for number in of_groups:
        signal.raise_signal(number)  # does nothing
    ignored = [number.name for number in of_groups if signal.getsignal(number) is signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    journal("self " + json.dumps({
        "random": random.random(),
        "path": sys.path[0],
        "ignored": ignored,
        "blocked": len(blocked),
        "wakeup": orders.wakeup_before,
    }))  # fmt: skip
    return obedient(status, orders)


def follows_a_file(status: StatusPipe, orders: Orders) -> int:
    """Follow the file `code`: fail to load, crash, never get ready, or end right after that."""
    code = Path("code").read_text()
    if code == "hangs":
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
    journal(f"code {code}")
    match code:
        case "broken":
            raise AppLoadError("app 'x': it is broken")
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs":
            signal.pause()
        case "dies":
            status.send(Ready())
            os.kill(os.getpid(), signal.SIGSEGV)
        case "refused":
            status.send(Ready())
            raise DatabaseRefused("no such column")
    return obedient(status, orders)


def writes_to_the_terminal(status: StatusPipe, orders: Orders) -> int:
    """Write to the terminal, and so does a program that it starts."""
    status.send(Ready())
    for number in range(100):
        print("from a worker", number, flush=True)
    subprocess.run(["echo", "from a program"], check=True)
    journal("written")
    journal(orders.wait())
    status.send(ExitNotice("drained"))
    return 0


def does_tasks(status: StatusPipe, orders: Orders) -> int:
    """Do ten tasks in each process; in a burst the third process finds no work left, when the second has left."""
    status.send(Ready())
    status.send(Tick(Totals(done=10, steps=30)))
    is_first = first_time("first")
    if not (is_first or first_time("second")):
        while not Path("drained").exists():
            select.select([], [], [], 0.02)
        status.send(ExitNotice("burst", Totals(done=10, steps=30)))
        return 0
    journal(orders.wait())
    if not is_first:
        Path("drained").touch()
    status.send(ExitNotice("drained", Totals(done=11, steps=33)))
    return 0


def falls_silent(status: StatusPipe, orders: Orders) -> int:
    """Block in the first process, and ignore TERM; tick in the next one."""
    status.send(Ready())
    if first_time("silent"):
        blocks_forever()
    while not select.select([orders.reader], [], [], 0.1)[0]:
        status.send(Tick(Totals()))
    status.send(ExitNotice("drained"))
    return 0


def blocks_forever() -> None:
    journal("blocked")
    while True:
        time.sleep(60)


def shows_its_cpus(status: StatusPipe, orders: Orders) -> int:
    journal(f"cpus {sorted(os.sched_getaffinity(0))}")
    return obedient(status, orders)


def holds_its_pipe(status: StatusPipe, orders: Orders) -> int:
    """Leave a process behind that still holds the status pipe."""
    status.send(Ready())
    if first_time("left"):
        if os.fork() == 0:
            orders.wait()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return obedient(status, orders)


def main(behaviour: str, settings: dict[str, Any]) -> int:
    progress = share_terminal() if settings.pop("progress", False) else None
    stranger = settings.pop("stranger", False)
    configure("text", settings.pop("log_level", "info"))
    logging.getLogger("pgtask").addHandler(ToJournal(settings.pop("stop_at", "")))
    config = Config(**{"app": "greetings:app", "grace": 5.0, **settings})

    def work(config: Config, app: App, *, status: StatusPipe, parent_fd: int, **_: Any) -> int:
        code: int = globals()[behaviour](status, Orders(parent_fd))
        return code

    if stranger and os.fork() == 0:
        os._exit(3)
    began = time.monotonic()
    result = Supervisor(config, functools.partial(boot_worker, run=work, hooks=HOOKS), progress=progress).run()
    assert result.seconds <= time.monotonic() - began
    if result.message is not None:
        print(result.message)
    print(json.dumps({"done": result.totals.done, "steps": result.totals.steps, "finished": result.finished}))
    return result.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[2], json.loads(sys.argv[3])))
