"""Calling the steps of workflows as the worker does, with faults put where a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgtask._memory.dispatch import MemoryDispatch, current_run
from pgtask._memory.journal import MemoryJournal
from pgtask._worker.calls import Calls
from pgtask.errors import DefinitionError
from pgtask.policy import Policy

__all__ = ["MemoryCalls"]


class MemoryCalls(Calls):
    """With `replays`, each run is given back after whatever it has recorded, as by a worker that leaves."""

    def __init__(self, dispatch: MemoryDispatch, journal: MemoryJournal, *, most_bytes: int, replays: bool) -> None:
        super().__init__(dispatch, dispatch.threads, most_bytes=most_bytes)
        self._dispatch = dispatch
        self._journal = journal
        self._replays = replays

    @property
    def is_draining(self) -> bool:
        return self._replays and current_run.get() in self._journal.recorded

    async def call(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        policy: Policy,
        *,
        is_async: bool,
        is_late: bool = False,
    ) -> Any:
        fault = self._dispatch.next_fault(name)
        if fault == "timeout" and policy.timeout is None:
            refused = DefinitionError(f"step {name!r} cannot time out: its policy has no timeout")
            self._dispatch.broke(refused)
            raise refused
        try:
            return await super().call(name, function, args, policy, is_async=is_async, is_late=fault == "timeout")
        finally:
            if fault == "crash":
                self._dispatch.crashed.add(current_run.get())
