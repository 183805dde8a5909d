"""Tasks that enqueue others in their outcomes, under kills: each node of a tree finishes exactly once.

By hand, with a larger tree and more kills: PGTASK_TREE=1000,1000 PGTASK_TREE_KILLS=50 pytest tests/faults/test_trees.py
"""

from __future__ import annotations

import contextlib
import os
import random

import psutil
import pytest
import trees
from fleet import Fleet, Rows, put

WIDTHS = [int(width) for width in os.environ.get("PGTASK_TREE", "30,30").split(",")]
KILLS = int(os.environ.get("PGTASK_TREE_KILLS", "6"))
PATIENCE = 60 + trees.size(WIDTHS) / 500


def kill_one(fleet: Fleet) -> None:
    """Kill a worker, in the middle of what it does."""
    while not (workers := fleet.family()):
        fleet.until("worker.ready")
    with contextlib.suppress(psutil.NoSuchProcess):
        random.choice(workers).kill()


@pytest.mark.timeout(int(4 * PATIENCE))
def test_tree_finishes_exactly_once_under_kills(dsn: str, rows: Rows) -> None:
    """The ledger is written by the statement that finishes a task, so it shows a node that was inserted twice."""
    nodes = trees.size(WIDTHS)
    for statement in trees.LEDGER:
        rows(statement)
    put(dsn, trees.Node("0", WIDTHS))
    with Fleet(dsn, "--burst", "--concurrency", "50", app="trees:app", procs=2) as fleet:
        for number in range(KILLS):
            share = nodes * (number + 1) // (KILLS + 2)
            rows.until("SELECT count(*) >= $1 FROM ledger", share, timeout=PATIENCE)
            kill_one(fleet)
        assert fleet.ends(PATIENCE) == 0, fleet.output
    assert fleet.output.count("worker.exited") >= 1
    assert rows.value("SELECT count(*) FROM pg_task") == 0, "a burst ends when the new tasks are finished"
    assert rows("SELECT count(*), count(DISTINCT step) FROM ledger") == [(nodes, nodes)]
