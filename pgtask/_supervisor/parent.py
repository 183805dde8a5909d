"""The supervisor: forks the workers, watches them, replaces the dead and stops them all in time.

Invariants: no event loop, no thread, no user code and no database connection here; forks come from the main
thread only. A signal handler leaves a byte in a pipe and does nothing else; `handle_<signal>` runs from the
loop. The table in `states` decides; here things are seen and carried out. Every stop ends within grace + 5
seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import selectors
import signal
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from pgtask._events import log_event
from pgtask._supervisor.child import Order, Process, RunWorker, combine, fork_child
from pgtask._supervisor.inbox import Inbox
from pgtask._supervisor.progress import Progress, ended
from pgtask._supervisor.states import BOOT_TRIES, Action, Event, ExitCode, Slot, State, judge, react
from pgtask._worker.status import Ready, Tick, Totals
from pgtask.config import Config

__all__ = ["Result", "Supervisor"]

log = logging.getLogger("pgtask.supervisor")

PORTION = 8  # forks between two looks at the signals


class Result(msgspec.Struct, frozen=True):
    """How it ended: the exit code, the line of a failure, the sums over all processes, and how long it took.

    `finished` tells a burst that ran to its end from one that was stopped. `parked_left` as in `Gone`.
    """

    code: ExitCode
    message: str | None
    totals: Totals
    finished: bool
    seconds: float
    parked_left: int


class Worker:
    """A slot of the fleet, the process in it now, and how the one before ended."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.slot = Slot()
        self.process: Process | None = None
        self.reason: str | None = None
        self.failure = (ExitCode.BOOT, "")


