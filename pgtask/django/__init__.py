"""Django's tasks on pgtask: a backend for `django.tasks` of Django 6, and for `django_tasks`, its backport.

    TASKS = {"default": {"BACKEND": "pgtask.django.PgtaskBackend"}}

    DJANGO_SETTINGS_MODULE=site.settings pgtask-supervisor --procs 4

Invariant: importing this module imports no part of Django; a name of it does when it is first used. So it can stand in
INSTALLED_APPS, in TASKS, and as the app of a supervisor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgtask.app import App
    from pgtask.django.backend import PgtaskBackend
    from pgtask.django.project import dsn_of, make_app
    from pgtask.django.steps import DjangoTask

    app: App

__all__ = ["DjangoTask", "PgtaskBackend", "app", "dsn_of", "make_app"]

_HOMES = {"DjangoTask": "steps", "PgtaskBackend": "backend", "dsn_of": "project", "make_app": "project"}


if not TYPE_CHECKING:  # a checker would accept any name

    def __getattr__(name: str) -> Any:
        """Import a name, or make the app of the project, when it is first used."""
        import importlib

        if name == "app":
            from pgtask.django.project import make_app

            globals()["app"] = made = make_app()
            return made
        if name in _HOMES:
            return getattr(importlib.import_module(f"pgtask.django.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
