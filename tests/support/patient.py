"""The app `apps` in workers that do not poll by themselves: only a notification wakes them, or the time of a task that
they know to be due then. Give them `PATIENT`, so that no expired lease makes them poll either."""

from __future__ import annotations

import functools
from typing import Any

from apps import app

from pgtask._worker import claim, pipeline

__all__ = ["PATIENT", "app"]

HOUR = 3600.0
PATIENT = ("--lease-timeout", "7200")


@functools.wraps(claim.Claim)
def never_polling(*args: Any, **options: Any) -> claim.Claim:
    return claim.Claim(*args, **{**options, "min_poll": HOUR, "max_poll": HOUR})


vars(pipeline)["Claim"] = never_polling
