-- Tell every worker on every host that listens to finish its running steps and leave, as in pg_task.
SELECT pg_notify('pg_task_changed', 'stop_worker')::text
