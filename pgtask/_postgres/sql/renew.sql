-- Prolong leases by $3 seconds from now; the ids that come back are still ours.
UPDATE pg_task AS task
SET lock_expires_at = clock_timestamp() + make_interval(secs => $3)
FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token),
     set_config('synchronous_commit', 'off', true)
WHERE task.id = lease.id
  AND task.locked_by = lease.token
RETURNING task.id
