-- The time $1 seconds from now, by the clock of the server.
SELECT clock_timestamp() + make_interval(secs => $1::float8)
