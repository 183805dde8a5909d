"""`python manage.py pgtask_supervisor`: become `pgtask-supervisor` for this project, with the same options."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError

__all__ = ["Command"]


class SupervisorCommand(BaseCommand):  # type: ignore[misc,unused-ignore]
    """The command. The process becomes the supervisor, so that its workers load the project anew, also on SIGHUP."""

    help = "Run the tasks of this project in worker processes. The options are those of pgtask-supervisor."

    def run_from_argv(self, argv: list[str]) -> NoReturn:
        """Execute the supervisor. Django has read --settings and --pythonpath into the environment before."""
        own = argparse.ArgumentParser(add_help=False)
        own.add_argument("--settings")
        own.add_argument("--pythonpath")
        _, words = own.parse_known_args(argv[2:])
        paths = [path for path in (sys.path[0], os.environ.get("PYTHONPATH")) if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "pgtask._cli.supervisor", *words], environment)

    def handle(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse `call_command`, which would replace the calling program."""
        raise CommandError("run it as a program: python manage.py pgtask_supervisor")


Command = SupervisorCommand  # the name that Django looks for
