# cython: language_level=3, freethreading_compatible=False
"""The compiled hot path: the work that the engine does once for each task.

One unit of compilation, in parts that follow the way of a row:

- `codec`, `table`: from an envelope to its step, and back.
- `lease`, `marks`: the tasks that this worker holds, and those that it executes.
- `outcomes`: the buffer of the flush.
- `pages`: the counters, in shared memory.
- `dispatcher`, `runner`: starting and driving steps.
- `transitions`: from the end of a step to its outcome.
- `copy`: bulk enqueue.
- `check`: reading a whole table.
- `causes`: folding the errors of parked tasks.

The types are in `_fastpath.pyi`, the oracle for tests in `tests/support/reference.py`.

Invariants:
- A lease is in `Leases` from its claim until its outcome is in the database, or until it is lost or released.
- Every lease that starts ends in `Outcomes` exactly once, or is lost.
- A step is marked from before its first line until after its last, on the loop and in threads; the step of a suspect
  stays marked until its group is over and its outcome is in the database.
- The worker's loop calls all methods, except those of `Leases` that are marked as safe for the renewing thread.
"""

cimport cython
from libc.string cimport memcpy, memset

import asyncio

import msgspec

include "_fastpath/codec.pyx"
include "_fastpath/table.pyx"
include "_fastpath/lease.pyx"
include "_fastpath/marks.pyx"
include "_fastpath/outcomes.pyx"
include "_fastpath/pages.pyx"
include "_fastpath/dispatcher.pyx"
include "_fastpath/transitions.pyx"
include "_fastpath/runner.pyx"
include "_fastpath/copy.pyx"
include "_fastpath/check.pyx"
include "_fastpath/causes.pyx"
