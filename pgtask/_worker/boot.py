"""boot: the program of a worker's process, from the fork to its end: prepare the process, import the app, work, exit.

Invariants: each failure leaves as one line in `ExitNotice` and an exit code. A process that user code forks never gets
beyond the point where it came back to this code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from pgtask._app_import import import_app, source_directories
from pgtask._fastpath import CounterPage, Marks
from pgtask._log import EventLog, LogHooks
from pgtask._status import (
    DUMP,
    ExitCode,
    ExitNotice,
    LoadedTasks,
    Message,
    Ready,
    SourceDirectory,
    StatusPipe,
    Tick,
    WorkerSpec,
    fit_message,
)
from pgtask._worker.at_exit import end_program, forget_inherited
from pgtask._worker.forked import end_if_copy, guard_forks
from pgtask._worker.parent_watch import exit_with_parent
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import AppLoadError, DatabaseRefused, PgtaskError

__all__ = ["RunWorker", "boot_worker"]

log = EventLog("pgtask.supervisor")


class RunWorker(Protocol):
    """The work: runs until it has a reason to leave, and returns the exit code of its process."""

    def __call__(
        self,
        config: Config,
        app: App,
        *,
        status: StatusPipe,
        parent_fd: int,
        counts_waiting: bool,
        embedded: bool,
        worker: bytes,
        marks: Marks,
        page: CounterPage | None,
    ) -> int: ...


def boot_worker(
    config: Config, spec: WorkerSpec, plain: Mapping[signal.Signals, Any], *, run: RunWorker, hooks: LogHooks
) -> int:
    """Be a worker, in a process that was just forked; return its exit code.

    `plain` maps signals to the handlers of a plain Python program. `hooks` keep the log of pgtask intact.
    """
    faulthandler.enable(spec.crash_fd)
    faulthandler.register(DUMP, spec.status_fd, chain=False)
    forget_inherited()
    guard_forks(plain, [spec.parent_fd, spec.status_fd, spec.crash_fd], dump=DUMP)
    os.register_at_fork(after_in_child=hooks.forget_counts)
    exit_with_parent(spec.parent_fd)
    _pin_to_cpu(spec)
    if spec.page is not None:
        spec.page.begin(os.getpid(), spec.number, time.time(), spec.worker)
    code = _load_and_run(config, spec, run, hooks)
    end_if_copy(None)
    end_program(code)
    return code


def _pin_to_cpu(spec: WorkerSpec) -> None:
    if spec.cpu is not None:
        try:
            os.sched_setaffinity(0, {spec.cpu})
        except OSError as error:  # it was taken from us since the start
            log.warning("worker.not_pinned", worker=spec.number, cpu=spec.cpu, error=error)


def _load_and_run(config: Config, spec: WorkerSpec, run: RunWorker, hooks: LogHooks) -> int:
    status = _BootStatus(spec.status_fd, hooks)
    try:
        app = _import_app(config, status)
        end_if_copy(None)
        hooks.restore_always()  # the import may have configured logging
        status.send(LoadedTasks(fit_message(", ".join(dict.fromkeys(definition.task for definition in app)))))
        return run(
            config,
            app,
            status=status,
            parent_fd=spec.parent_fd,
            counts_waiting=spec.counts_waiting,
            embedded=spec.embedded,
            worker=spec.worker,
            marks=spec.marks,
            page=spec.page,
        )
    except AppLoadError as error:
        return _report_failure(status, ExitCode.APP, str(error), error)
    except DatabaseRefused as error:
        return _report_failure(status, ExitCode.DATABASE, str(error), error)
    except PgtaskError as error:
        return _report_failure(status, ExitCode.BOOT, str(error), error)
    except BaseException as error:
        return _report_failure(status, ExitCode.BOOT, f"{type(error).__name__}: {error}", error, expected=False)


def _import_app(config: Config, status: _BootStatus) -> App:
    """Import the app. With `--reload`, send its directories, also if the import fails: a changed file may fix it."""
    if not config.reload:
        return import_app(config.app)
    # Python detects stale bytecode by a time in seconds, too coarse for two changes in one second.
    sys.dont_write_bytecode = True
    try:
        return import_app(config.app)
    finally:
        for directory in source_directories():
            status.send(SourceDirectory(directory))


class _BootStatus(StatusPipe):
    """A pipe that remembers two facts: the worker was ready, so a later failure is no boot failure; and it has sent its
    exit notice."""

    def __init__(self, fd: int, hooks: LogHooks) -> None:
        super().__init__(fd)
        self._hooks = hooks
        self.was_ready = False
        self.has_left = False

    def send(self, message: Message) -> None:
        self.was_ready = self.was_ready or isinstance(message, Ready)
        if isinstance(message, Ready | Tick):
            self._hooks.restore()  # the lifespan or a step may have configured logging
        super().send(message)
        self.has_left = self.has_left or isinstance(message, ExitNotice)


def _report_failure(
    status: _BootStatus, code: ExitCode, text: str, error: BaseException, *, expected: bool = True
) -> int:
    """Tell the parent, which prints the line once for all children. The traceback is for debugging."""
    end_if_copy(error)
    is_bug = status.was_ready and not expected
    log.log(logging.ERROR if is_bug else logging.DEBUG, "worker.failed", exc_info=error)
    if not status.has_left:
        status.send(ExitNotice(reason="failed", message=fit_message(text)))
    return code
