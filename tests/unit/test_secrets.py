"""No message, argument list or traceback shows a piece of a password, however the DSN is malformed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fix_database import run
from fleet import Fleet
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from paths import PYTHONPATH

from pgtask import Client
from pgtask._cli import process_list, supervisor
from pgtask._cli.commands import psql
from pgtask._cli.main import main as pgtask_main
from pgtask._cli.main import parse
from pgtask._dsn import check_dsn, redact
from pgtask._postgres.connection import connect
from pgtask._postgres.embedded import binary
from pgtask._postgres.pools import client_pool
from pgtask.app import load_app
from pgtask.config import Config, load_config
from pgtask.errors import ConfigError, PgtaskError

RARE = "QXZJqxzj"  # letters that no word of a message puts beside each other
PASSWORDS = st.text(st.sampled_from(RARE * 3 + "/#?@%:;&=',\"\\ []+é\t\n7"), min_size=4, max_size=24)
WHERE = "127.0.0.1:1"  # refuses at once
PLACES = [
    f"postgresql://ada:{{}}@{WHERE}/db",
    f"postgres://:{{}}@{WHERE},{WHERE}/db?sslmode=disable",
    f"postgresql://ada@corp:{{}}@{WHERE}/db",
    "postgresql://ada:{}@/db?host=/tmp&port=1",
    f"postgresql://ada@{WHERE}/db?password={{}}",
    f"postgresql://{WHERE}/db?sslkey=k&sslpassword={{}}&user=ada",
    f"postgresql://{WHERE}/db?user=ada&PASSWORD={{}}&application_name=x",
    f"postgresql+asyncpg://ada:{{}}@{WHERE}/db",
    f"mysql://ada:{{}}@{WHERE}/db",
    f"jdbc:postgresql://{WHERE}/db?user=ada&password={{}}",
    f"POSTGRESQL://ada:{{}}@{WHERE}/db",
    f" postgresql://ada:{{}}@{WHERE}/db\n",
    f"ada:{{}}@{WHERE}/db",
    f"postgresql:/ada:{{}}@{WHERE}/db",
    "host=127.0.0.1 port=1 user=ada password={} dbname=db",
    "host=127.0.0.1 port=1 password='{}' dbname=db",
    "host=127.0.0.1 port=1 Password = {}",
    "sslpassword='{}' passfile=/nowhere host=127.0.0.1 port=1",
    f"postgresql://{WHERE}/db;password={{}}",
    f"postgresql://{WHERE}/db%3Bpassword%253D{{}}",
    f"postgresql://ada@{WHERE}/db&password={{}}",
    f"postgresql://ada%3A{{}}@{WHERE}/db",
    f"postgresql://ada%253a{{}}%40{WHERE}/db",
    "host=127.0.0.1 password=a:{}",
    f"\npostgresql://ada:{{}}@{WHERE}/db",
]


def pieces(password: str) -> Iterator[str]:
    """Return each four characters of a secret that no message has by chance."""
    for at in range(len(password) - 3):
        four = password[at : at + 4]
        if sum(letter in RARE for letter in four) >= 3:
            yield from {four, repr(four)[1:-1], json.dumps(four)[1:-1]}


def assert_hidden(password: str, *said: str) -> None:
    for piece in pieces(password):
        for text in said:
            assert piece.lower() not in text.lower(), (piece, text)


def complaint(call: Callable[[], Any]) -> str:
    """Return the message and the whole traceback of a call that fails."""
    try:
        call()
    except PgtaskError as error:
        return f"{error}\n{''.join(traceback.format_exception(error))}"
    return ""


FAST = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=set(Phase) - {Phase.explain}
)
NASTY = [
    ("QXZJ/qxzj", PLACES[0]),
    ("QXZJ#qxzj", PLACES[0]),
    ("QXZJ?qx=zj", PLACES[0]),
    ("QX@ZJqx@zjqx", PLACES[0]),
    ("1234?user=QXZJqxzj", PLACES[0]),
    ("Q@127.0.0.1:1/qxzj?x=QXZJ", PLACES[0]),
    ("[QXZJqxzj", PLACES[0]),
    ("QXZJ\u2100qxzj", PLACES[0]),  # NFKC makes a/c of it, which Python's parser complains about
    ("QX''ZJqxzj qxzj", PLACES[15]),
    ("QX&ZJqxzj=qxzj", PLACES[4]),
    ("QXZJ@qxzj", PLACES[18]),
    ("@JJJ?", PLACES[22]),
    ("QXZJqxzj=QX@zj", PLACES[12]),
]


def with_nasty_examples(test: Any) -> Any:
    for password, place in NASTY:
        test = example(password=password, place=place)(test)
    return test


@with_nasty_examples
@FAST
@given(password=PASSWORDS, place=st.sampled_from(PLACES))
def test_messages_about_settings_hide_passwords(tmp_path: Path, password: str, place: str) -> None:
    dsn = place.format(password)
    (tmp_path / "pyproject.toml").write_text(f"[tool.pgtask]\ndsn = {json.dumps(dsn)}\n", encoding="utf-8")
    nowhere = Path("/nowhere")
    said = [
        redact(dsn),
        repr(Config(dsn=dsn)),
        complaint(lambda: load_config({"dsn": dsn}, environ={}, directory=nowhere)),
        complaint(lambda: load_config({"procs": dsn}, environ={}, directory=nowhere)),
        complaint(lambda: load_config({"queue": [dsn, "a\n" + dsn]}, environ={}, directory=nowhere)),
        complaint(lambda: load_config(environ={"PGTASK_QUEUE": dsn + "\n"}, directory=nowhere)),
        complaint(lambda: load_config(environ={"PGTASK_QUEUE": dsn}, directory=nowhere)),
        complaint(lambda: load_config(environ={"PGTASK_DSN": dsn}, directory=nowhere)),
        complaint(lambda: load_config(environ={"DATABASE_URL": dsn}, directory=nowhere)),
        complaint(lambda: load_config(environ={}, directory=tmp_path)),
        complaint(lambda: load_app(dsn)),
        complaint(lambda: load_app(f"{dsn}:app")),
    ]
    listed = process_list._without_passwords(b"pgtask\0list\0--dsn\0" + os.fsencode(dsn) + b"\0")
    said.append(listed.decode(errors="replace"))
    try:
        said.append(psql._without_passwords(check_dsn(dsn))[0])
    except ValueError as refused:
        said.append("".join(traceback.format_exception(refused)))
    assert_hidden(password, *said)


@with_nasty_examples
@settings(FAST, max_examples=15)
@given(password=PASSWORDS, place=st.sampled_from(PLACES))
def test_messages_about_arguments_hide_passwords(password: str, place: str) -> None:
    dsn = place.format(password)
    said = [complaint(lambda words=words: parse(words)) for words in command_lines(dsn)]  # type: ignore[misc]
    said += [complaint(lambda words=words: supervisor._parse(words)) for words in supervisors(dsn)]  # type: ignore[misc]
    assert_hidden(password, *said)


@with_nasty_examples
@settings(FAST, max_examples=30)
@given(password=PASSWORDS, place=st.sampled_from(PLACES))
def test_messages_about_connections_hide_passwords(password: str, place: str) -> None:
    dsn = place.format(password)
    said = [
        complaint(lambda: run(connect(dsn, name="test"))),
        complaint(lambda: run(client_pool(dsn, size=1))),
        complaint(lambda: run(Client(dsn).__aenter__())),
    ]
    assert all(said)
    assert_hidden(password, *said)


def command_lines(dsn: str) -> list[list[str]]:
    return [
        ["--dsn", dsn, "nothing"],
        [dsn, "list"],
        ["list", dsn],
        ["list", "--dns", dsn],
        ["list", f"--dns={dsn}"],
        ["list", "--limit", dsn],
        ["list", "--state", dsn],
        ["runs", "--state", dsn],
        ["list", f"-c{dsn}"],
        ["enqueue", "--delay", dsn, "Step"],
    ]


def supervisors(dsn: str) -> list[list[str]]:
    return [["app:app", dsn], ["app:app", "--database", dsn], [f"--url={dsn}"], ["app:app", "--dsn", dsn, dsn]]


@FAST
@given(PASSWORDS, st.sampled_from(PLACES))
def test_hidden_process_title_keeps_its_size(password: str, place: str) -> None:
    area = b"pgtask\0list\0--dsn=" + os.fsencode(place.format(password)) + b"\0"
    assert len(process_list._without_passwords(area)) == len(area)


@pytest.mark.parametrize(
    "words", [["--password", "hunter2"], ["list", "--password=hunter2"], ["list", "--dsn-", "x:y"]]
)
def test_word_after_password_flag_is_not_quoted(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert words[-1].rpartition("=")[2] not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--dsn", "postgres"], "use postgresql://USER@HOST/DATABASE, or postgresql:///DATABASE?host=/tmp for"),
        (["list", "--dsn", "e"], "use postgresql://USER@HOST/DATABASE, or postgresql:///DATABASE?host=/tmp for"),
        (["list", "--db", "a"], "unrecognized arguments: --db ***; did you mean --dsn? (see pgtask list --help)"),
        (["list", "--database", "list"], "unrecognized arguments: --database list"),
        (["list", "--secret", "see"], "unrecognized arguments: --secret ***; did you mean --where? (see pgtask list"),
        (["--db", "list"], "unrecognized arguments: --db"),
        (["show", "@"], "is not an id, nor the first 8 or more digits of one"),
        (["show", "://"], "is not an id, nor the first 8 or more digits of one"),
    ],
)
def test_redaction_leaves_our_own_text_intact(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pgtask_main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://host/db;password=Gauss@Zwei1777", "postgresql://***"),
        ("postgresql://host/db;password%253DGauss@Zwei1777", "postgresql://***"),
        ("postgresql://ada@host/db;password=Gauss1777", "postgresql://ada@***"),
        ("postgresql://ada%3Asecret-1777@h/db", "postgresql://ada***"),
        ("postgresql://ada%3Asecret%40h/db", "postgresql://ada***"),
        ("postgresql://h/db?options=password%3Dabc", "postgresql://h/db?***"),
        ("postgresql://ada:x@%2Ftmp/db?options=-c%20x%3Dy", "postgresql://ada:***@%2Ftmp/db?options=-c%20x%3Dy"),
    ],
)
def test_possible_password_is_not_shown(dsn: str, shown: str) -> None:
    assert redact(dsn) in (shown, "postgresql://***")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://ada:QX/ZJ@h/db",
        "postgresql://ada:QX#ZJ@h/db",
        "postgresql://ada:QX?ZJ@h/db",
        "postgresql://ada:QX@ZJ@h/db",
        "postgresql://ada:QX%ZJ@h/db",
        "postgresql://ada:QX ZJ@h/db",
        "postgresql://ada:QX[ZJ@h/db",
        "postgresql://ada:QXZJ/db",
    ],
)
def test_dsn_broken_by_its_password_shows_remedy(dsn: str) -> None:
    said = complaint(lambda: load_config({"dsn": dsn}, environ={}, directory=Path("/nowhere")))
    assert "percent-encode / ? # @ % [ ] and white space in a password" in said
    assert "percent-encode" in complaint(lambda: run(connect(dsn, name="test")))


@pytest.mark.parametrize("value", [["postgresql://u:QXZJ@h/db"], {"url": "postgresql://u:QXZJ@h/db"}, 1])
def test_dsn_in_file_that_is_no_text_is_not_quoted(value: Any, tmp_path: Path) -> None:
    text = json.dumps(value).replace(": ", " = ") if isinstance(value, dict) else json.dumps(value)
    (tmp_path / "pyproject.toml").write_text(f"[tool.pgtask]\ndsn = {text}\n")
    with pytest.raises(ConfigError, match=r"^\[tool.pgtask\] dsn=\(\w+\): expected a text$"):
        load_config(environ={}, directory=tmp_path)


@pytest.mark.parametrize("scheme", ["postgresql+asyncpg", "mysql"])
def test_unknown_scheme_is_named(scheme: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"; {scheme} is another scheme")):
        check_dsn(f"{scheme}://u:QXZJ@h/db")


def test_unreadable_service_file_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "services"
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    for content in ("[x]\npassword=QX%ZJqxzj\n", "QXZJqxzj\n"):
        file.write_text(content)
        said = complaint(lambda: run(connect(f"postgresql://{WHERE}/db?service=x", name="test")))
        assert "the service file cannot be read" in said
        assert_hidden("QXZJqxzj%ZJqxzj", said)


def test_commands_explain_bad_arguments_without_quoting_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dsn = "postgresql://ada:QXZJqxzj@h/db"
    for words in (["show", dsn], ["run", dsn], ["enqueue", dsn, "Step", "{}"], ["graph", dsn], ["signal", dsn, "x"]):
        assert pgtask_main([*words]) != 0
        assert_hidden("QXZJqxzj", *capsys.readouterr())


@pytest.mark.skipif(sys.platform != "linux", reason="done by way of /proc")
def test_process_list_shows_no_password(dsn: str) -> None:
    """Check the supervisor and its workers, and that the log has the DSN without the password."""
    secret = dsn.replace("postgres@", "postgres:QXZJqxzj@", 1)
    assert secret != dsn
    with Fleet(secret, procs=2) as fleet:
        named = fleet.until("database.named")
        fleet.until("worker.ready", times=2)
        lines = [" ".join(process.cmdline()) for process in (psutil.Process(fleet.process.pid), *fleet.family())]
    assert len(lines) == 3
    for line in lines:
        assert "--dsn postgresql://postgres:***@" in line
    assert "postgres:***@" in named
    assert_hidden("QXZJqxzj", *lines, fleet.output)


def test_log_warns_if_process_title_cannot_be_changed(dsn: str, tmp_path: Path) -> None:
    program = (
        "import sys; from pgtask._cli import supervisor; supervisor.hide_passwords = lambda: False; "
        "sys.exit(supervisor.main())"
    )
    for secret, times in ((dsn.replace("postgres@", "postgres:QXZJqxzj@", 1), 1), (dsn, 0)):
        said = subprocess.run(
            [sys.executable, "-c", program, "apps:app", "--burst", "--dsn", secret],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0, said.stderr
        assert said.stderr.count("password.visible") == times


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="done by way of a file in memory")
def test_psql_gets_password_out_of_sight(tmp_path: Path) -> None:
    script = tmp_path / "psql"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"; cat "$PGSERVICEFILE"; echo "$PGSERVICE"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    dsn = "postgresql://h/db?sslkey=k&sslpassword=Q%26X"
    command = [sys.executable, "-m", "pgtask", "psql", "--dsn", dsn, "-c", "x"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines() == [
        *("--dbname=postgresql://h/db?sslkey=k", "-c", "x"),
        *("[pgtask]", "sslpassword=Q&X", "pgtask"),
    ]
    command[5] = dsn + "&service=mine"
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (2, "")
    assert "put that into the service file too" in said.stderr


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="done by way of a file in memory")
def test_psql_reads_password_file(dsn: str) -> None:
    environment = psql._make_service("QXZJ", dsn)
    file = int(environment["PGSERVICEFILE"].rpartition("/")[2])
    command = [str(binary("psql")), f"--dbname={dsn}", "-Atc", "SELECT 1", "-c", "\\c", "-c", "SELECT 2"]
    try:
        said = subprocess.run(
            command, env={**os.environ, **environment}, pass_fds=[file], capture_output=True, text=True, timeout=60
        )
    finally:
        os.close(file)
    assert (said.returncode, said.stderr) == (0, "")
    assert {"1", "2"} <= set(said.stdout.splitlines())
