-- Free the locks of sleep.sql: writers need not notify for this session.
SELECT pg_advisory_unlock_all()::text
