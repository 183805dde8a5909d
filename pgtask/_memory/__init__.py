"""What is behind `pgtask.testing`: the table and the worker's loop, in memory."""
