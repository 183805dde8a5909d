-- The time of this server. The answer also proves that the connection is alive.
SELECT clock_timestamp()
