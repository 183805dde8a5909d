"""The task of the project of `django_fleet.py`: a plain function that does nothing."""

from __future__ import annotations

from django_tasks import task


@task()
def noop(number: int) -> None:
    """Do the work of a task."""
