"""`pgtask web`: each page over HTTP from the real program, what it escapes, what it refuses, and what it changes."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from html import unescape
from uuid import UUID

import httpx
import pytest
from console import Console, serve
from fix_commands import LEASED, PARKED, Command, insert, query
from fix_database import execute, run

from pgtask._observe.web.guard import host_of
from pgtask._observe.web.sessions import WebSessions
from pgtask._postgres.console import MAX_CHECKPOINTS
from pgtask._postgres.tasks import transaction
from pgtask.errors import DatabaseError, StatementTimeout

pytestmark = pytest.mark.one_database(
    "DELETE FROM pg_task_runs; DELETE FROM pg_task_pauses; DELETE FROM pg_task_actions; DELETE FROM pg_task_limits; "
    "DELETE FROM pg_task_limit_keys; DELETE FROM pg_task_schedules; DELETE FROM pg_task_groups"
)

PAGES = ["/", "/tasks", "/runs", "/parked", "/machine", "/limits", "/schedules", "/groups"]
NONE = "\N{EN DASH}"
EVIL = "<script>alert(1)</script>"
SPAWN_RUN = """
    WITH made AS (
        INSERT INTO pg_task_runs (id, name, version, state, created_at, started_at, ended_at, output)
        VALUES (gen_random_uuid(), 'trip', 1, 'SUCCESS', now() - interval '9 s', now() - interval '9 s', now(), '"ok"')
        RETURNING id
    ), child AS (
        INSERT INTO pg_task_runs (id, name, version, parent, created_at)
        SELECT gen_random_uuid(), 'leg', 1, id, now() - interval '6 s' FROM made
    ), steps AS (
        INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result, seconds, recorded_at)
        SELECT id, i, i::text, 'step', 'flight ' || i, '"booked"', 1.5, now() - (9 - i) * interval '1 s'
        FROM made, generate_series(1, $1::int) AS i
    )
    SELECT id::text FROM made
