"""The types of the compiled module name only what it has."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from pgtask import _fastpath


def test_stub_names_only_existing_members() -> None:
    stub = ast.parse(Path(_fastpath.__file__).with_name("_fastpath.pyi").read_text())
    for thing in stub.body:
        if isinstance(thing, ast.ClassDef):
            for member in thing.body:
                target: Any = member.target if isinstance(member, ast.AnnAssign) else member
                name = target.id if isinstance(target, ast.Name) else target.name
                assert hasattr(getattr(_fastpath, thing.name), name), f"{thing.name}.{name}"
        elif isinstance(thing, ast.FunctionDef):
            assert callable(getattr(_fastpath, thing.name))
