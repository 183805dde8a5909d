-- The tasks that a filter chooses: states $2, pattern of the step $3, queues $4, LIKE pattern of the error $5, at least $6
-- seconds since they fell due or were parked, and fields of the step $7 (each null: any). As list_tasks.sql has it, for rows
-- that are locked.
--
-- $7: a pattern of LIKE and a regular expression that the step of each such task matches, unless it has an escape of JSON;
-- then each path and its text. They take 0.2, 3 and 20 microseconds a row.
      AND CASE
          WHEN error IS NOT NULL THEN 'parked'
          WHEN locked_by IS NOT NULL THEN 'leased'
          WHEN wakeup_at > now() THEN 'scheduled'
          ELSE 'ready'
      END = ANY ($2::text[])
      AND ($3::text IS NULL OR left(step, 1024) ~ $3)
      AND ($4::text[] IS NULL OR queue = ANY ($4))
      AND ($5::text IS NULL OR error LIKE $5)
      AND ($6::float8 IS NULL OR wakeup_at < now() - make_interval(secs => $6))
      AND ($7::text[] IS NULL OR ((step LIKE ($7::text[])[1] AND step ~ ($7::text[])[2] OR strpos(step, '\') > 0) AND pg_task_has(step, ($7::text[])[3:])))
