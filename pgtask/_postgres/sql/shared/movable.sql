-- The tasks that a move in bulk to the queue $8 with the priority $9 changes.
      AND (queue, priority) <> (coalesce($8::text, queue), coalesce($9::smallint, priority))
-- include: shared/unleased.sql