"""


@pytest.fixture(scope="module")
def reader(module_dsn: str) -> Iterator[Console]:
    yield from serve("--dsn", module_dsn)


@pytest.fixture(scope="module")
def writer(module_dsn: str) -> Iterator[Console]:
    yield from serve("--dsn", module_dsn, "--write")


@pytest.fixture
def unlocked(writer: Console) -> Iterator[Console]:
    """A browser that has given the token."""
    with httpx.Client(base_url=writer.address, timeout=20) as client:
        answer = client.post("/unlock", data={"token": writer.token})
        assert answer.status_code == 303
        yield Console(writer.address, writer.token, client)


def mark(text: str) -> str:
    found = re.search(r'name="mark" value="(\w+)"', text)
    assert found, text
    return found[1]


def send(console: Console, path: str, text: str, **fields: str) -> str:
    answer = console.client.post(path, data={"mark": mark(text), **fields}, follow_redirects=True)
    assert answer.status_code == 200, answer.text
    return answer.text


# --- reading ------------------------------------------------------------------------------------------------


def test_now_shows_depth_leases_and_pauses(dsn: str, reader: Console) -> None:
    insert(dsn)
    insert(dsn, queue="'reports'", **PARKED)
    insert(dsn, queue="'reports'", **LEASED)
    run(
        execute(
            dsn, "INSERT INTO pg_task_pauses (kind, name, reason, paused_by) VALUES ('queue', 'reports', 'why', 'me')"
        )
    )
    worker = query(dsn, "SELECT left(locked_by::text, 8) FROM pg_task WHERE locked_by IS NOT NULL")[0][0]
    deadline = time.monotonic() + 20
    while worker not in (text := reader.page("/")):  # browsers share a look for a second
        assert time.monotonic() < deadline, text
    row = re.search(r"reports</a> <span class=\"state paused\">.*?</tr>", text, re.DOTALL)
    assert row
    assert re.findall(r">([^<]+)</td>", row[0])[:6] == [NONE, NONE, NONE, "1", "1", NONE]
    assert all(part in text for part in (worker, "queue reports", "why", "me"))


def test_the_list_takes_filters_and_has_pages(dsn: str, reader: Console) -> None:
    run(
        execute(
            dsn,
            """INSERT INTO pg_task (step, wakeup_at)
        SELECT '{"Greeter":{"SayHello":{}}}', now() - i * interval '1 s' FROM generate_series(1, 120) AS i""",
        )
    )
    parked = insert(dsn, step='\'{"Mailer":{"Send":{}}}\'', queue="'q'", error="'TimeoutError: 7'")
    seen, text = [], reader.page("/tasks", state="ready")
    while True:
        seen += re.findall(r'href="/tasks/([\w-]{36})"', text)
        following = re.search(r'rel="next" href="([^"]+)"', text)
        if following is None:
            break
        text = reader.page(unescape(following[1]))
    assert len(seen) == len(set(seen)) == 120
    for name, value in [
        ("state", "parked"), ("queue", "q,r"), ("task", "Mailer"), ("step", "Mailer.Send"), ("error", "Time%"),
    ]:  # fmt: skip
        assert re.findall(r'href="/tasks/([\w-]{36})"', reader.page("/tasks", 200, **{name: value})) == [parked]
    assert "No tasks match" in reader.page("/tasks", age="2d", queue="q")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tasks?state=lost", "state lost"),
        ("/tasks?age=soon", "age soon"),
        ("/tasks?after=x", "no place in a list"),
        ("/tasks?state=ready&error=x", "leave out the state"),
        ("/tasks?key=k", "a key belongs"),
        ("/tasks?step=A.B&task=C", "task C has no step A.B"),
        ("/tasks?queue=" + "x" * 501, "up to 500"),
        ("/tasks?error=" + "x" * 10_001, "up to 10,000"),
        ("/tasks?task=%00", "NUL"),
        ("/tasks?error=a%00b", "NUL"),
        ("/runs?name=%00", "NUL"),
        ("/tasks?error=a%5C", "backslash at its end"),
        ("/tasks?error=%5C%5C%5C", "backslash at its end"),
        ("/tasks?task=%zz", "write %25"),
        ("/tasks?task=a%2", "write %25"),
        ("/tasks?task=%ff", "not UTF-8"),
        ("/tasks?sort=age", "there is no field"),
        ("/tasks?state=parked&state=ready", "give it once"),
        ("/tasks?queue=a,", "printable string"),
        ("/tasks?queue=%01", "printable string"),
        ("/tasks?age=1e999", "too long"),
        ("/tasks?age=-1", "age -1"),
        ("/tasks?after=parked.0.-99999999999999999999.0.0", "no place in a list"),
        ("/tasks?after=parked.0.0.-1.0", "no place in a list"),
        ("/runs?page=-1", "there is no field"),
        ("/tasks/17", "17 is not an id"),
        ("/runs?state=odd", "state odd"),
        ("/runs?before=odd", "odd is not an id"),
    ],
)
def test_a_wrong_question_gets_one_clear_answer(reader: Console, path: str, expected: str) -> None:
    assert expected in unescape(reader.page(path, 400))


def test_any_other_text_is_only_a_text(dsn: str, reader: Console) -> None:
    insert(dsn, **PARKED)
    for text in ["a\\\\", "%_\\%", "[", "(?<", "*+", '"', "\\d", "\N{SNOWMAN}\t\n", "'; --", "\\\\" * 200]:
        for name in ("task", "step", "error"):
            assert "No tasks match" in reader.page("/tasks", 200, **{name: text})
        assert "No runs match" in reader.page("/runs", name=text)


def test_a_task_has_a_page(dsn: str, reader: Console) -> None:
    task = insert(dsn, key="'Greeter/k1'", **PARKED)
    text = reader.page(f"/tasks/{task}")
    assert all(part in text for part in (task, "Greeter.", "k1", "boom", "parked_at"))
    assert "its run" not in text
    assert "never existed" in reader.page(f"/tasks/{UUID(int=0)}", 404)
    assert f'href="/tasks/{task}"' in reader.page(f"/runs/{task}", 404)


def test_a_run_is_a_timeline_with_children(dsn: str, reader: Console) -> None:
    trip = query(dsn, SPAWN_RUN, 4)[0][0]
    assert trip in reader.page("/runs", name="trip", state="SUCCESS")
    assert trip not in reader.page("/runs", state="ERROR")
    text = reader.page(f"/runs/{trip}")
    bars = [
        (float(x), float(width)) for x, width in re.findall(r'<rect class="step" x="([\d.]+)%" width="([\d.]+)%"', text)
    ]
    assert len(bars) == 4
    assert bars == sorted(bars)
    assert all(x + width <= 100.5 for x, width in bars)
    assert text.count("1.5 s") == 4
    child = re.search(r'href="/runs/([\w-]+)" title=', text)
    assert child
    assert trip in reader.page(f"/runs/{child[1]}")
    assert "The run has ended" in reader.page(f"/tasks/{trip}", 404)


def test_a_long_run_shows_its_last_checkpoints(dsn: str, reader: Console) -> None:
    trip = query(dsn, SPAWN_RUN, MAX_CHECKPOINTS + 5)[0][0]
    text = reader.page(f"/runs/{trip}")
    assert text.count('<rect class="step"') == MAX_CHECKPOINTS
    assert f"flight {MAX_CHECKPOINTS + 5}<" in text
    assert "flight 5<" not in text


def test_parked_tasks_are_folded_by_cause(dsn: str, reader: Console) -> None:
    for number in range(3):
        insert(dsn, error=f"E'ValueError: card {number} of 100%_\\\\\\n at x.py:{number}'")
    other = insert(dsn, error="'KeyError: 1'")
    text = reader.page("/parked")
    assert re.findall(r'<td class="n">(\d+)</td>', text) == ["3", "1"]
    assert "ValueError: card # of #%_\\</a>" in text
    links = [unescape(link) for link in re.findall(r'class="text"><a href="([^"]+)"', text)]
    found = [re.findall(r'href="/tasks/([\w-]{36})"', reader.page(link)) for link in links]
    assert [len(ids) for ids in found] == [3, 1]
    assert found[1] == [other]


def test_the_machine_counts_tasks_at_each_step(dsn: str, reader: Console) -> None:
    for columns in ({}, {"wakeup_at": "now() + interval '1 h'"}, PARKED, PARKED, LEASED):
        insert(dsn, step='\'{"Greeter":{"SayHello":{}}}\'', **columns)
    insert(dsn, step='\'{"Gone":{"Away":{}}}\'')
    text = reader.page("/machine")
    box = re.search(r"<title>Greeter.SayHello,.*?</g>", text, re.DOTALL)
    assert box
    assert re.findall(r">(\d\+?)</tspan>", box[0]) == ["1", "1", "1", "2"]
    assert "Gone.Away" in text.partition("Steps that the app has not")[2]


FILL = """
    INSERT INTO pg_task_limits (name, concurrency, rate, failures, pause, changed, changed_by)
    VALUES ('host', 2, 0.1, 3, 60, '{rate}', 'ann');
    INSERT INTO pg_task_limit_keys (limit_key, failures, paused_until)
    VALUES ('host down', 3, now() + interval '1 h'), ('host busy', 0, NULL);
    INSERT INTO pg_task (step, limit_key, limit_at, wakeup_at)
    SELECT '{"Crawl":{"Fetch":null}}', 'host busy', now(), 'infinity' FROM generate_series(1, 3);
    INSERT INTO pg_task_schedules (name, app, cron, step, next_at, look_at, last_at, last_task)
    VALUES ('nightly', 'a:b', '0 3 * * *', '{"Crawl":{"Plan":{}}}', now() - interval '9 min', now(), now(),
            gen_random_uuid());
    WITH one AS (
        INSERT INTO pg_task_groups (name, total, started_at) VALUES ('crawl', 10, now() - interval '4 s') RETURNING id
    ), counted AS (
        INSERT INTO pg_task_group_counts (group_id, slot, done) SELECT id, 0, 8 FROM one
    )
    INSERT INTO pg_task (step, group_id, error)
    SELECT '{"Crawl":{"Fetch":null}}', -id, 'TimeoutError: host ' || i FROM one, generate_series(1, 2) AS i;
