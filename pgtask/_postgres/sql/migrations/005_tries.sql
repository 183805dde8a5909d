-- Steps of runs that are to be tried again: their tries are counted, and the time of the next one is kept, in the
-- checkpoint that the result will complete. A constant default: no row is rewritten, however many there are.
ALTER TABLE pg_task_checkpoints ADD COLUMN IF NOT EXISTS tried integer NOT NULL DEFAULT 0;

COMMENT ON COLUMN pg_task_checkpoints.tried IS 'Of a step, its failed tries.';
COMMENT ON COLUMN pg_task_checkpoints.error IS 'Why a step failed for good, or with due_at why its last try failed; of a signal, that its time was over.';
COMMENT ON COLUMN pg_task_checkpoints.due_at IS 'When a sleep, or the wait for a signal, is over; of a step that has failed, when it is tried again.';
COMMENT ON COLUMN pg_task_checkpoints.recorded_at IS 'When it was last recorded.';
