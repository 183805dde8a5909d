-- Record the checkpoints of the CTE `arrived`, whose kind is 'step' and whose tries are none if they are null.
--
-- A step that is put off (until due_at) has a checkpoint that a later try, or its result, takes over under the same number.
-- A complete checkpoint stays unchanged, and tries only grow; if a step is put off again that has not failed, its time
-- does. So this may be sent again, and arrive late. Plan: joined by arrays of one, as flush.sql says.
recorded AS (
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result, error, due_at, tried, seconds)
    SELECT run, number, place, coalesce(kind, 'step'), name, result, error, due_at, coalesce(tried, 0), seconds
    FROM arrived
    ON CONFLICT DO NOTHING
),
tried_again AS (
    UPDATE pg_task_checkpoints AS checkpoint
    SET result = arrived.result,
        error = arrived.error,
        due_at = CASE WHEN arrived.result IS NULL THEN arrived.due_at END,
        tried = coalesce(arrived.tried, 0),
        seconds = arrived.seconds,
        recorded_at = now()
    FROM (
        SELECT DISTINCT ON (run, number) *
        FROM arrived
        WHERE tried > 0
           OR due_at IS NOT NULL
        ORDER BY run, number, tried DESC
    ) AS arrived
    WHERE checkpoint.run = ANY (ARRAY[arrived.run])
      AND checkpoint.number = ANY (ARRAY[arrived.number])
      AND checkpoint.kind = 'step'
      AND checkpoint.due_at IS NOT NULL
      AND (checkpoint.tried, checkpoint.due_at) < (
          coalesce(arrived.tried, 0),
          CASE WHEN arrived.result IS NULL AND arrived.due_at IS NOT NULL THEN arrived.due_at ELSE 'infinity' END
      )
),
