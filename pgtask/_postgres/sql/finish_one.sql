-- Finish the task $1 under the token $2, in the transaction of its step. It deletes nothing if the lease was lost, or if the
-- step has ended its transaction and begun another one: then the caller asks which.
--
-- Sent as text with its values, so the server plans it for the table as it is now; a plan that is kept would need the
-- settings of fence.sql. The settings here are those that no plan needs.
SET LOCAL lock_timeout = '2s';
SET LOCAL statement_timeout = '30s';
SET LOCAL pgtask.nowait = 'on';
SET LOCAL search_path TO DEFAULT;
SET LOCAL role TO DEFAULT;
DELETE FROM pg_task
WHERE id = $1
  AND locked_by IS NOT DISTINCT FROM $2
  AND current_setting('pgtask.transaction', true) = 'on'
