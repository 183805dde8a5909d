"""Tasks under a limit, and their app: the other workloads are measured without one."""

from __future__ import annotations

from bench.workloads.worker_report import report_worker
from pgtask import App, Context, Done, Limit, Policy, Task

__all__ = ["NothingKeyed", "app"]


class NoopKeyed(Task):
    """One step that does nothing, under a limit with 10,000 keys that none of them reaches."""


class NothingKeyed(NoopKeyed):
    policy = Policy(limit=Limit("bench", key=lambda step: step.number % 10_000, concurrency=1_000))
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


app = App(NoopKeyed, lifespan=report_worker)
