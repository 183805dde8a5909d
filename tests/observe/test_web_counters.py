"""What the console shows of what supervisors count: rates, loop lag, and the edges that tasks took."""

from __future__ import annotations

import re
import time

from console import serve
from counted import First, Plain
from exported import ANY_PORT, APP
from fleet import Rows, put, working


def test_pages_show_what_supervisors_count(dsn: str, rows: Rows) -> None:
    """Rates, loop lag and the edges that tasks took: of a supervisor here, and of one that does not answer."""
    put(dsn, *[First()] * 40, *[Plain()] * 10)
    with working(dsn, *ANY_PORT, app=APP) as fleet:
        rows.until("SELECT count(*) FROM pg_task", holds=lambda left: left == 0)
        serving = serve("--dsn", dsn, "--from", "127.0.0.1:9", app=APP)
        console = next(serving)
        machine, deadline = "", time.monotonic() + 60
        while "First to Second: 40 tasks" not in machine:
            assert time.monotonic() < deadline, machine
            machine = console.page("/machine")
        assert re.search(r'class="end".*\s*<text class="flow"[^>]*>10</text>', machine)
        assert "http://127.0.0.1:9: Connection refused" in machine
        now = ""
        while not re.search(
            rf'{fleet.process.pid}/1</th><td>here</td><td>ready</td>(<td class="n">[^<]+</td>){{7}}', now
        ):
            assert time.monotonic() < deadline, now
            now = console.page("/")
        row = re.search(r"Counted.First</th>(.*)</tr>", now)
        assert row
        assert re.findall(r">([^<]+)</td>", row[1])[-2:] == ["40", "0"]
        assert next(serving, None) is None
