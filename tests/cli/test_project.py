"""The directory of the project, and the commands that make a database in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fix_commands import Command, insert
from greeter import APP
from paths import PYTHONPATH

from pgtask import _project
from pgtask._cli import supervisor
from pgtask._postgres import embedded
from pgtask._project import find_project
from pgtask.config import load_config
from pgtask.errors import ConfigError

ID = "00000000-0000-4000-8000-000000000000"
READERS = [
    ["list"],
    ["list", "--json"],
    ["show", ID],
    ["stats"],
    ["runs"],
    ["run", ID],
    ["retry", "--parked"],
    ["cancel", ID],
    ["signal", ID, "x"],
    ["resume", ID],
    ["prune", "--older-than", "30d"],
    ["psql", "-c", "SELECT 1"],
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory below which we stand, with nothing in it."""
    directory = tmp_path / "project"
    (directory / "sub" / "sub").mkdir(parents=True)
    monkeypatch.chdir(directory / "sub" / "sub")
    yield directory
    for place in (directory, directory / "sub" / "sub"):
        embedded.stop(place)


def write(directory: Path, text: str) -> None:
    (directory / "pyproject.toml").write_text(text)


@pytest.mark.parametrize("words", READERS, ids=lambda words: words[0])
def test_a_reading_command_makes_no_database(project: Path, words: list[str], command: Command) -> None:
    here = Path.cwd()
    said = command(*words)
    assert (said.code, said.out) == (5, "")
    message = f"pgtask: there is no database in {here}: name one by --dsn or DATABASE_URL, or make one here by: "
    assert said.err == message + "pgtask migrate\n"
    assert list(project.rglob(".pgtask")) == []


def test_stop_makes_no_database(project: Path, command: Command) -> None:
    assert command("stop") == (0, "the embedded PostgreSQL is not running, so no worker is working\n", "")
    assert command("stop", "--server") == (0, "the embedded PostgreSQL was not running\n", "")
    assert list(project.rglob(".pgtask")) == []


def test_the_database_of_a_directory_above_is_used_by_all(project: Path, command: Command) -> None:
    dsn = embedded.start(project)
    assert command("migrate").code == 0
    insert(dsn)
    said = command("enqueue", APP, "SayHello")
    assert (said.code, said.err) == (0, "")
    assert len(command("list", "--json").objects) == 2
    assert command("stop", "--server").out == "the embedded PostgreSQL has stopped\n"
    said = command("list")
    assert said.err.startswith(f"pgtask: starting the embedded PostgreSQL in {project / '.pgtask'} (to stop it: ")
    assert list(project.rglob(".pgtask")) == [project / ".pgtask"]


def test_the_nearest_project_wins(project: Path) -> None:
    here = Path.cwd()
    assert find_project() == here
    write(project, "[tool.pgtask]\nprocs = 3\n")
    assert (find_project(), load_config(environ={}).procs) == (project, 3)
    write(here.parent, "[tool.other]\nx = 1\n")
    assert find_project() == project, "a file without our section is none of ours"
    (here.parent / ".pgtask" / "data").mkdir(parents=True)
    assert find_project() == here.parent
    write(here, "[tool.pgtask]\nprocs = 4\n")
    assert (find_project(), load_config(environ={}).procs) == (here, 4)
    write(here, "[tool.pgtask\n")
    with pytest.raises(ConfigError, match=r"pyproject\.toml: "):
        load_config(environ={})


def test_a_directory_in_which_others_can_write_is_not_looked_in(project: Path, command: Command) -> None:
    write(project, '[tool.pgtask]\ndsn = "postgresql://127.0.0.1:1/evil"\napp = "evil:app"\n')
    (project / ".pgtask" / "data").mkdir(parents=True)
    assert find_project() == project
    project.chmod(0o1777)
    assert find_project() == Path.cwd()
    said = command("list")
    assert said.code == 5
    assert said.err.endswith(f". There is one in {project}, which others can write to: change to it\n")
    (project / ".pgtask" / "data").rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another owner")