"""


def cells(text: str, name: str) -> list[str]:
    row = re.search(rf'<th scope="row">(?:<a [^>]+>)?{name}<.*?</tr>', text, re.DOTALL)
    assert row, text
    return [" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in re.findall("<td[^>]*>(.*?)</td>", row[0])]


def test_limits_schedules_and_groups_have_pages(dsn: str, reader: Console) -> None:
    run(execute(dsn, FILL))
    found = cells(reader.page("/limits"), "host")
    assert found[:4] == ["0", "3", "2", "6/min"]
    assert found[-1] == "1 with an open breaker; rate changed by ann"
    keys = reader.page("/limits", name="host")
    assert re.findall(r'row">(\w+)<', keys) == ["host", "down", "busy"]  # what is paused comes first
    assert cells(keys, "down")[-1] == "breaker open"
    assert cells(reader.page("/schedules"), "nightly")[0].startswith("late by 9 min")
    group = cells(reader.page("/groups"), "crawl")
    assert group[:3] + group[4:7] == ["open", "8", "10", "0", "2", "0"]
    assert "TimeoutError: host #" in reader.page("/groups", name="crawl")
    for path in ("/limits", "/groups"):
        assert "there is no" in reader.page(path, 404, name="none")


def test_counts_stop_and_say_so(dsn: str, reader: Console) -> None:
    run(
        execute(
            dsn,
            """INSERT INTO pg_task (step, error)
        SELECT '{"Greeter":{"SayHello":{}}}', 'boom' FROM generate_series(1, 6000)""",
        )
    )
    assert ">5,000+</tspan>" in reader.page("/machine")
    assert "Of the 5,000 tasks that were parked last" in reader.page("/parked")


def test_hostile_text_is_never_html(dsn: str, reader: Console) -> None:
    step = f'\'{{"{EVIL}":{{"{EVIL}":{{"a":"{EVIL}"}}}}}}\''
    hostile = insert(dsn, step=step, queue=f"'{EVIL}'", error=f"'{EVIL}'", key=f"'{EVIL}'")
    insert(dsn, step=step, queue=f"'\"onload=x {EVIL}'", **LEASED)
    insert(dsn, step="'no json <b>'")
    run(execute(dsn, f"INSERT INTO pg_task_pauses VALUES ('queue', '{EVIL}', '{EVIL}', now(), '{EVIL}')"))
    filled = FILL
    for name in ("'host'", "'nightly'", "'crawl'"):
        filled = filled.replace(name, f"'{EVIL}'")
    run(execute(dsn, filled))
    trip = query(dsn, SPAWN_RUN, 2)[0][0]
    run(execute(dsn, f"UPDATE pg_task_runs SET name = '{EVIL}', error = '{EVIL}', output = '\"{EVIL}\"'"))
    run(execute(dsn, f"UPDATE pg_task_checkpoints SET name = '{EVIL}', place = '{EVIL}', error = '{EVIL}'"))
    paths = [*PAGES, f"/tasks/{hostile}", f"/runs/{trip}", f"/tasks?task={EVIL}&queue={EVIL}", f"/{EVIL}"]
    for path in paths:
        answer = reader.client.get(path)
        assert "&lt;script&gt;" in answer.text, path
        assert "<script>" not in answer.text, path
        assert not re.search(r"<b>\W*&lt;|<[^>]*\sonload=x", answer.text), path


def test_each_answer_has_the_policy_of_content(dsn: str, reader: Console) -> None:
    insert(dsn)
    for path in [*PAGES, "/static/web.js", "/no", "/tasks/17"]:
        answer = reader.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?! src=\"/static/)|<style|\sstyle=|\son\w+=|https?://", answer.text), path


def test_the_live_part_comes_alone(dsn: str, reader: Console) -> None:
    insert(dsn, queue="'reports'")
    for path in PAGES:
        part = reader.client.get(path, headers={"X-Fragment": "1"}).text
        assert "<html" not in part
        assert " ".join(part.split())[:60] in " ".join(reader.page(path).split())


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test", "localhost.", "", "[::1", "127.0.0.1@evil.test"])
def test_a_foreign_name_of_loopback_gets_nothing(reader: Console, host: str) -> None:
    answer = reader.client.get("/", headers={"Host": host})
    assert answer.status_code in (400, 421)
    assert "Queues" not in answer.text


def test_names_of_loopback_are_answered(reader: Console) -> None:
    for host in ("localhost", "localhost:81", "[::1]:81", "127.0.0.1"):
        assert reader.client.get("/", headers={"Host": host}).status_code == 200
    assert host_of("[::1]:8321") == "::1"


def test_without_write_nothing_can_be_changed(dsn: str, reader: Console) -> None:
    task = insert(dsn, **PARKED)
    for path in ("/act", "/pause", "/unlock", "/lock"):
        assert reader.client.post(path, data={"do": "cancel", "id": task}).status_code == 404
    assert reader.client.get("/confirm", params={"do": "cancel", "id": task}).status_code == 404
    assert reader.client.post("/").status_code == 405
    assert "read-only" in reader.page("/")
    assert query(dsn, "SELECT id::text FROM pg_task") == [(task,)]


def test_its_sessions_are_read_only_and_impatient(dsn: str) -> None:
    async def scenario() -> None:
        sessions = WebSessions(dsn, pooled=False)
        with pytest.raises(DatabaseError, match="read-only"):
            async with sessions.reading() as connection:
                await connection.execute("DELETE FROM pg_task")
        with pytest.raises(DatabaseError, match="read-only"):
            async with sessions.session() as connection:
                await connection.execute("DELETE FROM pg_task")
        with pytest.raises(StatementTimeout):
            async with sessions.reading() as connection, transaction(connection, readonly=True):
                await connection.execute("SELECT pg_sleep(9)")
        await sessions.close()

    run(scenario())


def test_pages_may_read_another_database(dsn: str, empty_dsn: str, command: Command) -> None:
    """The database that pages read is that of --read-dsn: here one that has no schema."""
    said = command("web", "--dsn", dsn, "--read-dsn", empty_dsn, "--port", "0")
    assert said.code == 5
    assert "pgtask migrate" in said.err


# --- acting -------------------------------------------------------------------------------------------------


def test_an_action_shows_the_number_first(dsn: str, unlocked: Console) -> None:
    for _ in range(3):
        insert(dsn, queue="'reports'", **PARKED)
    insert(dsn, **PARKED)
    question = unlocked.page("/confirm", do="retry", state="parked", queue="reports")
    assert "<b>3 tasks</b> to retry" in question
    insert(dsn, queue="'reports'", **PARKED)  # after the question: not what was asked
    text = send(unlocked, "/act", question, do="retry", state="parked", queue="reports", number="3")
    assert "<b>3 tasks</b> made due" in text
    assert query(dsn, "SELECT queue, count(*) FROM pg_task WHERE error IS NULL GROUP BY 1") == [("reports", 3)]
    assert query(dsn, "SELECT action, filter, tasks, state FROM pg_task_actions") == [
        ("retry", "--parked --queue reports --limit 3", 3, "done")
    ]


def test_an_action_names_its_filter_as_a_command(dsn: str, unlocked: Console, command: Command) -> None:
    odd = "Error: 'a' $HOME%"
    insert(dsn, step='\'{"Mailer":{"Send":{}}}\'', error="'Error: ''a'' $HOME 7'")
    fields = {"do": "cancel", "state": "parked", "step": "Mailer.Send", "error": odd, "age": "0"}
    question = unlocked.page("/confirm", 200, **fields)
    insert(dsn, step='\'{"Mailer":{"Send":{}}}\'', error="'Error: ''a'' $HOME 8'")
    send(unlocked, "/act", question, **fields, number="1")
    ((chosen,),) = query(dsn, "SELECT filter FROM pg_task_actions")
    assert chosen == shlex.join(["--parked", "--step", "Mailer.Send", "--error", odd, "--age", "0s", "--limit", "1"])
    said = command("cancel", "--dsn", dsn, *shlex.split(chosen), "--dry-run")
    assert said.out == "1 task would be cancelled\n"


def test_a_form_that_cannot_be_read_is_refused(unlocked: Console) -> None:
    marked = mark(unlocked.page("/"))
    forms: list[tuple[str, dict[str, str]]] = [
        ("/pause", {"kind": "task", "name": "a\0"}),
        ("/pause", {"kind": "queue", "name": "a", "reason": "\0"}),
        ("/act", {"do": "retry", "state": "parked", "error": "\\", "number": "1"}),
        ("/act", {"do": "retry", "state": "parked", "number": "-1"}),
        ("/act", {"do": "retry", "id": "\0"}),
    ]
    for path, fields in forms:
        answer = unlocked.client.post(path, data={"mark": marked, **fields})
        assert answer.status_code == 400, fields
        assert 'role="alert"' in answer.text


def test_a_task_is_cancelled_unless_it_runs(dsn: str, unlocked: Console) -> None:
    parked, leased = insert(dsn, **PARKED), insert(dsn, **LEASED)
    for task, expected in ((parked, "<b>1 task</b> cancelled"), (leased, "1 left alone")):
        assert f"/confirm?do=cancel&amp;id={task}" in unlocked.page(f"/tasks/{task}")
        question = unlocked.page("/confirm", do="cancel", id=task)
        assert "<b>1 task</b> to cancel" in question
        assert expected in send(unlocked, "/act", question, do="cancel", id=task, number="1")
    assert query(dsn, "SELECT id::text FROM pg_task") == [(leased,)]
    assert "No task matches" in unlocked.page("/confirm", do="cancel", id=parked)


def test_a_pause_and_its_end_leave_the_name(dsn: str, unlocked: Console) -> None:
    text = send(unlocked, "/pause", unlocked.page("/"), kind="queue", name="reports", reason="down")
    assert "queue reports" in text
    ((name, reason, who),) = query(dsn, "SELECT name, reason, paused_by FROM pg_task_pauses")
    assert (name, reason) == ("reports", "down")
    assert who.endswith("(web)")
    send(unlocked, "/pause", text, do="resume", kind="queue", name="reports")
    assert query(dsn, "SELECT FROM pg_task_pauses") == []
    actions = query(dsn, "SELECT action, filter, done_by FROM pg_task_actions ORDER BY id")
    assert actions == [("pause", "queue reports", who), ("resume", "queue reports", who)]


def test_no_action_without_token_and_mark(dsn: str, writer: Console, unlocked: Console) -> None:
    task = insert(dsn, **PARKED)
    marked = mark(unlocked.page("/"))
    form = {"do": "cancel", "id": task, "number": "1"}
    without_cookie = writer.client.post("/act", data={**form, "mark": marked})
    without_mark = unlocked.client.post("/act", data=form)
    wrong_mark = unlocked.client.post("/act", data={**form, "mark": "0" * 64})
    assert [one.status_code for one in (without_cookie, without_mark, wrong_mark)] == [403] * 3
    assert writer.client.post("/unlock", data={"token": "x"}).status_code == 403
    assert writer.client.get("/confirm", params={"do": "cancel", "id": task}).status_code == 403
    assert unlocked.client.get("/act").status_code == 405
    assert 'name="mark"' not in writer.page("/")
    assert query(dsn, "SELECT id::text FROM pg_task") == [(task,)]


def test_the_cookie_stays_with_the_browser(writer: Console) -> None:
    answer = httpx.post(f"{writer.address}unlock", data={"token": writer.token})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert writer.token not in answer.headers["set-cookie"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"do": "drop"}, "no action"),
        ({"do": "retry", "state": "ready"}, "only among those that are parked"),
        ({"do": "resume", "state": "parked"}, "one by one"),
    ],
)
def test_an_odd_action_is_refused(unlocked: Console, fields: dict[str, str], expected: str) -> None:
    assert expected in unlocked.page("/confirm", 400, **fields)


def test_lock_ends_what_unlock_began(unlocked: Console) -> None:
    send(unlocked, "/lock", unlocked.page("/"))
    assert 'name="mark"' not in unlocked.page("/")


# --- the program --------------------------------------------------------------------------------------------


def test_a_missing_extra_names_the_remedy(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = command("web")
    assert said.code == 2
    assert "pip install 'pgtask-supervisor[web]'" in said.err


def test_a_port_in_use_ends_it_at_once(database: str, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = command("web", "--port", str(taken.getsockname()[1]))
    assert said.code == 2
    assert "it is in use: give another port" in said.err


def test_other_commands_load_no_library_of_pages() -> None:
    names = "('starlette', 'uvicorn', 'jinja2', 'http.server')"
    code = f"import sys, pgtask._cli.main; print([name for name in {names} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
