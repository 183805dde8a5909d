-- Of the leases (runs $1, tokens $2), those that are ours: a statement that did not find them found a locked row.
SELECT task.id
FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token)
JOIN pg_task AS task ON task.id = lease.id AND task.locked_by = lease.token
