-- Read the parked tasks that the filter $2 to $7 chooses, for a COPY: the id, the time of its parking, and the beginnings of
-- the step and of the first line of the error of each. $1 is true.
--
-- Plan: one scan, of the table or of the index of parked tasks. `left` counts characters, which takes longer than all else
-- does: it is for long texts only.
SELECT
    id,
    wakeup_at,
    CASE WHEN octet_length(step) <= 2000 THEN step ELSE left(step, 512) END,
    split_part(CASE WHEN octet_length(error) <= 2000 THEN error ELSE left(error, 2000) END, E'\n', 1)
FROM pg_task
WHERE error IS NOT NULL
      AND $1::boolean
-- include: shared/matching.sql
