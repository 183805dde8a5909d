-- Replace the step of the task $1 by $2: the call that has failed, with its failures. The transaction of the step
-- `Failed` sends it, and then parks the task, so a person who clears the error has the function called again.
--
-- Plan: the row by the primary key. It locks that row, which is leased by the worker of this transaction.
UPDATE pg_task
SET step = $2
WHERE id = $1
