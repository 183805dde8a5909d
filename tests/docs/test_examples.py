"""The examples do what their documents say, and the documents say what is so.

The commands are those of the documents, in an empty directory that has `examples` in it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fix_database import run
from fleet import Fleet, Rows
from paths import REPOSITORY

import pgtask
from examples import consumer as examples_consumer
from examples import file_index
from pgtask import Context, Policy
from pgtask._cli.commands.graph import mermaid
from pgtask._postgres import embedded
from pgtask._settings import SETTINGS, Setting
from pgtask.app import load_app
from pgtask.config import load_config

ROOT = REPOSITORY
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Path:
    """The working directory, with the examples in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def python(*arguments: str, dsn: str | None = None) -> subprocess.CompletedProcess[bytes]:
    """`python -m ...`, on the database `dsn` or on the embedded default."""
    environment = {**os.environ, **({"DATABASE_URL": dsn} if dsn else {})}
    command = [sys.executable, "-W", "error", "-m", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, timeout=100, check=False)


def text(result: subprocess.CompletedProcess[bytes], code: int = 0) -> str:
    """Return the output, if it ended as it should."""
    assert result.returncode == code, (result.stdout.decode(), result.stderr.decode())
    return result.stdout.decode()


# --- the tutorial


def test_the_greeter_fails_six_times_is_repaired_and_greets(dsn: str, here: Path) -> None:
    rows = Rows(dsn)
    words = ("enqueue", "examples.tutorial:app", "ReadName", '{"filename": "name.txt"}')
    task = text(python("pgtask", *words, dsn=dsn)).strip()
    with Fleet(dsn, app="examples.tutorial:app", procs=2) as fleet:
        rows.until("SELECT error IS NOT NULL FROM pg_task")
        (row,) = rows("SELECT id::text, step, tried, error FROM pg_task")
        assert (row["id"], row["step"]) == (task, '{"Greeter":{"ReadName":{"filename":"name.txt"}}}')
        assert row["tried"] == 6
        assert row["error"].startswith("FileNotFoundError: [Errno 2] No such file or directory: 'name.txt' (at ")
        fleet.until("task.parked")
        (here / "name.txt").write_text("Ferris\n")
        rows("UPDATE pg_task SET error = NULL")
        assert fleet.until("Hello") == "Hello, Ferris\n"
        rows.until("SELECT count(*) = 0 FROM pg_task")
        fleet.send(signal.SIGINT)
        assert fleet.ends() == 0
    assert fleet.output.count("task.parked") == 1


@pytest.mark.parametrize("document", ["docs/tutorial.md", "README.md"])
def test_the_greeter_in_the_documents_is_the_example(document: str) -> None:
    def after_docstring(code: str) -> str:
        return code.partition("from __future__")[2]

    example = re.sub(r"  # noqa.*", "", (ROOT / "examples/tutorial.py").read_text())
    assert after_docstring(blocks(ROOT / document, "python")[0]) == after_docstring(example)


def test_the_programs_of_the_readme_run(dsn: str, here: Path) -> None:
    for name, block in zip(("greetings", "produce"), blocks(ROOT / "README.md", "python"), strict=True):
        (here / f"{name}.py").write_text(block)
    (here / "name.txt").write_text("Ferris\n")
    text(python("produce", dsn=dsn))
    with Fleet(dsn, "--burst", app="greetings:app") as fleet:
        assert fleet.ends() == 0
    said = [line.strip() for line in fleet.lines if line.startswith("Hello")]
    assert said == ["Hello, Ferris", "Hello, Ferris", "Hello, you, three seconds later"]


def test_the_smallest_task_of_the_readme_runs(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "py")
    (here / "smallest_task.py").write_text(block)
    assert len(block.partition("@task")[2].partition("\n\n\n")[0].splitlines()) <= 4
    program = "from pgtask.testing import run_task; import smallest_task as it; run_task(it.app, it.mail('Ada'))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=here)
    assert (said.stdout, said.stderr) == ("a letter to Ada\n", "")