class Supervisor:
    """N slots and the loop over them. `run` once, from the main thread; it returns when all are gone."""

    def __init__(
        self, config: Config, work: RunWorker, *, embedded: bool = False, progress: Progress | None = None
    ) -> None:
        self._config = config
        self._work = work
        self._embedded = embedded
        self._progress = progress
        self._workers = [Worker(number) for number in range(1, config.procs + 1)]
        self._selector = selectors.PollSelector()  # unlike epoll, no descriptor that children share
        self._inbox = Inbox()
        # The children hold the first end. We alone hold the second: when it closes, they know we are gone.
        self._lifeline = (-1, -1)
        self._had_terminal = _has_terminal()
        self._orders_to_stop = 0
        self._stopping = False
        self._failure: tuple[ExitCode, str] | None = None
        self._parked_left = 0
        self._killed = 0
        self._buried = Totals()
        self._expected: int | None = None  # tasks of a burst, once a worker has counted them
        self._ended_before_count = 0

    def run(self) -> Result:
        began = time.monotonic()
        with self._inbox:
            self._lifeline = os.pipe()
            self._selector.register(self._inbox.reader, selectors.EVENT_READ)
            log_event(log, logging.INFO, "supervisor.started", procs=self._config.procs, app=self._config.app)
            try:
                while any(worker.slot.state is not State.GONE for worker in self._workers):
                    self._turn()
            finally:
                if self._progress:
                    self._progress.erase()
                self._selector.close()
                for fd in self._lifeline:
                    os.close(fd)
        seconds = time.monotonic() - began
        if self._killed:
            lease = f"{self._config.lease_timeout:g} s"
            hint = f"perhaps a step blocked its loop; their leases end within {lease}, then others run those tasks"
            log_event(log, logging.WARNING, "workers.killed", workers=self._killed, hint=hint)
        log_event(log, logging.INFO, "supervisor.stopped", seconds=round(seconds, 3))
        return self._result(seconds)

    def _turn(self) -> None:
        """Start and kill what is due, wait until something happens, and see to it."""
        now = time.monotonic()
        due = (worker for worker in self._workers if worker.slot.timer is not None and worker.slot.timer <= now)
        for worker in itertools.islice(due, PORTION):
            self._happen(worker, worker.slot.timed_event)
        signals: Sequence[signal.Signals] = ()
        for key, _ in self._selector.select(self._until_next_timer()):
            if key.data is None:
                signals = self._inbox.read()
            else:
                self._listen(key.data)
        for number in signals:
            getattr(self, f"handle_{number.name[3:].lower()}")()
        if self._progress:
            self._progress.show(self._totals(), self._expected)

    def _until_next_timer(self) -> float | None:
        timers = [worker.slot.timer for worker in self._workers if worker.slot.timer is not None]
        return max(0.0, min(timers) - time.monotonic()) if timers else None

    # --- signals --------------------------------------------------------------------------------------------

    def handle_term(self, name: str = "SIGTERM") -> None:
        """The first order drains, the second stops now."""
        self._orders_to_stop += 1
        if self._orders_to_stop > 1:
            self._stop(Event.QUIT, name)
            return
        again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
        hint = f"waiting up to {self._config.grace:g} s for the steps that run; {again} stops now"
        self._stop(Event.STOP, name, hint=hint)

    def handle_int(self) -> None:
        self.handle_term("SIGINT")

    def handle_hup(self) -> None:
        """A closed terminal stops us, or we would be left behind unseen. Anybody else's is ignored."""
        if self._had_terminal and not _has_terminal():
            self.handle_term("SIGHUP")
        else:
            self._ignore("SIGHUP")

    def handle_usr1(self) -> None:
        """A line for each worker; what it has done is as of its last tick."""
        for worker in self._workers:
            totals = worker.process.totals if worker.process else Totals()
            fields = {"state": worker.slot.state.value, **msgspec.structs.asdict(totals)}
            self._log(logging.INFO, "worker.status", worker, **fields)

    def handle_usr2(self) -> None:
        self._ignore("SIGUSR2")

    def handle_ttin(self) -> None:
        self._ignore("SIGTTIN")

    def _ignore(self, name: str) -> None:
        log_event(log, logging.WARNING, "signal.ignored", signal=name)

    def handle_quit(self) -> None:
        self._stop(Event.QUIT, "SIGQUIT")

    def handle_chld(self) -> None:
        """Reap all the dead. PID 1 of a container is given strangers too; they are none of our business."""
        by_pid = {worker.process.pid: worker for worker in self._workers if worker.process}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid in by_pid:
                    self._bury(by_pid[pid], os.waitstatus_to_exitcode(status))

    # --- what happens to a worker ---------------------------------------------------------------------------

    def _happen(self, worker: Worker, event: Event) -> None:
        worker.slot, action = react(worker.slot, event, time.monotonic(), grace=self._config.grace)
        self._carry_out(worker, action)

    def _carry_out(self, worker: Worker, action: Action) -> None:
        match action:
            case Action.SPAWN:
                self._spawn(worker)
            case Action.TERMINATE:
                self._signal(worker, signal.SIGTERM)
            case Action.QUIT:
                self._signal(worker, signal.SIGQUIT)
            case Action.KILL:
                self._killed += 1
                self._log(logging.WARNING, "worker.overdue", worker)
                self._signal(worker, signal.SIGKILL)
            case Action.GIVE_UP:
                self._failure = self._failure or worker.failure
                self._stop(Event.STOP, "failure")

    def _stop(self, event: Event, cause: str, **fields: Any) -> None:
        self._stopping = True
        log_event(log, logging.INFO, "supervisor.stopping", cause=cause, now=event is Event.QUIT, **fields)
        for worker in self._workers:
            self._happen(worker, event)

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        """Cannot hit a stranger: until we reap a child, its pid is not given to anybody else."""
        if worker.process:
            os.kill(worker.process.pid, number)

    def _spawn(self, worker: Worker) -> None:
        counts = self._progress is not None and self._expected is None and worker is self._workers[0]
        if counts:
            self._ended_before_count = ended(self._totals())
        order = Order(worker.number, self._lifeline[0], counts, self._embedded)
        siblings = [other.process.pipe for other in self._workers if other.process]
        try:
            worker.process = fork_child(
                self._config,
                self._work,
                order,
                close=[self._inbox.reader, self._inbox.writer, self._lifeline[1], *siblings],
            )
        except OSError as error:
            self._log(logging.ERROR, "worker.not_forked", worker, error=error)
            worker.failure = (ExitCode.BOOT, f"a worker could not be forked: {error}")
            self._happen(worker, Event.DIED)
            return
        self._selector.register(worker.process.pipe, selectors.EVENT_READ, worker)
        self._log(logging.DEBUG, "worker.started", worker)

    def _listen(self, worker: Worker) -> None:
        process = worker.process
        if process is None or process.ended:
            return
        for message in process.read():
            if isinstance(message, Ready):
                self._happen(worker, Event.READY)
                self._log(logging.INFO, "worker.ready", worker)
            elif isinstance(message, Tick) and message.waiting is not None:
                self._expected = self._ended_before_count + message.waiting
        if process.ended:  # `waitpid` will say why
            self._selector.unregister(process.pipe)

    def _bury(self, worker: Worker, code: int) -> None:
        """Hear the last words of a dead process, let it go, and draw the conclusions."""
        self._listen(worker)
        process = worker.process
        assert process is not None
        if not process.ended:  # a process that the worker had started still holds the pipe
            self._selector.unregister(process.pipe)
        os.close(process.pipe)
        self._buried = combine(operator.add, self._buried, process.totals)
        gone = process.gone
        worker.reason = gone.reason if gone else None
        self._parked_left = max(self._parked_left, gone.parked_left if gone else 0)
        event = judge(worker.slot.state, code, worker.reason)
        words = gone.message if gone else None
        if event is Event.FAILED and (code != ExitCode.BOOT or worker.slot.state is State.READY):
            worker.failure = (ExitCode(code), words or "")
        else:
            worker.failure = (ExitCode.BOOT, f"a worker could not start: {words or _cause(code)}")
        worker.slot, action = react(worker.slot, event, time.monotonic(), grace=self._config.grace)
        self._log_end(worker, event, code, words)
        worker.process = None
        self._carry_out(worker, action)
        if worker.reason == "notified" and not self._stopping:
            # For those that could not hear it, because they were just starting.
            self._stop(Event.STOP, "stop_worker")

    def _log_end(self, worker: Worker, event: Event, code: int, words: str | None) -> None:
        fields: dict[str, Any] = {"signal": _signal_name(code)} if code < 0 else {"exit": code}
        if event is Event.LEFT and words:
            self._log(logging.ERROR, "worker.gone", worker, reason=worker.reason, error=words)
        elif event is Event.LEFT:
            self._log(logging.INFO, "worker.gone", worker, reason=worker.reason)
        elif event is Event.FAILED:  # said once, by whoever prints the result
            self._log(logging.DEBUG, "worker.gone", worker, reason=worker.reason, **fields)
        elif self._stopping:
            self._log(logging.INFO, "worker.gone", worker, **fields)
        else:
            if code == -signal.SIGKILL:
                fields["hint"] = "out of memory?"
            if words:
                fields["error"] = words
            if worker.slot.timer is not None:
                fields["restart_in"] = round(worker.slot.timer - time.monotonic(), 3)
            self._log(logging.ERROR, "worker.died", worker, **fields)

    def _log(self, level: int, event: str, worker: Worker, **fields: Any) -> None:
        pid = worker.process.pid if worker.process else None
        log_event(log, level, event, worker=worker.number, pid=pid, **fields)

    # --- the sum of it --------------------------------------------------------------------------------------

    def _totals(self) -> Totals:
        totals = self._buried
        for worker in self._workers:
            if worker.process:
                totals = combine(operator.add, totals, worker.process.totals)
        return totals

    def _result(self, seconds: float) -> Result:
        # A worker says so when nobody holds a task: that others were told to stop just then changes nothing.
        finished = self._failure is None and any(worker.reason == "burst" for worker in self._workers)
        code, message = self._failure or (ExitCode.OK, None)
        if finished and self._parked_left:
            code = ExitCode.PARKED
        return Result(code, message, self._totals(), finished, seconds, self._parked_left)


def _has_terminal() -> bool:
    """Whether there is a controlling terminal; none is left when it has been closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def _cause(code: int) -> str:
    how = f"was killed by {_signal_name(code)}" if code < 0 else f"ended with exit code {code}"
    return f"it {how} before it was ready, {BOOT_TRIES} times in a row"
