"""The app `trees` in workers that do not poll by themselves."""

from __future__ import annotations

import patient  # noqa: F401  which makes them so
from trees import app

__all__ = ["app"]
