-- Tell every worker of this schema, on every host, to finish its running steps and exit. Returns the payload
-- that was sent.
SELECT pg_task_stop()
