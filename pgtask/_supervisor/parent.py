"""The supervisor: forks the workers, watches them, replaces the dead, and stops them all in time.

Invariants: no event loop, no thread, no database connection and no user code here, except the import of `--preload`;
forks come from the main thread only. `states` decides the life of a worker, `signals` the meaning of a signal,
`rolling_restart` the order of replacements; this module observes and performs. It forgets a worker in GONE. Every stop
ends within grace + 5 seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import selectors
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pgtask._cpus import allowed_cpus
from pgtask._log import EventLog
from pgtask._status import (
    DUMP,
    ExitCode,
    LoadedTasks,
    Message,
    Ready,
    SourceDirectory,
    Stack,
    StopNotice,
    Tick,
    Totals,
)
from pgtask._supervisor.child import ChildProcess, StartWorker, fork_child
from pgtask._supervisor.exporter import Exporter
from pgtask._supervisor.outage import Outage
from pgtask._supervisor.reaper import Reapers
from pgtask._supervisor.rolling_restart import RollingRestart
from pgtask._supervisor.sd_notify import SdNotify
from pgtask._supervisor.signal_pipe import SignalPipe
from pgtask._supervisor.signals import SignalHandlers
from pgtask._supervisor.slot import SupervisedWorker
from pgtask._supervisor.source import SourceWatcher
from pgtask._supervisor.states import INTERRUPTIONS, STOP_MARGIN, Action, Event, FleetState, State, transition
from pgtask._supervisor.totals import FleetTotals, Result
from pgtask._supervisor.watchdog import CHECK_INTERVAL, Watchdog
from pgtask.config import Config

__all__ = ["ProgressLine", "Result", "Supervisor"]

log = EventLog("pgtask.supervisor")

ANNOUNCE_AFTER = 1.0  # seconds to wait for the names of the app's tasks
MAX_FORKS = 8  # between two reads of the signals
REAPER_GRACE = 0.5  # seconds that the reapers have when all workers are gone, also after a stop that took its time
MAX_REAPER_GRACE = 4.0  # and after one that took less


class ProgressLine(Protocol):
    """The progress of a burst on a terminal."""

    def draw(self, totals: Totals, expected: int | None) -> None: ...

    def erase(self) -> None: ...


class Supervisor:
    """The workers and the loop over them. Call `run` once, from the main thread.

    `start` is the program of a worker. `embedded` tells workers that they may create the schema. `exporter` serves the
    metrics, if there are any; `manager` is the service manager, if there is one.
    """

    def __init__(
        self,
        config: Config,
        start: StartWorker,
        *,
        embedded: bool = False,
        progress: ProgressLine | None = None,
        exporter: Exporter | None = None,
        manager: SdNotify | None = None,
    ) -> None:
        self.config = config
        self._start = start
        self._embedded = embedded
        self._progress = progress
        self._exporter = exporter
        self._manager = manager or SdNotify({})
        self.workers = [SupervisedWorker(number) for number in range(1, config.procs + 1)]
        self.stopping = False
        self.restart = RollingRestart(self.add_on_trial, self.drain)
        self.handlers = SignalHandlers(
            grace=config.grace,
            restart=self.restart,
            workers=lambda: self.workers,
            is_stopping=lambda: self.stopping,
            add=self.add_on_trial,
            remove=self.drain,
            reload=self.reload,
            stop=self.stop,
        )
        self._watchdog = Watchdog(config)
        self._watcher = SourceWatcher()
        self._outage = Outage()
        self._cpus = allowed_cpus() if config.pin else []
        self._selector = selectors.PollSelector()  # unlike epoll, no descriptor that children share
        self._signals = SignalPipe()
        # The children hold the first end, we alone the second: when it closes, they know that we are gone.
        self._lifeline = (-1, -1)
        self._totals = FleetTotals()
        self._reapers = Reapers(config)
        self._was_ready = False  # any worker, at any time
        self._stop_ends = math.inf
        """The time (monotonic seconds) at which a stop has ended, with its reapers; without a stop, never."""
        self._announce_at: float | None = None
        """The time to log the start at the latest; None when it is logged."""

    def run(self) -> Result:
        """Supervise until all workers are gone."""
        began = time.monotonic()
        with self._signals:
            self._lifeline = os.pipe()
            self._selector.register(self._signals.reader, selectors.EVENT_READ)
            self._announce_at = began + ANNOUNCE_AFTER
            try:
                while self.workers:
                    self._run_once()
                self._await_reapers()
            finally:
                if self._exporter:
                    self._exporter.kill()
                if self._progress:
                    self._progress.erase()
                self._selector.close()
                for fd in self._lifeline:
                    os.close(fd)
        seconds = time.monotonic() - began
        if self._totals.killed:
            hint = "perhaps a step blocked its loop; their tasks were released, and run again"
            log.warning("workers.killed", workers=self._totals.killed, hint=hint)
        log.info("supervisor.stopped", seconds=round(seconds, 3))
        return self._totals.result(seconds)

    def _announce_start(self, **tasks: str) -> None:
        """Log the start once: when a worker has sent the names of the app's tasks, or has failed to load them."""
        if self._announce_at is None:
            return
        self._announce_at = None
        config = self.config
        fields: dict[str, Any] = {"procs": config.procs, "app": config.app, "queues": ", ".join(config.queue) or "all"}
        fields |= {"concurrency": config.concurrency, **tasks}
        log.info("supervisor.started", **fields)

    def _run_once(self) -> None:
        """Handle the timers that are due, wait for the next event, and handle it."""
        now = time.monotonic()
        self._manager.advance(now)
        if self._exporter:
            self._exporter.advance(now, self._lifeline[0], self._own_descriptors, self.stopping)
        if self._announce_at is not None and self._announce_at <= now:
            self._announce_start()
        due = (worker for worker in self.workers if worker.slot.timer is not None and worker.slot.timer <= now)
        for worker in itertools.islice(due, MAX_FORKS):
            self.handle_event(worker, worker.slot.timed_event)
        signals: Sequence[signal.Signals] = ()
        with self._signals.waiting():
            events = self._selector.select(self._until_next_timer())
        for key, _ in events:
            if key.data is None:
                signals = self._signals.read_signals()
            else:
                self._read_messages(key.data)
        for number in signals:
            if number is signal.SIGCHLD:
                self._handle_deaths()
            else:
                self.handlers.handle(number)
        self._check_workers(time.monotonic())
        if not self.stopping:
            work = "burst" if self.config.burst else "work"
            hint = f"the {work} continues when the database is available; Ctrl-C stops"
            self._outage.log_if_due(time.monotonic(), hint=hint)
        self.restart.advance()
        self.workers = [worker for worker in self.workers if worker.slot.state is not State.GONE]
        if self._progress:
            self._progress.draw(self._totals.sum_up(self.workers), self._totals.expected)

    def _until_next_timer(self) -> float | None:
        timers = [worker.slot.timer for worker in self.workers if worker.slot.timer is not None]
        timers += [] if self._announce_at is None else [self._announce_at]
        timers += [self._exporter.next_at] if self._exporter else []
        timers += [self._manager.next_at] if self._manager.is_watching else []
        if self._outage.next_line is not None and not self.stopping:
            timers.append(self._outage.next_line)
        wait = max(0.0, min(timers) - time.monotonic()) if timers else None
        if self._watchdog.is_needed or self.config.reload:
            wait = CHECK_INTERVAL if wait is None else min(wait, CHECK_INTERVAL)
        return wait

    def _check_workers(self, now: float) -> None:
        """Check for silent workers, workers over a limit, and changed source files: no message reports them."""
        if self.stopping or not self._watchdog.is_due(now):
            return
        for worker, event in self._watchdog.silent_workers(self.workers):
            self.handle_event(worker, event)
        for worker, cause, fields in self._watchdog.over_limit(self.workers, now):
            self.restart.recycle(worker, cause, **fields)
        if self.config.reload and (file := self._watcher.find_change(now)):
            self.reload(f"changed {file}")

    # --- orders ---------------------------------------------------------------------------------------------

    def add_on_trial(self, number: int) -> SupervisedWorker:
        """Add a worker on trial, to be started in the next turn of the loop."""
        worker = SupervisedWorker(number, trial=True)
        self.workers.append(worker)
        return worker

    def drain(self, worker: SupervisedWorker) -> None:
        """Tell a worker to finish its steps and leave."""
        self.handle_event(worker, Event.STOP)

    def reload(self, cause: str) -> None:
        """Replace all workers, one at a time."""
        if self.config.preload:
            hint = "--preload pins the code loaded at startup; restart the supervisor to load new code"
            log.warning("reload.preloaded", hint=hint)
        self.restart.reload(self.workers, cause)

    def stop(self, event: Event, cause: str, **fields: Any) -> None:
        """Apply STOP or QUIT to all workers. A burst then ends with the exit code that `cause` has in a shell."""
        if self.config.burst and not self.stopping:
            self._totals.interrupted = INTERRUPTIONS.get(cause, ExitCode.TERMINATED)
        self.stopping = True
        grace = 0.0 if event is Event.QUIT else self.config.grace
        self._stop_ends = min(self._stop_ends, time.monotonic() + grace + STOP_MARGIN + REAPER_GRACE)
        self._announce_start()
        self._manager.note_stopping()
        self.restart.cancel()
        log.info("supervisor.stopping", cause=cause, now=event is Event.QUIT, **fields)
        for worker in self.workers:
            self.handle_event(worker, event)

    # --- events of a worker ---------------------------------------------------------------------------------

    def handle_event(self, worker: SupervisedWorker, event: Event) -> None:
        worker.slot, action = transition(worker.slot, event, time.monotonic(), grace=self.config.grace)
        self.perform(worker, action)

    def perform(self, worker: SupervisedWorker, action: Action) -> None:
        match action:
            case Action.SPAWN:
                self._fork_worker(worker)
            case Action.TERMINATE:
                worker.send_signal(signal.SIGTERM)
            case Action.QUIT:
                worker.send_signal(signal.SIGQUIT)
            case Action.KILL:
                self._totals.killed += self.stopping
                worker.log(logging.WARNING, "worker.overdue")
                worker.kill()
            case Action.GIVE_UP:
                self._totals.failure = self._totals.failure or worker.failure
                self.stop(Event.STOP, "failure")
            case Action.ABORT_REPLACEMENT:
                self.restart.abort_replacement(worker, worker.failure[1])
            case Action.DUMP:
                silence, limit = worker.silence, self.config.stall
                worker.log(logging.WARNING, "worker.silent", silent=silence, limit=limit, **worker.executing_tasks())
                worker.send_signal(DUMP)
            case Action.DUMP_AND_TERMINATE:
                worker.log(logging.ERROR, "worker.stalled", silent=worker.silence, **worker.executing_tasks())
                worker.send_signal(DUMP)
                worker.send_signal(signal.SIGTERM)

    def _fork_worker(self, worker: SupervisedWorker) -> None:
        counts_waiting = self._progress is not None and self._totals.expected is None and worker.number == 1
        if counts_waiting:
            self._totals.begin_count(self.workers)
        if self._exporter:
            worker.page = self._exporter.take_page()
        try:
            worker.process = fork_child(
                self.config,
                self._start,
                worker.number,
                parent_fd=self._lifeline[0],
                counts_waiting=counts_waiting,
                embedded=self._embedded,
                cpu=self._cpus[(worker.number - 1) % len(self._cpus)] if self._cpus else None,
                page=worker.page.page if worker.page else None,
                close=self._own_descriptors(),
            )
        except OSError as error:
            self._give_back_page(worker)
            worker.log(logging.ERROR, "worker.not_forked", error=error)
            worker.failure = (ExitCode.BOOT, f"a worker could not be forked: {error}")
            self.handle_event(worker, Event.DIED)
            return
        self._selector.register(worker.process.pipe, selectors.EVENT_READ, worker)
        worker.end_silence()
        worker.log(logging.DEBUG, "worker.started")

    def _give_back_page(self, worker: SupervisedWorker) -> None:
        if self._exporter and worker.page:
            self._exporter.give_back(worker.page)
        worker.page = None

    def _own_descriptors(self) -> list[int]:
        """Return the descriptors that no child may hold."""
        processes = [worker.process for worker in self.workers if worker.process]
        theirs = [fd for process in processes for fd in (process.pipe, process.crash.fileno())]
        ours = [self._signals.reader, self._signals.writer, self._lifeline[1]]
        return [*ours, *theirs, *(self._exporter.descriptors if self._exporter else [])]

    def _read_messages(self, worker: SupervisedWorker) -> None:
        process = worker.process
        if process is None or process.ended:
            return
        for message in process.read_messages():
            if isinstance(message, Stack):
                worker.log(logging.WARNING, "worker.stack", stack=message.text)
            else:
                self._handle_message(worker, process, message)
        if process.ended:  # SIGCHLD follows
            self._selector.unregister(process.pipe)

    def _handle_message(self, worker: SupervisedWorker, process: ChildProcess, message: Message) -> None:
        worker.end_silence()
        self.handle_event(worker, Event.HEARD)
        if isinstance(message, Ready):
            self._was_ready = True
            self._manager.note_ready()
            self.handle_event(worker, Event.READY)
            worker.log(logging.INFO, "worker.ready")
        elif isinstance(message, LoadedTasks):
            self._announce_start(tasks=message.tasks)
        elif isinstance(message, SourceDirectory):
            self._watcher.add_directories([message.directory])
        elif isinstance(message, Tick):
            self._outage.report(process.pid, message.unavailable, time.monotonic())
            if message.waiting is not None:
                self._totals.end_count(message.waiting)
        elif isinstance(message, StopNotice) and not self.stopping:
            # Workers that do not listen stop as well; and if this one crashes now, its death is wanted.
            self.stop(Event.STOP, "stop_worker")

    # --- deaths ---------------------------------------------------------------------------------------------

    def _handle_deaths(self) -> None:
        """Collect all dead processes, and start a reaper for the leases that they held."""
        by_pid = {worker.process.pid: worker for worker in self.workers if worker.process}
        for pid, status in _reap_all():
            self._reapers.discard(pid)
            if self._exporter:
                self._exporter.discard(pid, status)
            if worker := by_pid.get(pid):
                self._collect(worker, worker.process, status)
        self._reapers.start(self._lifeline[0], close=self._own_descriptors())

    def _collect(self, worker: SupervisedWorker, process: ChildProcess | None, status: int) -> None:
        """Read the last messages of a dead process; then decide about its slot and its leases."""
        assert process is not None
        self._read_messages(worker)
        self._announce_start()
        if not process.ended:  # a process that the worker had started still holds the pipe
            self._selector.unregister(process.pipe)
        others_work = any(other is not worker and other.slot.state is State.READY for other in self.workers)
        fleet = FleetState(others_work, self._was_ready)
        death, action = worker.collect(status, grace=self.config.grace, stopping=self.stopping, fleet=fleet)
        self._give_back_page(worker)
        self._outage.report(death.pid, None, time.monotonic())
        self._totals.add_finished(death)
        self._reapers.add(death)
        self.perform(worker, action)

    def reapers_end(self, now: float) -> float:
        """Return the time until which the reapers may work if the last worker is gone `now`."""
        return max(now + REAPER_GRACE, min(self._stop_ends, now + MAX_REAPER_GRACE))

    def _await_reapers(self) -> None:
        """Wait until the last leases are released, but not beyond the end of a stop."""
        until = self.reapers_end(time.monotonic())
        while self._reapers.are_running and (left := until - time.monotonic()) > 0:
            if self._selector.select(left) and signal.SIGCHLD in self._signals.read_signals():
                self._handle_deaths()
        self._reapers.kill_all()


def _reap_all() -> Iterator[tuple[int, int]]:
    """Reap all dead children: yield pid and status of each. PID 1 of a container also inherits strangers."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            yield pid, status
