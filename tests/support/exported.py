"""What the tests of this folder share: a client of the exporter."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

from fleet import Fleet
from prometheus_client.parser import text_string_to_metric_families

APP = "counted:app"
ANY_PORT = ("--metrics", "127.0.0.1:0")


class Exported:
    """The exporter of a fleet as a program outside sees it."""

    def __init__(self, fleet: Fleet) -> None:
        line = next(line for line in fleet.lines if "metrics.serving" in line)
        found = re.search(r"port=(\d+)", line)
        assert found, line
        self.port = int(found[1])

    def get(self, path: str, timeout: float = 10) -> tuple[int, str]:
        """Return the status and the text of a page."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def failed(self, path: str) -> dict[str, Any]:
        """Return what a probe says has failed; nothing if all is well."""
        status, text = self.get(path)
        answer = json.loads(text)
        assert (status, answer["status"]) in ((200, "ok"), (503, "unavailable")), text
        failed: dict[str, Any] = answer["failed"]
        return failed

    def samples(self) -> dict[tuple[str, ...], float]:
        """Return all samples, by name and the values of their labels in the order of the labels' names."""
        status, text = self.get("/metrics")
        assert status == 200, text
        families = text_string_to_metric_families(text)
        return {
            (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
            for family in families
            for sample in family.samples
        }

    def outcomes(self) -> dict[tuple[str, str], float]:
        """Return the outcomes above zero, by step and outcome."""
        named = [(key[1:], value) for key, value in self.samples().items() if key[0] == "pgtask_step_outcomes_total"]
        return {(step, outcome): value for (outcome, step, _), value in named if value}
