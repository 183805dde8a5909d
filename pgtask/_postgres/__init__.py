"""Everything that is Postgres: statements, connections, migrations and the embedded server."""
