"""The tools of the tests are plugins in `support`."""

pytest_plugins = [
    "fix_database",  # first, since others import it, and pytest rewrites the assertions of an imported module no more
    "fix_acts",
    "fix_claims",
    "fix_commands",
    "fix_checked",
    "fix_django",
    "fix_earlier",
    "fix_fleet",
    "fix_pgbouncer",
    "fix_schemas",
    "fix_servers",
    "fix_stores",
    "fix_supervisor",
]
