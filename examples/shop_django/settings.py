"""The settings of the shop. What pgtask needs is in TASKS and INSTALLED_APPS; the supervisor reads the rest here."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, unquote, urlsplit

url = urlsplit(os.environ.get("DATABASE_URL", "postgresql:///shop"))
query = dict(parse_qsl(url.query))

SECRET_KEY = "not one"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["pgtask.django", "examples.shop_django"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.lstrip("/"),
        "USER": unquote(url.username or ""),
        "PASSWORD": unquote(url.password or ""),
        "HOST": query.get("host", url.hostname or ""),
        "PORT": query.get("port", str(url.port or "")),
        "CONN_MAX_AGE": 60,  # a thread of a worker keeps its connection from task to task
    }
}
TASKS = {"default": {"BACKEND": "pgtask.django.PgtaskBackend", "QUEUES": ["default", "mail"]}}
