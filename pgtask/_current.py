"""The current step, for the lines that the step itself, its asyncio Tasks and its threads log.

Invariant: only the engine sets it, in the context of the step, so nothing needs to be reset.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

__all__ = ["current_checkpoint", "current_lease", "current_step", "executing"]

executing: Callable[[], Any] = lambda: None  # noqa: E731 - the engine puts its own here
"""Returns the lease whose step has the loop of this thread: the only source for steps that never suspend."""

current_lease: ContextVar[Any] = ContextVar("pgtask_lease")
current_checkpoint: ContextVar[str] = ContextVar("pgtask_checkpoint")
"""The name of the step that a workflow is in; empty between two steps."""


def current_step() -> dict[str, Any]:
    """Return the `task` and `step` at work here, and `checkpoint` in a step of a workflow; empty outside of steps."""
    lease = current_lease.get(None) or executing()
    if lease is None:
        return {}
    leases = getattr(lease, "leases", (lease,))  # of the call of a batch
    if len(leases) != 1:
        return {"step": lease.label, "tasks": len(leases)} if leases else {"step": lease.label}
    fields = {"task": leases[0].id, "step": lease.label}
    if checkpoint := current_checkpoint.get(""):
        fields["checkpoint"] = checkpoint
    return fields
