"""The parts of `pgtask.testing`: the tables and the loop of a worker, in memory."""