def test_pytest_finds_the_app_as_the_document_on_testing_says(here: Path) -> None:
    (here / "greetings.py").write_text(blocks(ROOT / "README.md", "python")[0])
    (here / "tests").mkdir()
    (here / "tests" / "test_it.py").write_text("from greetings import app\n\n\ndef test() -> None:\n    assert app\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")

    def code(*command: str) -> int:
        return subprocess.run([*command, *flags], env=environment, capture_output=True, timeout=60, cwd=here).returncode

    plain = str(Path(sys.executable).with_name("pytest"))
    assert code(plain) != 0
    assert code(sys.executable, "-m", "pytest") == 0
    (here / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    assert code(plain) == 0


def test_make_without_a_target_names_the_targets() -> None:
    said = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, timeout=30)
    assert said.returncode == 0
    named = re.findall("^make (\\w+)", said.stdout, re.MULTILINE)
    targets = re.findall("^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted([*named, "help"]) == sorted(targets)


def test_the_graph_in_the_tutorial_is_what_the_command_prints() -> None:
    app = load_app("examples.tutorial:app")
    assert blocks(ROOT / "docs/tutorial.md", "mermaid") == [mermaid(app)]


# --- delay and counter


def test_delay(dsn: str) -> None:
    text(python("examples.delay", dsn=dsn))
    with Fleet(dsn, "--burst", app="examples.delay:app") as fleet:
        assert fleet.ends() == 0
    said = [line.strip() for line in fleet.lines if line.endswith((": in the water\n", ": served\n"))]
    assert sorted(said) == [
        "cold, three seconds from now: served",
        "one second after the others: in the water",
        "one second after the others: served",
        "soft: in the water",
        "soft: served",
    ]
    assert said[:2] == ["soft: in the water", "one second after the others: in the water"]
    assert said.index("soft: served") < said.index("one second after the others: served")


@pytest.mark.parametrize(
    ("example", "usage"),
    [
        ("counter", "[CHAINS], a whole number"),
        ("consumer", "[VIEWS], a whole number"),
        ("approval", "[AMOUNT], a whole number"),
        ("saga", "[TRIPS], a whole number"),
    ],
)
@pytest.mark.parametrize("words", [["abc"], ["-1"], ["1", "2"]])
def test_an_example_says_what_it_takes(example: str, usage: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", *words], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (1, f"usage: python -m examples.{example} {usage}\n")


@pytest.mark.parametrize("example", ["agent", "word_count"])
@pytest.mark.parametrize("words", [["/nowhere"], [".", "."]])
def test_an_example_takes_a_directory(example: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", *words], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (1, f"usage: python -m examples.{example} [DIRECTORY]\n")


# --- the commands of all of them


def commands(name: str) -> list[str]:
    """The commands that the docstring of an example gives, up to the first that wants an id."""
    text = (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
    given = [line.strip() for line in text.splitlines() if re.match(" {4}(python|pgtask)", line)]
    wants_id = next((at for at, line in enumerate(given) if " ID" in line), len(given))
    return given[:wants_id]


EXAMPLES = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
)


LONG = {"crawl", "embed", "load", "shop_fastapi"}  # other tests run their programs


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.faults] if name in LONG else []) for name in EXAMPLES]
)
def test_commands_in_the_docstring_of_an_example_work(name: str, dsn: str, here: Path) -> None:
    (here / "tree").mkdir()
    (here / "tree" / "a.txt").write_text("some words\n")
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PGTASK_DSN": dsn}
    environment["PGTASK_BURST"] = "1"  # a supervisor that would wait for a person ends
    found = commands(name)
    assert found[0].startswith(f"python -m examples.{name}")
    for command in found:
        line = re.sub(r"\[?DIRECTORY\]?", "tree", command).replace(" [CHAINS]", "")
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["agent", "word_count", "file_index"])
def test_an_example_takes_an_empty_directory(name: str, dsn: str, here: Path) -> None:
    (here / "tree").mkdir()
    environment = {**os.environ, "PGTASK_DSN": dsn}
    program = [sys.executable, "-m", f"examples.{name}", "tree"]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        if name != "file_index":
            Rows(dsn).until("SELECT count(*) = 1 FROM pg_task")
            with Fleet(dsn, "--burst", app=f"examples.{name}:app") as fleet:
                assert fleet.ends() == 0, fleet.output
        assert process.stdout is not None
        said = process.stdout.read().decode()
        assert process.wait(60) == 0, said