def test_a_directory_of_another_user_is_not_looked_in(project: Path) -> None:
    write(project, "[tool.pgtask]\nprocs = 3\n")
    os.chown(project, 65534, 65534)
    assert find_project() == Path.cwd()
    os.chown(project, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another group")
def test_a_directory_that_a_group_can_write_to_is_not_looked_in(project: Path) -> None:
    write(project, "[tool.pgtask]\nprocs = 3\n")
    project.chmod(0o775)
    assert find_project() == project, "root's own group has no other members"
    os.chown(project, 0, 65534)
    assert find_project() == Path.cwd()
    project.chmod(0o755)
    assert find_project() == project


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another owner")
def test_a_file_of_another_user_is_not_read(project: Path) -> None:
    write(project, "[tool.pgtask]\nprocs = 3\n")
    file = project / "pyproject.toml"
    os.chown(file, 65534, 65534)
    assert find_project() == Path.cwd()
    os.chown(file, 0, 65534)
    file.chmod(0o664)
    assert find_project() == Path.cwd()
    file.chmod(0o644)
    assert find_project() == project
    write(Path.cwd(), "[tool.pgtask]\nprocs = 4\n")
    os.chown(Path.cwd() / "pyproject.toml", 65534, 65534)
    assert load_config(environ={}).procs == 4, "that of the working directory counts in any case"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another owner")
def test_data_that_others_could_have_put_there_is_not_used(project: Path) -> None:
    data = project / ".pgtask" / "data"
    data.mkdir(parents=True)
    os.chown(data, 65534, 65534)
    assert find_project() == project, "the server of root runs as nobody"
    os.chown(data.parent, 65534, 65534)
    assert find_project() == Path.cwd()
    os.chown(data.parent, 0, 65534)
    data.parent.chmod(0o775)
    assert find_project() == Path.cwd()
    data.rmdir()


def test_data_of_another_user_is_not_used_but_by_root(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = project / ".pgtask" / "data"
    data.mkdir(parents=True)
    owner = data.stat().st_uid
    assert _project._is_ours_or_server(data)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert _project._is_ours_or_server(data) == (owner == 0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert _project._is_ours_or_server(data)
    data.rmdir()


def test_an_app_of_the_project_is_imported_from_below(project: Path, command: Command) -> None:
    source = (
        "from __future__ import annotations\nfrom pgtask import App, Context, Done, Task\n"
        "class Hello(Task): pass\nclass World(Hello):\n    async def run(self, ctx: Context) -> Done: return Done()\n"
        "app = App(Hello)\n"
    )
    (project / "project_app.py").write_text(source)
    write(project, '[tool.pgtask]\napp = "project_app:app"\n')
    before = list(sys.path)
    try:
        assert "[*] --> World" in command("graph").out
    finally:
        sys.path[:] = before


# --- a working directory that was removed -------------------------------------------------------------------


def in_removed_directory(tmp_path: Path, module: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os, sys; os.rmdir({str(gone)!r}); from {module} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *words],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pgtask._cli.main", ["list"]),
        ("pgtask._cli.main", ["enqueue", "greeter:app", "SayHello"]),
        ("pgtask._cli.main", ["stop", "--server"]),
        ("pgtask._cli.supervisor", ["greeter:app"]),
    ],
)
def test_a_removed_working_directory_is_one_line(tmp_path: Path, module: str, words: list[str]) -> None:
    done = in_removed_directory(tmp_path, module, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert ": the working directory no longer exists: change to another one, or name the database by" in done.stderr


def test_a_removed_working_directory_is_not_read_when_all_is_set(tmp_path: Path, dsn: str) -> None:
    insert(dsn, step="""'{"Mailer":{"Flush":null}}'""")
    done = in_removed_directory(tmp_path, "pgtask._cli.main", "list", "--json", PGTASK_DSN=dsn)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    words = ["--burst", "--procs", "1"]
    environ = {"PGTASK_DSN": dsn, "PGTASK_APP": "greeter:app"}
    done = in_removed_directory(tmp_path, "pgtask._cli.supervisor", *words, **environ)
    assert done.returncode == 0, done.stderr
    assert "1 task done" in done.stdout


def test_unreadable_working_directory_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pgtask]\nprocs = 3\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert load_config({"procs": "2"}, environ={}, directory=tmp_path).procs == 2


def test_the_supervisor_uses_the_project_above(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project, "[tool.pgtask]\nprocs = 0\n")
    assert supervisor.main(["a:b"]) == 2
    assert "[tool.pgtask] procs=0" in capsys.readouterr().err
