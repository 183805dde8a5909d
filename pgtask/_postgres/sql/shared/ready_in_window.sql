-- The conditions of a waiting task that falls due from $1 seconds before now() until $2 seconds before it.
--
-- The bounds are index conditions: the server compares them with the index entry and reads no row for it. PostgreSQL 18
-- skips from lane to lane to the entries between the bounds; older servers read all entries of the lanes.
          AND locked_by IS NULL
          AND error IS NULL
          AND wakeup_at >= to_timestamp(extract(epoch FROM now())::float8 - $1)
          AND wakeup_at <= to_timestamp(extract(epoch FROM now())::float8 - $2)
