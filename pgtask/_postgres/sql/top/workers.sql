-- The workers that have a connection to claim with, by its name, and the address that it comes from: null for a socket of
-- this host, and for sessions that this role may not see.
SELECT named[1]::bigint AS pid, named[2] AS worker, host(client_addr) AS address
FROM pg_stat_activity
CROSS JOIN LATERAL regexp_match(application_name, '^pgtask worker (\d{1,9}) ([0-9a-f]{16})$') AS named
WHERE datname = current_database()
  AND named IS NOT NULL
