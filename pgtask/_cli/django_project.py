"""The Django project that DJANGO_SETTINGS_MODULE names, as a source of settings: its app, and its database.

Invariants: this process imports no code of the project; another one reads the settings, so that workers load them anew.
A source of ours wins over the project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pgtask.config import config_sources, use_project
from pgtask.errors import ConfigError

__all__ = ["APP", "adopt_django_project"]

APP = "pgtask.django:app"
VARIABLE = "DJANGO_SETTINGS_MODULE"
_TIMEOUT = 60.0  # seconds in which the settings are read


def adopt_django_project(flags: Mapping[str, Any]) -> None:
    """Take the database of the Django project, if its TASKS uses pgtask, and its app, where `flags` and our own sources
    name none. Raises `ConfigError`."""
    module = os.environ.get(VARIABLE)
    use_project({})
    if not module or find_spec("django") is None:
        return
    named = config_sources(flags, "app", "dsn")
    if "dsn" in named and ("app" in named):
        return
    answer = {} if "dsn" in named else _ask()
    if "error" in answer:
        if "app" not in named or named["app"] == APP:
            raise ConfigError(f"{VARIABLE}={module}: {answer['error']}")
        return  # another app, which may have nothing to do with that project
    values = {}
    if "dsn" in answer:
        values["dsn"] = (answer["source"], answer["dsn"])
    if "dsn" in answer or "dsn" in named:
        values["app"] = (VARIABLE, APP)
    use_project(values)


def _ask() -> dict[str, str]:
    """Have another process read the settings. What they print goes to stderr."""
    command = [sys.executable, "-m", "pgtask.django.project"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=_TIMEOUT, check=False)
        answer: dict[str, str] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"reading the settings takes longer than {_TIMEOUT:g} s"}
    except ValueError:
        return {"error": f"reading the settings ended with exit code {done.returncode}"}
    return answer
