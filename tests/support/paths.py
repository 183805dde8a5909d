"""Paths that tests need, wherever they stand."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PYTHONPATH", "REPOSITORY", "SUPPORT", "TESTS"]

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
REPOSITORY = TESTS.parent
PYTHONPATH = os.pathsep.join(map(str, [REPOSITORY, SUPPORT]))
"""For a program that a test starts: it finds pgtask and the apps of the tests."""
