"""Its settings. SITE_DSN is the database, as the tests write it."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, unquote, urlsplit

_url = urlsplit(os.environ.get("SITE_DSN", "postgresql:///none"))
_query = dict(parse_qsl(_url.query))

SECRET_KEY = "none"
USE_TZ = True
INSTALLED_APPS = ["pgtask.django"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path.lstrip("/"),
        "USER": unquote(_url.username or ""),
        "PASSWORD": unquote(_url.password or ""),
        "HOST": _query.get("host", _url.hostname or ""),
        "PORT": _query.get("port", str(_url.port or "")),
    }
}
TASKS = {
    "default": {"BACKEND": "pgtask.django.PgtaskBackend", "QUEUES": ["default", "mail"]},
    "forgetful": {"BACKEND": "pgtask.django.PgtaskBackend", "OPTIONS": {"keep_results": False}},
}
LOGGING_CONFIG = None
