"""The debug mode in which the tests run: checks that cost something on the hot path, or end a worker.

Invariant: a check changes nothing. A failed one ends its worker, so that the supervisor releases the leases.
"""

from __future__ import annotations

import os

__all__ = ["CHECKS_INVARIANTS"]

CHECKS_INVARIANTS = bool(os.environ.get("_PGTASK_CHECK_INVARIANTS"))
