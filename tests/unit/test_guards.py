"""Private names of other packages that pgtask uses: if one is missing, the import fails, and not a step at night."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("change", "module", "message"),
    [
        (
            "import asyncio; asyncio.Task = type('Task', (), {'_callbacks': None})",
            "pgtask._fastpath",
            "asyncio.Task of this Python has no _must_cancel",
        ),
        (
            "import asyncio; asyncio.Task = type('Task', (), {'_must_cancel': None})",
            "pgtask._fastpath",
            "asyncio.Task of this Python has no _callbacks",
        ),
        (
            "import asyncpg; del asyncpg.Connection._transport",
            "pgtask._postgres.connection",
            "has no Connection._transport",
        ),
    ],
)
def test_missing_private_name_is_named(change: str, module: str, message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{change}\nimport {module}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]
    assert "ImportError" in ended.stderr.splitlines()[-1]
