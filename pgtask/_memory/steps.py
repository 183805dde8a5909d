"""Calls of the steps of workflows as in a worker, with faults where a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgtask._memory.dispatch import MemoryDispatch, current_run
from pgtask._memory.journal import MemoryJournal
from pgtask._worker.forked import end_if_copy
from pgtask._workflow.steps import StepRunner
from pgtask.errors import DefinitionError
from pgtask.policy import Policy

__all__ = ["MemoryStepRunner"]


class MemoryStepRunner(StepRunner):
    """Calls steps; with `replays`, puts each run back after each entry that it records, like a worker that leaves."""

    def __init__(self, dispatch: MemoryDispatch, journal: MemoryJournal, *, max_bytes: int, replays: bool) -> None:
        super().__init__(dispatch, dispatch.threads, max_bytes=max_bytes, end_if_copy=end_if_copy)
        self._dispatch = dispatch
        self._journal = journal
        self._replays = replays

    @property
    def is_draining(self) -> bool:
        return self._replays and current_run.get() in self._journal.recorded

    async def attempt(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], policy: Policy, is_async: bool
    ) -> tuple[Any, BaseException | None]:
        try:
            fault = self._dispatch.next_fault(name)
            if fault == "timeout":
                self._check_timeout(name, policy)
                return await self.call_step(name, function, args, policy, is_async=is_async, is_late=True), None
        except BaseException as error:
            return None, error
        try:
            return await super().attempt(name, function, args, policy, is_async)
        finally:
            if fault == "crash":
                self._dispatch.crashed.add(current_run.get())

    def _check_timeout(self, name: str, policy: Policy) -> None:
        if policy.timeout is None:
            refused = DefinitionError(f"step {name!r} cannot time out: its policy has no timeout")
            self._dispatch.fail_worker(refused)
            raise refused