def test_counter(dsn: str) -> None:
    text(python("examples.counter", "3", dsn=dsn))
    with Fleet(dsn, "--burst", app="examples.counter:app") as fleet:
        assert fleet.ends() == 0
    assert fleet.output.count("counted to 1,000 in ") == 3
    assert "3 tasks done, 3,003 steps, 0 errors" in fleet.output


# --- consumer


@pytest.mark.timeout(120)
@pytest.mark.parametrize("words", [[], ["10000"], ["1200"], ["1000"], ["500"], ["1"], ["0"]], ids=" ".join)
def test_consumer_loads_each_view_once_and_parks_wrong_ones(words: list[str], dsn: str) -> None:
    rows = Rows(dsn)
    said = text(python("examples.consumer", *words, dsn=dsn))
    views = int(words[0]) if words else 10_000
    rate = r": [\d,]+ views/s" if views else ""
    assert re.match(rf"loaded {views:,} views{rate}\nparked: ValueError: 'not a path' is no path \(at ", said)
    assert rows.value("SELECT count(*) FROM page_view") == views
    assert rows.value("SELECT count(*) FROM pg_task") == 1
    assert examples_consumer.app.steps[examples_consumer.View].policy.queue == "views"


# --- testing


def test_the_tests_in_the_document_on_testing_pass(dsn: str, here: Path) -> None:
    (here / "greetings.py").write_text(blocks(ROOT / "README.md", "python")[0])
    programs = blocks(ROOT / "docs/testing.md", "python")
    for number, program in enumerate(programs):
        (here / f"test_{number}.py").write_text(program)
    (here / "conftest.py").write_text(CONFTEST.format(dsn=dsn))
    arguments = (
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "pgtask.pytest_plugin",
        *map(str, here.glob("test_*.py")),
    )
    said = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=with_root(here),
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "7 passed" in said.stdout


CONFTEST = """
import asyncio, inspect, pytest


@pytest.fixture(scope="session")
def pgtask_server():
    return {dsn!r}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        names = inspect.signature(pyfuncitem.obj).parameters
        asyncio.run(pyfuncitem.obj(**{{name: pyfuncitem.funcargs[name] for name in names}}))
        return True
"""


def with_root(here: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}


# --- file_index

CONTENTS = {
    b"empty": b"",
    b"lines": b"one\ntwo\n",
    b"no newline at the end": b"one\ntwo",
    b"binary": bytes(range(256)) * 3000,
    b"new\nline": b"a\nb\n",
    b"new": b"another file than the one above\n",
    b"back\\slash": b"",
    b"carriage\rreturn": b"\r\n",
    b" leading, trailing ": b"x\n",
    b"-dash": b"x\n",
    b"total": b"x\n",
    b"quote'\"s": b"x\n",
    "ünïcödé \u2028 \N{SNOWMAN}".encode(): b"x\n",
    b"below/" + b"x" * 250: b"x\n",
}


@pytest.fixture
def tree(here: Path) -> Path:
    tree = here / "tree"
    (tree / "below").mkdir(parents=True)
    for name, content in CONTENTS.items():
        (tree / os.fsdecode(name)).write_bytes(content)
    (tree / "link").symlink_to("lines")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "below" / "loop").symlink_to("..")
    os.mkfifo(tree / "pipe")
    return tree


