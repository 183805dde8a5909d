"""A check of new code against all that waits in the table: `pgtask check`.

Theory of operation. A worker that runs new code fails on an old row in two ways: it cannot decode the step, or the
function of a workflow asks for other things than its run has recorded. `rows` decodes each row by the dispatch table
of a worker. `replay` calls the function of each run with the context of a worker, whose journal and steps are cut
off: the context answers what is recorded, and each other call waits. When all branches wait, the replay is over. So
no step runs, and nothing is written. `dump` writes all of this to a file, and reads it. `causes` folds what would
break by its cause; `remedies` says what to do about it.

Invariant: nothing here decides by itself whether something fits: the decoders, the history and the context of a worker
do.
"""
