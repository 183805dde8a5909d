"""The answers of the package to `help`, `pydoc`, editors and documentation tools."""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
import subprocess
import sys
import typing
from typing import Any

import pytest

import pgtask

MODULES = ["pgtask", *(f"pgtask.{module.name}" for module in pkgutil.iter_modules(pgtask.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_each_module_has_its_page(name: str) -> None:
    if name != "pgtask.__main__":  # runs, when it is imported
        assert name in pydoc.plain(pydoc.render_doc(name))


@pytest.mark.parametrize("name", pgtask.__all__)
def test_each_name_has_its_page_and_a_docstring(name: str) -> None:
    page = pydoc.plain(pydoc.render_doc(f"pgtask.{name}"))
    documented = inspect.getdoc(getattr(pgtask, name))
    if name == "Outcome" and sys.version_info >= (3, 14):  # there a union can have none of its own
        return
    assert documented is not None
    assert documented.splitlines()[0].strip() in page


@pytest.mark.parametrize("name", pgtask.__all__)
def test_each_class_has_readable_signature_and_annotations(name: str) -> None:
    thing = getattr(pgtask, name)
    if name == "Outcome":
        return
    inspect.signature(thing)
    typing.get_type_hints(thing)
    for _, method in inspect.getmembers(thing, inspect.isfunction):
        if method.__module__.startswith("pgtask.") and not method.__name__.startswith("_"):
            inspect.signature(method)
            typing.get_type_hints(method, localns={"Consumer": pgtask.Consumer})  # which a producer does not load


def test_pydoc_of_the_package_in_a_process_of_its_own() -> None:
    """Run pydoc like a person: no earlier import has resolved a name."""
    for name in ("pgtask", "pgtask.Context", "pgtask.task", "pgtask.WorkflowContext"):
        command = [sys.executable, "-W", "error", "-m", "pydoc", name]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (0, ""), ended


def test_a_workflow_shows_what_is_for_users() -> None:
    @pgtask.workflow("shown")
    async def shown(ctx: pgtask.WorkflowContext) -> None:
        """Show something."""

    flow: Any = shown
    names = {name for name in dir(flow) if not name.startswith("_")}
    assert names == {"function", "name", "policy", "since", "takes_input", "types", "version"}
    assert flow.__doc__ == "Show something."
