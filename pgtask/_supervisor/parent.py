"""The supervisor: forks the workers, watches them, replaces the dead and stops them all in time.

Invariants: no event loop, no thread, no user code (but what `--preload` imports) and no database connection here;
forks come from the main thread only. The table in `states` decides what happens to a worker, `orders` what a signal
means, `replace` who makes way for a fresh one; here things are seen and carried out. A worker that is gone is
forgotten. Every stop ends within grace + 5 seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import signal
import time
from collections.abc import Sequence
from typing import Any

from pgtask._cpus import allowed_cpus
from pgtask._events import log_event
from pgtask._supervisor.child import DUMP, Order, RunWorker, fork_child
from pgtask._supervisor.inbox import Inbox
from pgtask._supervisor.orders import Orders
from pgtask._supervisor.progress import Progress
from pgtask._supervisor.replace import Replacements
from pgtask._supervisor.source import Watched
from pgtask._supervisor.states import Action, Event, ExitCode, State, judge, react
from pgtask._supervisor.tally import Result, Tally
from pgtask._supervisor.undertaker import Undertakers
from pgtask._supervisor.watch import LOOK_EVERY, Watch
from pgtask._supervisor.worker import Worker, death, failure_of
from pgtask._worker.status import Notified, Ready, Sources, Stack, Tick
from pgtask.config import Config

__all__ = ["Result", "Supervisor"]

log = logging.getLogger("pgtask.supervisor")

PORTION = 8  # forks between two looks at the signals
LAST_RITES = 0.5  # seconds that are left to the undertakers when all workers are gone


class Supervisor:
    """The workers and the loop over them. `run` once, from the main thread; it returns when all are gone."""

    def __init__(
        self, config: Config, work: RunWorker, *, embedded: bool = False, progress: Progress | None = None
    ) -> None:
        self.config = config
        self._work = work
        self._embedded = embedded
        self._progress = progress
        self.workers = [Worker(number) for number in range(1, config.procs + 1)]
        self.replacements = Replacements(
            lambda number: self.add(number, trial=True), lambda worker: self.happen(worker, Event.STOP)
        )
        self._orders = Orders(self)
        self._watch = Watch(config)
        self._watched = Watched()
        self._cpus = allowed_cpus() if config.pin else []
        self._selector = selectors.PollSelector()  # unlike epoll, no descriptor that children share
        self._inbox = Inbox()
        # The children hold the first end. We alone hold the second: when it closes, they know we are gone.
        self._lifeline = (-1, -1)
        self.stopping = False
        self._tally = Tally()
        self._undertakers = Undertakers(config)

    def run(self) -> Result:
        began = time.monotonic()
        with self._inbox:
            self._lifeline = os.pipe()
            self._selector.register(self._inbox.reader, selectors.EVENT_READ)
            log_event(log, logging.INFO, "supervisor.started", procs=self.config.procs, app=self.config.app)
            try:
                while self.workers:
                    self._turn()
                self._await_undertakers()
            finally:
                if self._progress:
                    self._progress.erase()
                self._selector.close()
                for fd in self._lifeline:
                    os.close(fd)
        seconds = time.monotonic() - began
        if self._tally.killed:
            hint = "perhaps a step blocked its loop; their tasks were given back, and run again"
            log_event(log, logging.WARNING, "workers.killed", workers=self._tally.killed, hint=hint)
        log_event(log, logging.INFO, "supervisor.stopped", seconds=round(seconds, 3))
        return self._tally.result(seconds)

    def _turn(self) -> None:
        """Start and kill what is due, wait until something happens, and see to it."""
        now = time.monotonic()
        due = (worker for worker in self.workers if worker.slot.timer is not None and worker.slot.timer <= now)
        for worker in itertools.islice(due, PORTION):
            self.happen(worker, worker.slot.timed_event)
        signals: Sequence[signal.Signals] = ()
        with self._inbox.waiting():
            events = self._selector.select(self._until_next_timer())
        for key, _ in events:
            if key.data is None:
                signals = self._inbox.read()
            else:
                self._listen(key.data)
        for number in signals:
            handler = self if number is signal.SIGCHLD else self._orders
            getattr(handler, f"handle_{number.name[3:].lower()}")()
        self._look_after_all(time.monotonic())
        self.replacements.advance()
        self.workers = [worker for worker in self.workers if worker.slot.state is not State.GONE]
        if self._progress:
            self._progress.show(self._tally.totals(self.workers), self._tally.expected)

    def _until_next_timer(self) -> float | None:
        timers = [worker.slot.timer for worker in self.workers if worker.slot.timer is not None]
        wait = max(0.0, min(timers) - time.monotonic()) if timers else None
        if self._watch.is_needed or self.config.reload:
            wait = LOOK_EVERY if wait is None else min(wait, LOOK_EVERY)
        return wait

    def _look_after_all(self, now: float) -> None:
        """What no message says: whose loop is silent, who is over a limit, and whether the source has changed."""
        if self.stopping or not self._watch.is_time(now):
            return
        for worker, event in self._watch.silent(self.workers):
            self.happen(worker, event)
        for worker, cause, fields in self._watch.worn(self.workers, now):
            self.replacements.recycle(worker, cause, **fields)
        if self.config.reload and (file := self._watched.changed(now)):
            self.reload(f"changed {file}")

    # --- what can be ordered --------------------------------------------------------------------------------

    def add(self, number: int, *, trial: bool) -> Worker:
        """One more worker, to be started at the next turn."""
        worker = Worker(number, trial=trial)
        self.workers.append(worker)
        return worker

    def reload(self, cause: str) -> None:
        """Replace all workers, one at a time."""
        if self.config.preload:
            hint = "with --preload the code stays that of the start; restart the supervisor for fresh code"
            log_event(log, logging.WARNING, "reload.preloaded", hint=hint)
        self.replacements.reload(self.workers, cause)

    def stop(self, event: Event, cause: str, **fields: Any) -> None:
        """`event` happens to all: STOP or QUIT."""
        self.stopping = True
        self.replacements.cancel()
        log_event(log, logging.INFO, "supervisor.stopping", cause=cause, now=event is Event.QUIT, **fields)
        for worker in self.workers:
            self.happen(worker, event)

    def handle_chld(self) -> None:
        """Reap all the dead. PID 1 of a container is given strangers too; they are none of our business."""
        by_pid = {worker.process.pid: worker for worker in self.workers if worker.process}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                self._undertakers.reaped(pid)
                if pid in by_pid:
                    self._bury(by_pid[pid], os.waitstatus_to_exitcode(status))
        self._undertakers.send(self._lifeline[0], close=self._own_descriptors())

    # --- what happens to a worker ---------------------------------------------------------------------------

    def happen(self, worker: Worker, event: Event) -> None:
        worker.slot, action = react(worker.slot, event, time.monotonic(), grace=self.config.grace)
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
                self._tally.killed += self.stopping
                worker.was_killed = True
                worker.log(logging.WARNING, "worker.overdue")
                self._signal(worker, signal.SIGKILL)
            case Action.GIVE_UP:
                self._tally.failure = self._tally.failure or worker.failure
                self.stop(Event.STOP, "failure")
            case Action.KEEP_OLD:
                self.replacements.failed(worker, worker.failure[1])
            case Action.DUMP:
                worker.log(logging.WARNING, "worker.silent", silent=worker.silence, limit=self.config.stall)
                self._signal(worker, DUMP)
            case Action.DUMP_AND_TERMINATE:
                worker.log(logging.ERROR, "worker.stalled", silent=worker.silence)
                self._signal(worker, DUMP)
                self._signal(worker, signal.SIGTERM)

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        """Cannot hit a stranger: until we reap a child, its pid is not given to anybody else."""
        if worker.process:
            os.kill(worker.process.pid, number)

    def _spawn(self, worker: Worker) -> None:
        counts = self._progress is not None and self._tally.expected is None and worker.number == 1
        if counts:
            self._tally.count_begins(self.workers)
        cpu = self._cpus[(worker.number - 1) % len(self._cpus)] if self._cpus else None
        order = Order(worker.number, self._lifeline[0], counts, self._embedded, cpu)
        try:
            worker.process = fork_child(self.config, self._work, order, close=self._own_descriptors())
        except OSError as error:
            worker.log(logging.ERROR, "worker.not_forked", error=error)
            worker.failure = (ExitCode.BOOT, f"a worker could not be forked: {error}")
            self.happen(worker, Event.DIED)
            return
        worker.was_killed = False
        self._selector.register(worker.process.pipe, selectors.EVENT_READ, worker)
        worker.heard()
        worker.log(logging.DEBUG, "worker.started")

    def _own_descriptors(self) -> list[int]:
        """What no child may hold."""
        processes = [worker.process for worker in self.workers if worker.process]
        theirs = [fd for process in processes for fd in (process.pipe, process.crash.fileno())]
        return [self._inbox.reader, self._inbox.writer, self._lifeline[1], *theirs]

    def _listen(self, worker: Worker) -> None:
        process = worker.process
        if process is None or process.ended:
            return
        for message in process.read():
            if isinstance(message, Stack):
                worker.log(logging.WARNING, "worker.stack", stack=message.text)
                continue
            worker.heard()
            self.happen(worker, Event.HEARD)
            if isinstance(message, Ready):
                self.happen(worker, Event.READY)
                worker.log(logging.INFO, "worker.ready")
            elif isinstance(message, Sources):
                self._watched.add([message.directory])
            elif isinstance(message, Tick) and message.waiting is not None:
                self._tally.counted(message.waiting)
            elif isinstance(message, Notified) and not self.stopping:
                self.stop(Event.STOP, "stop_worker")  # also those that could not hear it, and the one that dies of it
        if process.ended:  # `waitpid` will say why
            self._selector.unregister(process.pipe)

    def _bury(self, worker: Worker, code: int) -> None:
        """Hear the last words of a dead process, let it go, and draw the conclusions."""
        self._listen(worker)
        process = worker.process
        assert process is not None
        if not process.ended:  # a process that the worker had started still holds the pipe
            self._selector.unregister(process.pipe)
        self._tally.bury(process)
        gone = process.gone
        worker.reason = gone.reason if gone else None
        before = worker.slot
        event = judge(before.state, code, worker.reason)
        words = gone.message if gone else None
        if event is Event.FAILED and (code != ExitCode.BOOT or before.state is State.READY):
            worker.failure = (ExitCode(code), words or "")
        else:
            worker.failure = (ExitCode.BOOT, failure_of(code, before, words))
        if event is Event.FAILED and before.state is State.STARTING and self._others_work(worker):
            event = Event.DIED  # its code was replaced by one that does not load: no reason to stop those that work
        worker.slot, action = react(worker.slot, event, time.monotonic(), grace=self.config.grace)
        wanted = self.stopping or before.state is State.STOPPING or before.trial
        stack = process.last_stacks(code)
        worker.log_end(event, code, words, stack=stack or None, wanted=wanted)
        if process.was_ready and (event is Event.DIED or code != ExitCode.OK or (gone and gone.held)):
            # Who left in order, with a thread still running, was told to: nothing is to blame. Nor if our kill was for
            # anything but the silence of its loop.
            charged = event is Event.DIED and (before.silent or not worker.was_killed)
            cause = death(code)
            if worker.was_killed and charged:
                cause, stack = f"its loop was silent for {self.config.stall:g} s (--stall)", process.stack
            self._undertakers.inherit(process, f"{cause}\n{stack}".rstrip(), charged=charged)
        process.close()
        worker.process = None
        self._carry_out(worker, action)

    def _others_work(self, worker: Worker) -> bool:
        """Whether this one was ready once, and another is."""
        return worker.slot.was_ready and any(other.slot.state is State.READY for other in self.workers)

    def _await_undertakers(self) -> None:
        """All workers are gone: let the last leases be given back, but not beyond the end of a stop."""
        until = time.monotonic() + LAST_RITES
        while self._undertakers.at_work and (left := until - time.monotonic()) > 0:
            if self._selector.select(left) and signal.SIGCHLD in self._inbox.read():
                self.handle_chld()
        self._undertakers.kill()
