-- Insert a task of a Django project: its id $1, its step $2, the time $3 when it is due (null: now), its queue $4 and
-- its priority $5. Returns the time of the enqueue, or no row if a trigger or rule of the user keeps it out.
--
-- Django's own connection sends it, in the transaction that is open there. Plan: one insert; it locks nothing else.
INSERT INTO pg_task (id, step, wakeup_at, queue, priority)
VALUES ($1::uuid, $2, coalesce($3::timestamptz, clock_timestamp()), $4, $5)
RETURNING created_at
