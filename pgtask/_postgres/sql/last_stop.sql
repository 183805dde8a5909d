-- The last order to the workers of this schema to stop; 0 if there was none.
SELECT coalesce(max(id), 0) FROM pg_task_stops
