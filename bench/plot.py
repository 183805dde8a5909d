"""Picture of a drain: its rates as bars, with the minimum and maximum of the rounds, as SVG without dependencies.

Invariant: bars begin at zero and share one scale.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import msgspec

from bench.harness.server import BenchError

__all__ = ["draw_drain"]

_WIDTH, _BAR, _GAP, _TOP, _BOTTOM = 860, 22, 12, 64, 40
_LABEL, _NUMBER = 120, 130
_OURS, _FLOOR, _PEER = "#2563eb", "#94a3b8", "#f59e0b"
_FLOORS = ("floor", "minimum", "bare")


def draw_drain(file: Path) -> str:
    """Return the SVG of the JSON file that a drain has written. Raises `BenchError`."""
    try:
        report = msgspec.json.decode(file.read_bytes())
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchError(f"{file}: {error}") from None
    if not isinstance(report, dict) or report.get("bench") != "drain" or not report.get("summary"):
        raise BenchError(f"{file}: not the JSON of a drain with a result")
    return _draw_bars(report)


def _draw_bars(report: dict[str, Any]) -> str:
    terms, machine = report["terms"], report["machine"]
    rates = {name: summary["tasks_per_second"] for name, summary in report["summary"].items()}
    order = sorted(rates, key=lambda name: -rates[name]["median"])
    maximum = max(rate["max"] for rate in rates.values())
    height = _TOP + len(order) * (_BAR + _GAP) + _BOTTOM
    scale = (_WIDTH - _LABEL - _NUMBER) / maximum
    title = f"{terms['tasks']:,} tasks of {terms['workload']}, {terms['procs']} processes: tasks a second"
    where = (
        f"{report['at'][:10]}, {machine['cpu']}, {machine['usable_cores']} cores, {report['server'].split(' on ')[0]}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600" fill="#0f172a">{escape(title)}</text>',
        f'<text x="16" y="46" fill="#64748b">{escape(where)}; median of {terms["rounds"]}, whiskers: least and most'
        "</text>",
    ]
    for place, name in enumerate(order):
        rate, y = rates[name], _TOP + place * (_BAR + _GAP)
        middle, end = y + _BAR / 2, _LABEL + rate["median"] * scale
        low, high = (_LABEL + rate[bound] * scale for bound in ("min", "max"))
        color = _OURS if name == "pgtask" else _FLOOR if name in _FLOORS else _PEER
        lines += [
            f'<text x="{_LABEL - 10}" y="{middle + 4:.1f}" text-anchor="end" fill="#0f172a">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{end - _LABEL:.1f}" height="{_BAR}" rx="2" fill="{color}"/>',
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 5:.1f}v10M{high:.1f} {middle - 5:.1f}v10" '
            'stroke="#0f172a" stroke-width="1.2" fill="none"/>',
            f'<text x="{max(high, end) + 8:.1f}" y="{middle + 4:.1f}" fill="#334155">{rate["median"]:,.0f}</text>',
        ]
    lines.append(
        f'<text x="16" y="{height - 14}" fill="#64748b">{escape("commit " + report["commit"][:12])}; '
        "grey: what Postgres gives by itself</text>"
    )
    return "\n".join([*lines, "</svg>", ""])
