"""A program for `test_supervisor`: the real supervisor with workers that behave as the test wants.

    python -W error tests/supervisor_program.py DESCRIPTOR BEHAVIOUR SETTINGS_AS_JSON

Everything that happens is a line `pid what` on DESCRIPTOR, the journal. Every process inherits it, so that its end
says that all of them are gone. A line is one write, so lines do not mix.
"""

from __future__ import annotations

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

from pgtask._events import Event
from pgtask._supervisor.logs import configure
from pgtask._supervisor.parent import Supervisor
from pgtask._supervisor.progress import share_terminal
from pgtask._worker.status import Gone, Notified, Ready, StatusPipe, Tick, Totals
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import AppLoadError, DatabaseRefused

JOURNAL = int(sys.argv[1])


def journal(what: str) -> None:
    os.write(JOURNAL, f"{os.getpid()} {what}\n".encode())


class ToJournal(logging.Handler):
    """The names of the supervisor's events, so that a test can wait for one; at the first `stop_at` it is stopped."""

    def __init__(self, stop_at: str) -> None:
        super().__init__()
        self._stop_at = stop_at

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, Event):
            journal(f"log {record.msg}")
            if record.msg.name == self._stop_at:
                self._stop_at = ""
                os.kill(os.getpid(), signal.SIGTERM)


class Orders:
    """What a worker is told: TERM, QUIT, or the end of its parent."""

    def __init__(self, parent_fd: int) -> None:
        self._parent_fd = parent_fd
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.wakeup_before = signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)

    def wait(self) -> str:
        ready, _, _ = select.select([self.reader, self._parent_fd], [], [])
        if self.reader in ready:
            return signal.Signals(os.read(self.reader, 1)[0]).name
        return "orphaned"


def first_time(name: str) -> bool:
    """Whether no process has asked this before in this directory."""
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def obedient(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    journal(orders.wait())
    status.send(Gone("drained"))
    return 0


def stubborn(status: StatusPipe, orders: Orders) -> int:
    """Leaves only when told to stop now."""
    status.send(Ready())
    while (order := orders.wait()) != "SIGQUIT":
        journal(order)
    journal(order)
    status.send(Gone("drained"))
    return 0


def deaf(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    while True:
        journal(orders.wait())


def silent(status: StatusPipe, orders: Orders) -> int:
    """Never gets ready."""
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
    """One of the workers loses the database for good after it was ready."""
    status.send(Ready())
    if first_time("refused"):
        raise DatabaseRefused("permission denied")
    journal(orders.wait())
    status.send(Gone("drained"))
    return 0


def exits_on_its_own(status: StatusPipe, orders: Orders) -> int:
    """User code that ends the process with one of our codes: an accident like any other."""
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
    """The first worker hears the notification; the others were not listening yet."""
    if first_time("notified"):
        status.send(Ready())
        status.send(Notified())
        status.send(Gone("notified"))
        return 0
    journal(orders.wait())
    status.send(Gone("drained"))
    return 0


def bursts(status: StatusPipe, orders: Orders) -> int:
    """Does ten tasks and leaves; but the first worker is killed after seven of them."""
    status.send(Ready())
    status.send(Tick(Totals(done=7, steps=21), waiting=20))
    if first_time("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    status.send(Gone("burst", Totals(done=10, steps=30, errors=1, parked=1), parked_left=1))
    return 0


def prints(status: StatusPipe, orders: Orders) -> int:
    """Prints as steps do, while the progress is drawn."""
    status.send(Ready())
    status.send(Tick(Totals(done=1), waiting=2))
    for number in range(100):
        print("line", number)
        print("error", number, file=sys.stderr)
        status.send(Tick(Totals(done=1, steps=number)))
    status.send(Gone("burst", Totals(done=2)))
    return 0


def prints_in_two(status: StatusPipe, orders: Orders) -> int:
    """Prints half a line, then the other half when the test has seen the progress after the first."""
    status.send(Ready())
    print("the beginning", end="", flush=True)
    while not Path("drawn").exists():
        status.send(Tick(Totals(done=8, steps=8), waiting=20))
        select.select([], [], [], 0.02)
    print("the end")
    status.send(Gone("burst", Totals(done=9)))
    return 0


def has_done_something(status: StatusPipe, orders: Orders) -> int:
    status.send(Ready())
    status.send(Tick(Totals(done=3, steps=5, errors=2, parked=1)))
    journal("ticked")
    journal(orders.wait())
    status.send(Gone("drained"))
    return 0


def lists_descriptors(status: StatusPipe, orders: Orders) -> int:
    """The standard three, the journal, its status pipe the lifeline; and those of the test."""
    orders_and_listing = 3
    journal(f"descriptors {len(os.listdir('/dev/fd')) - orders_and_listing}")
    return obedient(status, orders)


def shows_itself(status: StatusPipe, orders: Orders) -> int:
    of_groups = (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2)
    ignored = [n.name for n in of_groups if signal.getsignal(n) is signal.SIG_IGN]
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
    """The file `code` is its code: it may not load, crash, never get ready, or end right after that."""
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
    """And so does a program that it starts."""
    status.send(Ready())
    for number in range(100):
        print("from a worker", number, flush=True)
    subprocess.run(["echo", "from a program"], check=True)
    journal("written")
    journal(orders.wait())
    status.send(Gone("drained"))
    return 0


def does_tasks(status: StatusPipe, orders: Orders) -> int:
    """Ten tasks each, while it is told to go on; in a burst the third process finds nothing left to do, when the
    second has left."""
    status.send(Ready())
    status.send(Tick(Totals(done=10, steps=30)))
    is_first = first_time("first")
    if not (is_first or first_time("second")):
        while not Path("drained").exists():
            select.select([], [], [], 0.02)
        status.send(Gone("burst", Totals(done=10, steps=30)))
        return 0
    journal(orders.wait())
    if not is_first:
        Path("drained").touch()
    status.send(Gone("drained", Totals(done=11, steps=33)))
    return 0


def falls_silent(status: StatusPipe, orders: Orders) -> int:
    """The first process blocks, deaf to TERM; the one that follows ticks."""
    status.send(Ready())
    if first_time("silent"):
        blocks_for_ever()
    while not select.select([orders.reader], [], [], 0.1)[0]:
        status.send(Tick(Totals()))
    status.send(Gone("drained"))
    return 0


def blocks_for_ever() -> None:
    journal("blocked")
    while True:
        time.sleep(60)


def shows_its_cpus(status: StatusPipe, orders: Orders) -> int:
    journal(f"cpus {sorted(os.sched_getaffinity(0))}")
    return obedient(status, orders)


def holds_its_pipe(status: StatusPipe, orders: Orders) -> int:
    """Leaves a process behind that still holds the status pipe."""
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
    result = Supervisor(config, work, progress=progress).run()
    assert result.seconds <= time.monotonic() - began
    if result.message is not None:
        print(result.message)
    print(json.dumps({"done": result.totals.done, "steps": result.totals.steps, "finished": result.finished}))
    return result.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[2], json.loads(sys.argv[3])))
