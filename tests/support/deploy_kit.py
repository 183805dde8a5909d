"""The files in deploy/ as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"


@cache
def image() -> dict[str, list[str]]:
    """Return the arguments of the instructions of the Dockerfile, by the name of the instruction."""
    lines = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text()).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            found.setdefault(name, []).append(arguments)
    return found


def entry_point() -> list[str]:
    (text,) = image()["ENTRYPOINT"]
    words: list[str] = json.loads(text)
    return words


def health_check() -> list[str]:
    (text,) = image()["HEALTHCHECK"]
    words: list[str] = json.loads(text.partition("CMD ")[2])
    return words


def image_settings() -> dict[str, str]:
    """Return the variables of the image that are settings of pgtask."""
    return dict(re.findall(r"(PGTASK_\w+)=(\S+)", " ".join(image()["ENV"])))


@cache
def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def unit() -> dict[str, str]:
    """Return the options of the unit of systemd."""
    return dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "pgtask@.service").read_text(), re.MULTILINE))


@cache
def pod() -> dict[str, Any]:
    deployment = yaml.safe_load((DEPLOY / "kubernetes/deployment.yaml").read_text())
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def scaling_queries() -> Iterator[str]:
    for document in yaml.safe_load_all((DEPLOY / "kubernetes/scaled-object.yaml").read_text()):
        for trigger in document["spec"].get("triggers", ()):
            yield trigger["metadata"]["query"]
