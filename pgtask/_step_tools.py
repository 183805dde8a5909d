"""The part of a worker that the contexts of its steps reach, beside the pool and the resources.

Invariant: there is one object of it for each worker, made before the first step starts; a context only passes calls on.
"""

from __future__ import annotations

from typing import Any

__all__ = ["StepTools"]


class StepTools:
    """What `ctx.client`, `ctx.transaction()`, `ctx.progress()` and `ctx.charge()` use. An attribute is None where there
    is none."""

    def __init__(
        self, *, client: Any = None, transactions: Any = None, progress: Any = None, charge: Any = None
    ) -> None:
        self.client = client
        self.transactions = transactions
        self.progress = progress
        self.charge = charge
