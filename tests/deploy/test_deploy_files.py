"""The files in deploy/: their checks find faults, they fit each other, and they say what pgtask understands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from deploy_kit import DEPLOY, compose, entry_point, image, image_settings, pod, scaling_queries, unit
from fleet import Rows, put
from greeter import ReadName

from ci import deploy_files
from pgtask._cli import main as commands
from pgtask._cli import supervisor
from pgtask._settings import SETTINGS
from pgtask.config import load_config

STOP_MARGIN = 5  # seconds that a stop may take beyond the grace, see docs/operations.md


def test_checks_pass() -> None:
    assert [fault for check in deploy_files.CHECKS.values() for fault in check(DEPLOY)] == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("Dockerfile", 'ENTRYPOINT ["pgtask-supervisor"]', "ENTRYPOINT pgtask-supervisor", "DL3025"),
        ("Dockerfile", "USER 10001:10001", "USER root", "DL3002"),
        ("compose.yaml", "      migrate:\n        condition", "      migration:\n        condition", "migration"),
        ("kubernetes/deployment.yaml", "livenessProbe", "liveProbe", "liveProbe"),
        ("kubernetes/deployment.yaml", "maxSurge: 1", "maxSurge: [1]", "[1]"),
        ("kubernetes/disruption-budget.yaml", "maxUnavailable", "maxGone", "maxGone"),
        ("kubernetes/kustomization.yaml", "- deployment.yaml", "- deploy.yaml", "deploy.yaml"),
        ("kubernetes/scaled-object.yaml", 'targetQueryValue: "30"', "targetQueryValue: 30", "30"),
        ("kubernetes/scaled-object.yaml", "metricType: Value", "metricType: Utilization", "Utilization"),
        ("alerts.yaml", "max by (queue) (pgtask_oldest", "max by queue (pgtask_oldest", "PgtaskTasksLate"),
        ("grafana.json", "max(pgtask_oldest_due_seconds{", "max(pgtask_oldest_due_seconds({", "Oldest due task"),
        ("grafana.json", '"id": 2,', '"id": 3,', "has the id"),
    ],
)
def test_checks_find_faults(file: str, old: str, new: str, said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEPLOY, tmp_path / "deploy")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    check = deploy_files.CHECKS[file if file in deploy_files.CHECKS else "kubernetes/"]
    found = list(check(folder))
    assert any(said in fault for fault in found), found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_checks_find_faults_of_the_unit(tmp_path: Path) -> None:
    folder = shutil.copytree(DEPLOY, tmp_path / "deploy")
    file = folder / "pgtask@.service"
    file.write_text(file.read_text().replace("KillMode=mixed", "KillMode=all"))
    assert any("kill mode" in fault for fault in deploy_files.check_unit(folder))


def test_image_runs_the_supervisor_itself_without_root() -> None:
    assert entry_point() == ["pgtask-supervisor"]
    assert image()["USER"] == ["10001:10001"]
    assert image()["STOPSIGNAL"] == ["SIGTERM"]


def supervisors() -> Iterator[tuple[str, list[str], float]]:
    """Yield what starts a supervisor: the file, the arguments, and the seconds that it has to stop."""
    yield (
        "compose.yaml",
        compose()["worker"]["command"],
        float(compose()["worker"]["stop_grace_period"].removesuffix("s")),
    )
    yield "pgtask@.service", shlex.split(unit()["ExecStart"])[1:], float(unit()["TimeoutStopSec"])
    (container,) = pod()["containers"]
    yield "deployment.yaml", container["args"], float(pod()["terminationGracePeriodSeconds"])


def test_each_manager_waits_for_the_grace() -> None:
    for file, arguments, seconds in supervisors():
        config = load_config({"dsn": "postgresql:///x", "app": "a:b", **supervisor._parse(arguments)})
        assert "--grace" in arguments, file
        assert seconds > config.grace + STOP_MARGIN, file


def test_compose_has_no_password_of_its_own() -> None:
    """And takes any characters in yours, as they are not part of a URL."""
    for name in ("worker", "migrate"):
        environment = compose()[name]["environment"]
        assert environment["PGPASSWORD"].startswith("${POSTGRES_PASSWORD:?"), "any characters, and none by default"
        assert urlsplit(environment["DATABASE_URL"]).password is None
    assert compose()["postgres"]["environment"]["POSTGRES_PASSWORD"] == environment["PGPASSWORD"]


def test_no_file_system_is_writable() -> None:
    assert compose()["worker"]["read_only"]
    assert compose()["migrate"]["read_only"]
    for container in pod()["initContainers"] + pod()["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert unit()["ProtectSystem"] == "strict"


def test_probes_ask_the_port_of_the_image() -> None:
    port = image_settings()["PGTASK_METRICS"]
    (container,) = pod()["containers"]
    assert image()["EXPOSE"] == [port]
    assert f"http://127.0.0.1:{port}/livez" in image()["HEALTHCHECK"][0]
    assert container["ports"] == [{"name": "metrics", "containerPort": int(port)}]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    deployment = yaml.safe_load((DEPLOY / "kubernetes/deployment.yaml").read_text())
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == port
    assert unit()["Environment"].split()[0] == f"PGTASK_METRICS=127.0.0.1:{port}"


def test_settings_of_the_image_are_settings_of_pgtask() -> None:
    assert set(image_settings()) <= {setting.variable for setting in SETTINGS}
    config = load_config({"dsn": "postgresql:///x"}, environ=image_settings())
    assert config.log == "json"


def test_commands_in_the_alerts_are_commands() -> None:
    text = (DEPLOY / "alerts.yaml").read_text()
    found = re.findall(r"`pgtask ([^`]+)`", text)
    assert found
    for words in found:
        commands.parse(shlex.split(words))


def test_alerts_name_events_of_the_log() -> None:
    text = " ".join(rule["annotations"]["description"] for rule in alerts())
    documented = (DEPLOY.parent / "docs/operations.md").read_text()
    for event in re.findall(r"`(\w+\.\w+)`", text):
        assert f"`{event}`" in documented, event


def alerts() -> Iterator[dict[str, dict[str, str]]]:
    for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]:
        yield from group["rules"]


def test_each_alert_is_tried_and_is_silent_for_a_healthy_fleet() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts.test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts()}
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == names
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == names


def test_autoscaler_gets_the_age_of_the_oldest_due_task(dsn: str, rows: Rows) -> None:
    (query,) = scaling_queries()
    assert rows.value(query) == 0
    put(dsn, ReadName("a"))
    rows("UPDATE pg_task SET wakeup_at = now() - interval '100 s'")
    assert 100 <= rows.value(query) < 200


def test_board_uses_its_variables() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"} <= variables
    assert {target["datasource"]["uid"] for panel in board["panels"] for target in panel.get("targets", ())} == {
        "${datasource}"
    }
