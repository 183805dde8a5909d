"""Verdicts of `mypy --strict` and pyright about user code: the right is accepted, each wrong line is named by its rule.

The files are in `typing/`; a comment `# wrong: mypy RULE, pyright RULE` stands on each line that must be refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY, TESTS

FILES = sorted((TESTS / "typing").glob("*.py"))
Found = dict[str, set[tuple[int, str]]]  # by file: the lines that were refused, with the rule


def expected(checker: str) -> Found:
    wrong: Found = {}
    for file in FILES:
        wrong[file.name] = set()
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if marked := re.search(rf"# wrong:.*\b{checker} ([\w-]+)", line):
                wrong[file.name].add((number, marked[1]))
    return wrong


def has(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed here")


def run(*command: str, directory: Path) -> str:
    """Run a checker outside the repository, so that its own settings do not count; it finds pgtask in the root."""
    environment = {**os.environ, "MYPYPATH": str(REPOSITORY), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=directory, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 1, done.stdout + done.stderr  # there are errors, and no crash
    return done.stdout


def test_the_files_hold_what_is_to_be_found() -> None:
    assert {file.name for file in FILES} == {
        "right.py",
        "wrong_batch.py",
        "wrong_call.py",
        "wrong_edge.py",
        "wrong_enqueue.py",
        "wrong_field.py",
        "wrong_return.py",
    }
    assert [name for name, lines in expected("mypy").items() if not lines] == ["right.py"]
    lines = {name: {number for number, _ in found} for name, found in expected("mypy").items()}
    assert lines == {name: {number for number, _ in found} for name, found in expected("pyright").items()}


@has("mypy")
def test_mypy_in_strict_mode(tmp_path: Path) -> None:
    found: Found = {file.name: set() for file in FILES}
    output = run(
        "mypy",
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
        "--no-error-summary",
        "--hide-error-context",
        "--no-color-output",
        f"--cache-dir={tmp_path}",
        *map(str, FILES),
        directory=tmp_path,
    )
    for line in output.splitlines():
        if matched := re.fullmatch(r"(.*?):(\d+): error: .*\[([\w-]+)\]", line):
            found[Path(matched[1]).name].add((int(matched[2]), matched[3]))
        else:
            assert ": note: " in line, output
    assert found == expected("mypy")


@has("pyright")
def test_pyright(tmp_path: Path) -> None:
    settings = {"include": ["user"], "extraPaths": [str(REPOSITORY)], "typeCheckingMode": "standard"}
    shutil.copytree(TESTS / "typing", tmp_path / "user")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    output = run(
        "pyright", "--outputjson", f"--pythonpath={sys.executable}", f"--project={tmp_path}", directory=tmp_path
    )
    found: Found = {file.name: set() for file in FILES}
    for problem in json.loads(output)["generalDiagnostics"]:
        if problem["severity"] == "error":
            line = problem["range"]["start"]["line"] + 1
            found[Path(problem["file"]).name].add((line, problem.get("rule", problem["message"])))
    assert found == expected("pyright")