def expected(tree: Path) -> dict[str, tuple[str, int, int]]:
    files = (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    contents = {str(path): path.read_bytes() for path in files}
    return {path: (hashlib.sha256(raw).hexdigest(), raw.count(b"\n"), len(raw)) for path, raw in contents.items()}


def indexed(rows: Rows) -> dict[str, tuple[str, int, int]]:
    return {row["path"]: tuple(row)[1:] for row in rows("SELECT path, sha256, lines, bytes FROM file_index")}


def test_file_index_follows_a_tree_of_odd_names(dsn: str, tree: Path) -> None:
    rows = Rows(dsn)
    said = text(python("examples.file_index", str(tree), dsn=dsn))
    assert indexed(rows) == expected(tree)
    assert f"{len(CONTENTS)} files," in said
    assert f"checked against sha256sum and wc -l: {len(CONTENTS)} files are the same, 0 differ" in said

    (tree / "lines").unlink()
    (tree / "new").write_text("more\nthan\nthere\nwas\n")
    (tree / "fresh").write_text("a fresh one\n")
    (tree / "total").unlink()
    (tree / "total").mkdir()
    text(python("examples.file_index", str(tree), dsn=dsn))
    assert indexed(rows) == expected(tree)
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_file_index_says_which_names_have_no_place_in_json(dsn: str, here: Path) -> None:
    tree = here / "tree"
    tree.mkdir()
    try:
        (tree / os.fsdecode(b"bad\xff")).write_text("x")
    except OSError:
        pytest.skip("this file system has Unicode names only")
    (tree / "good").write_text("x")
    said = text(python("examples.file_index", str(tree), dsn=dsn))
    assert f"not indexed: {os.fsencode(tree) + b'/bad' + bytes([255])!r}: the name is not UTF-8" in said
    assert "1 files are the same, 0 differ" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_index_parks_what_it_may_not_read_until_it_may(dsn: str, tree: Path) -> None:
    secret = tree / "lines"
    secret.chmod(0)
    said = text(python("examples.file_index", str(tree), dsn=dsn))
    assert f"not indexed: {secret}: PermissionError" in said
    assert f"{len(CONTENTS) - 1} files are the same, 0 differ" in said
    secret.chmod(0o600)
    text(python("examples.file_index", str(tree), dsn=dsn))
    assert indexed(Rows(dsn)) == expected(tree)


def test_file_index_reports_a_row_that_is_wrong(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {path: (sha256, str(lines)) for path, (sha256, lines, _) in expected(tree).items()}
    later = time.time() + 60
    assert file_index.check(list(truth), truth, later) == 0
    lines, new = str(tree / "lines"), str(tree / "new\nline")
    lost = {path: facts for path, facts in truth.items() if path != lines}
    assert file_index.check(list(truth), lost, later) == 1
    assert file_index.check(list(truth), {**truth, new: (truth[new][0], "3")}, later) == 1
    assert capsys.readouterr().out.count("DIFFERENT: ") == 2
    assert file_index.check(list(truth), lost, began=0) == 0, "it has changed since"


def test_file_index_goes_back_when_a_file_is_being_written(here: Path) -> None:
    path = here / "file"
    path.write_text("one\n")
    context: Any = None
    digest = file_index.Read(str(path)).run(context)
    path.write_text("one\ntwo\n")
    assert digest.step.run(context).step == file_index.Read(str(path), looks=1)  # type: ignore[union-attr]
    path.unlink()
    assert digest.step.run(context).step == file_index.Read(str(path), looks=1)  # type: ignore[union-attr]
    assert file_index.Read(str(path), looks=1).run(context).step == file_index.Forget(str(path))  # type: ignore[union-attr]
    assert file_index.Read(str(path), looks=5).run(context).reason.endswith("changes all the time")  # type: ignore[union-attr]


def test_file_index_ends_the_embedded_server_that_it_started(here: Path, tree: Path) -> None:
    said = text(python("examples.file_index", str(tree)))
    assert "0 differ" in said
    assert (here / ".pgtask/data").is_dir()
    assert not embedded.is_running(here)


def test_the_examples_use_public_names_only() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert not re.search(r"pgtask\._|from pgtask import _", path.read_text()), path


def test_file_index_refuses_what_is_no_directory(dsn: str) -> None:
    result = python("examples.file_index", "/nowhere", dsn=dsn)
    assert (result.returncode, result.stderr) == (2, b"/nowhere is not a directory\n")


# --- workflows


def test_approval_pays_small_sums_and_asks_about_large_ones(dsn: str) -> None:
    rows = Rows(dsn)
    with Fleet(dsn, app="examples.approval:app") as fleet:
        small = text(python("examples.approval", "80", dsn=dsn)).strip()
        fleet.until(f"paid 80 for a chair ({small}/pay)")
        large = text(python("examples.approval", "1200", dsn=dsn)).strip()
        rows.until("SELECT wakeup_at > now() + interval '6 days' FROM pg_task WHERE locked_by IS NULL")
        assert "PAUSED" in text(python("pgtask", "runs", "--state", "PAUSED", dsn=dsn))
        decision = '{"approved": true, "by": "Ada"}'
        text(python("pgtask", "signal", large, "approval", decision, dsn=dsn))
        fleet.until("paid 1200 for a chair")
        rows.until("SELECT count(*) = 0 FROM pg_task")
        page = text(python("pgtask", "run", large, dsn=dsn))
    assert re.search(r"state +SUCCESS", page)
    assert re.search(r'signal +approval .*\{"approved":true,"by":"Ada"\}', page)
    assert "1 of" not in page
    assert python("pgtask", "signal", large, "approval", decision, dsn=dsn).returncode == 1


def test_saga_undoes_what_was_booked(dsn: str) -> None:
    rows = Rows(dsn)
    text(python("examples.saga", "4", dsn=dsn))
    with Fleet(dsn, "--burst", app="examples.saga:app") as fleet:
        assert fleet.ends() == 0, fleet.output
    ledger: dict[int, list[str]] = {}
    for row in rows("SELECT trip, what FROM trip_ledger WHERE what <> 'bank away' ORDER BY at"):
        ledger.setdefault(row[0], []).append(row[1])
    booked, undone = ["book flight", "book hotel", "charge"], ["book flight", "undo flight"]
    assert ledger == {0: booked, 1: undone, 2: booked, 3: undone}


def test_word_count_counts_a_tree_and_names_what_it_cannot_read(dsn: str, tree: Path) -> None:
    (tree / "good.txt").write_text("many words, many of them the same words: words\n")
    (tree / "below" / "more.md").write_text("words\n")
    (tree / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with Fleet(dsn, app="examples.word_count:app", procs=2) as fleet:
        said = text(python("examples.word_count", str(tree), dsn=dsn))
        assert "8 words in 3 files: words, many, same, them" in said
        assert f"could not be read: {tree / 'bad.txt'}" in said
        parked = Rows(dsn).value("SELECT id::text FROM pg_task WHERE error IS NOT NULL")
        (tree / "bad.txt").write_text("mended")
        text(python("pgtask", "resume", parked, dsn=dsn))
        Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
        assert '{"mended":1}' in text(python("pgtask", "run", parked, dsn=dsn))
        assert "could not" not in fleet.output


def test_agent_survives_its_worker_and_asks_now_and_then(dsn: str, here: Path) -> None:
    rows, maze = Rows(dsn), here / "maze"
    for number in range(120):
        (maze / f"{number:03}").mkdir(parents=True)
        (maze / f"{number:03}" / "file").write_bytes(b"x" * number)
    with Fleet(dsn, "--lease-timeout=2", "--heartbeat-interval=0.5", app="examples.agent:app") as fleet:
        run = text(python("examples.agent", str(maze), dsn=dsn)).strip()
        rows.until("SELECT count(*) > 50 FROM pg_task_checkpoints")
        fleet.family()[0].kill()
        rows.until(
            "SELECT waits_on = 'signal answer' FROM pg_task_runs JOIN pg_task USING (id) WHERE locked_by IS NULL"
        )
        text(python("pgtask", "signal", run, "answer", '"go on"', dsn=dsn))
        rows.until("SELECT count(*) = 0 FROM pg_task")
    output = rows.value("SELECT output FROM pg_task_runs")
    assert output == f'"{maze / "119" / "file"} (119 bytes) after 121 turns"'
    assert rows.value("SELECT count(*) = count(DISTINCT name) FROM pg_task_checkpoints")


# --- the reference


class _AsWritten:
    """An annotation whose repr is what stands in the source."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def __repr__(self) -> str:
        written = self._annotation
        return written if isinstance(written, str) else inspect.formatannotation(written)


def as_text(signature: inspect.Signature) -> str:
    """A signature as a document shows it, on one line and without `self`."""
    parameters = [
        one.replace(annotation=_AsWritten(one.annotation))
        for one in signature.parameters.values()
        if one.name != "self"
    ]
    text = str(signature.replace(parameters=parameters))
    for module in ("datetime.", "collections.abc.", "typing.", "pgtask.batch.", "pgtask.limits."):
        text = text.replace(module, "")
    return text


def documented_signatures() -> list[str]:
    texts = blocks(ROOT / "docs/api.md", "text")
    return [" ".join(line.split()).replace("( ", "(") for line in texts]


@pytest.mark.parametrize("made", [pgtask.App, pgtask.Batch, pgtask.Client, pgtask.Policy, pgtask.SyncClient])
def test_the_reference_has_the_signature_of_each_class(made: type) -> None:
    signature = inspect.signature(made).replace(return_annotation=inspect.Signature.empty)
    assert made.__name__ + as_text(signature) in documented_signatures()


METHODS = [
    getattr(made, name)
    for made in (pgtask.Client, pgtask.Client.__mro__[1], pgtask.Consumer)
    for name in vars(made)
    if not name.startswith("_") and name != "dsn"
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_the_reference_has_the_signature_of_each_method(method: Any) -> None:
    name, signature = method.__name__, inspect.signature(method)
    signature = signature.replace(return_annotation=_AsWritten(signature.return_annotation))
    assert name + as_text(signature) in documented_signatures()


def test_the_reference_names_everything_that_is_public() -> None:
    said = (ROOT / "docs/api.md").read_text()
    for name in pgtask.__all__:
        assert re.search(rf"(^### |^\| `(pgtask\.errors\.)?){name}\b", said, re.MULTILINE), name
    for name in (*Policy.__struct_fields__, *Context.__struct_fields__):
        assert name.startswith("_") or f"| `{name}` |" in said, name


def test_the_reference_has_the_bases_of_each_error() -> None:
    section = (ROOT / "docs/api.md").read_text().partition("\n## Errors\n")[2]
    rows = re.findall(r"^\| `(?:pgtask\.errors\.)?(\w+)` \| ((?:`\w+`(?:, )?)+) \| ", section, re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", bases)) for name, bases in rows}
    everything = (getattr(pgtask.errors, name) for name in pgtask.errors.__all__)
    errors = [error for error in everything if issubclass(error, pgtask.PgtaskError)]
    assert told == {error.__name__: {base.__name__ for base in error.__bases__} for error in errors}


@pytest.mark.timeout(60)
def test_the_program_of_the_reference_runs(dsn: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(dsn)
    rows("CREATE TABLE page (url text PRIMARY KEY, text text)")
    (here / "feeds.py").write_text("\n\n".join(blocks(ROOT / "docs/api.md", "python")))
    monkeypatch.syspath_prepend(here)
    feeds = importlib.import_module("feeds")
    producers = [
        thing for thing in vars(feeds).values() if inspect.iscoroutinefunction(thing) and "step" not in arguments(thing)
    ]

    async def produce() -> None:
        async with pgtask.Client(dsn) as client:
            for producer in producers:
                await producer(client)

    run(produce())
    assert [producer.__name__ for producer in producers] == [
        "now_later_and_at_a_time",
        "once_for_each_page",
        "with_your_data_or_not_at_all",
        "many",
        "try_twice",
        "look_after_a_task",
        "look_after_many_tasks",
    ]
    with Fleet(dsn, "--burst", "--burst-horizon=1", app="feeds:app") as fleet:
        assert fleet.ends() == 1
    assert rows.value("SELECT count(*) FROM page WHERE text LIKE 'the text of %'") == 1005
    assert [tuple(row) for row in rows("SELECT split_part(step, '\"', 8), error FROM pg_task ORDER BY 1")] == [
        ("http://i.example/", "http://i.example/ is not safe to fetch"),
        ("https://b.example/", None),
        ("https://c.example/", None),
        ("https://h.example/busy", None),
    ]


def arguments(function: Any) -> Sequence[str]:
    return list(inspect.signature(function).parameters)


# --- what the documents say


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_python_in_documents_compiles(name: str) -> None:
    for number, block in enumerate(blocks(ROOT / name, "python")):
        compile(block, f"{name} block {number}", "exec")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(ROOT / name)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{name} links to {target}"


def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def source_files() -> list[str]:
    """List our files, and not those of the virtual environment, which are many."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "build"))]
    found = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    return [path.as_posix() for path in found]


@pytest.mark.parametrize("name", NAMES)
def test_files_and_tests_that_are_named_exist(name: str) -> None:
    said = without_code(ROOT / name)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", said):
        assert f"def {test}(" in tests, f"{name} names {test}"
    for file in re.findall(r"`([\w/]+\.(?:py|pyx|sql))`", said):
        found = any(path.endswith(f"/{file}") for path in source_files())
        assert found or file in ("greetings.py", "produce.py", "feeds.py", "documents.py", "orders.py", "request.py"), (
            f"{name} names {file}"
        )


def table_row(setting: Setting) -> str:
    words = (setting.flag, setting.metavar) if setting.name != "app" else (setting.metavar,)
    flag = " ".join(word for word in words if word)
    return f"| `{flag}` | `{setting.variable}` | `{setting.key}` | {setting.help} |"


def test_the_table_of_settings_is_complete() -> None:
    table = "\n".join(table_row(setting) for setting in SETTINGS)
    section = (ROOT / "docs/operations.md").read_text().partition("\n## Commands")[0]
    assert f"|---|---|---|---|\n{table}\n\n" in section, f"docs/operations.md should say:\n{table}"


def test_the_settings_of_the_example_file_are_settings(here: Path) -> None:
    (block,) = blocks(ROOT / "docs/operations.md", "toml")
    (here / "pyproject.toml").write_text(block)
    config = load_config(environ={})
    assert (config.app, config.procs, config.queue, config.listen) == ("greetings:app", 4, ("default", "mail"), True)


def test_the_table_of_events_is_complete() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("## Watching")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    documented = {(event, level) for events, level, *_ in lines for event in re.findall(r"`(\S+)`", events)}
    source = "\n".join(path.read_text() for path in (ROOT / "pgtask").rglob("*.py"))
    by_level = re.findall(r'logging\.(INFO|WARNING|ERROR)(?: if .*)?,\s+"([a-z]+\.[a-z_]+)"', source)
    by_method = re.findall(r'\.(info|warning|error)\(\s*"([a-z]+\.[a-z_]+)"', source)
    logged = {(event, level.lower()) for level, event in by_level + by_method}
    embedded_events = {(event, "info") for event in re.findall(r'"(embedded\.[a-z]+)"', source)}
    assert documented == logged | embedded_events


@pytest.mark.timeout(60)
def test_the_statements_for_psql_work(dsn: str) -> None:
    rows = Rows(dsn)
    statements = blocks(ROOT / "docs/operations.md", "sql")
    rows('INSERT INTO pg_task (step) VALUES (\'{"Greeter":{"ReadName":{"filename":"name.txt"}}}\')')
    for statement in statements:
        rows(statement)
    assert len(statements) >= 8
