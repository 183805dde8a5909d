"""The client of sync code."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from client_kit import numbered, slowly
from fix_database import run
from flows import Found, Params, typed
from post import Numbered, Write, doubled
from run_kit import working

from pgtask import (
    Client,
    EnqueueError,
    GroupHandle,
    ResultTimeout,
    Run,
    SyncClient,
    SyncGroupHandle,
    SyncRun,
    SyncTaskHandle,
    SyncTasks,
    TaskHandle,
    Tasks,
)
from pgtask.errors import DatabaseUnavailable, RunNotFound

HOUR = timedelta(hours=1)
pytestmark = pytest.mark.one_database("DELETE FROM pg_task_runs", "DELETE FROM pg_task_signals")


def rows(dsn: str, query: str = "SELECT count(*) FROM pg_task") -> list[Any]:
    with psycopg.connect(dsn) as db:
        return db.execute(query).fetchall()


def count(dsn: str) -> int:
    return int(rows(dsn)[0][0])


# --- the same as Client


def test_it_has_the_methods_and_arguments_of_a_client() -> None:
    pairs: list[tuple[type, type, set[str]]] = [
        (SyncClient, Client, {"consumer"}),
        (SyncRun, Run, set()),
        (SyncTaskHandle, TaskHandle, set()),
        (SyncTasks, Tasks, set()),
        (SyncGroupHandle, GroupHandle, {"pages"}),
    ]
    for sync, plain, missing in pairs:
        names = {name for name, value in vars(plain).items() if name[0] != "_"}
        assert names - missing == {name for name in vars(sync) if name[0] != "_"}
        for name in sorted(names - missing - {"dsn"}):
            ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (sync, plain))
            assert [str(one).replace(" | AsyncIterable[Task | Enqueue]", "") for one in theirs.parameters.values()] == [
                str(one) for one in ours.parameters.values()
            ], name
            answer = str(theirs.return_annotation).replace("Run[", "SyncRun[").replace("AsyncGenerator[", "Iterator[")
            answer = answer.replace("AsyncIterator[", "Iterator[")
            named = {"Tasks": "SyncTasks", "TaskHandle": "SyncTaskHandle", "GroupHandle": "SyncGroupHandle"}
            answer = named.get(answer, answer)
            assert answer.replace(", None]", "]") == ours.return_annotation, name


def test_it_inserts_what_a_client_inserts(dsn: str) -> None:
    with SyncClient(dsn) as client:
        first = client.enqueue(Write("x"), queue="q", priority=2, key="k")
        assert client.enqueue(Write("y"), key="k") == first
        ids = [
            first,
            client.delay(Write("x"), HOUR),
            client.schedule(Write("x"), datetime.now(UTC) + HOUR),
            *client.enqueue_many(numbered(2500)),
            *client.enqueue_many(numbered(2500), key=lambda step: f"n {step.n}", queue="q"),
            client.trigger(doubled, 1, after=HOUR).id,
            *client.trigger_many(doubled, iter([1, 2])),
        ]
    found = {row[0]: row[1:] for row in rows(dsn, "SELECT id, step, queue, priority, key FROM pg_task")}
    assert set(found) == set(ids)
    assert found[first] == ('{"Post":{"Write":{"text":"x"}}}', "q", 2, "Post/k")
    assert found[ids[3 + 1234]] == ('{"Post":{"Numbered":{"n":1234}}}', "post", 3, None)
    assert found[ids[2503 + 1234]] == ('{"Post":{"Numbered":{"n":1234}}}', "q", 3, "Post/n 1234")


def test_runs_of_workflows(dsn: str) -> None:
    with SyncClient(dsn) as client:
        run_ = client.trigger(doubled, 4)
        assert repr(run_) == f"<run {run_.id}>"
        assert run_.status().state == "QUEUED"
        with pytest.raises(ResultTimeout):
            run_.result(0.01)
        assert run_.cancel()
        assert [one.state for one in client.runs(doubled)] == ["CANCELLED"]
        assert run_.resume()
        run_.signal("go", 1)
        client.signal(run_.id, "go", 2)
        assert client.run(run_.id).status().unread_signals == {"go": 2}
        with pytest.raises(RunNotFound):
            client.signal(client.enqueue(Write("x")), "go")
        with pytest.raises(EnqueueError, match="is not the id of a run"):
            client.run("x")


def test_it_waits_for_results_of_workers(dsn: str) -> None:
    with working(dsn), SyncClient(dsn) as client, ThreadPoolExecutor(4) as threads:
        runs = [client.trigger(typed, Params(number=n)) for n in range(8)]
        found = list(threads.map(lambda one: one.result(20), runs))
        assert [type(one) for one in found] == [Found] * 8
        assert client.run(runs[3].id, typed).result() == found[3]
        assert isinstance(client.run(str(runs[3].id)).result(timedelta(seconds=9)), dict)


def test_failures_are_a_plain_iterator(dsn: str) -> None:
    with SyncClient(dsn) as client:
        parked = client.failures()
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(next(parked)))
        thread.start()
        while not rows(dsn, "SELECT FROM pg_stat_activity WHERE application_name = 'pgtask failures'"):
            pass
        task = client.enqueue(Write("x"))
        with psycopg.connect(dsn) as db:
            while thread.is_alive():
                db.execute("UPDATE pg_task SET error = 'no'")
                db.commit()
                thread.join(0.05)
        assert seen[0].id == task
        parked.close()  # type: ignore[attr-defined]


# --- threads


def test_threads_share_it(dsn: str) -> None:
    with SyncClient(dsn, pool_size=3) as client, ThreadPoolExecutor(16) as threads:
        ids = list(threads.map(lambda n: client.enqueue(Numbered(n)), range(400)))
        many = list(threads.map(lambda n: client.enqueue_many(numbered(1500)), range(8)))
    assert len(set(ids)) == 400
    assert sum(map(len, many)) == 12_000
    assert count(dsn) == 12_400


def test_what_the_caller_passes_runs_in_the_callers_thread(dsn: str) -> None:
    here: set[int] = set()

    def steps() -> Iterator[Numbered]:
        for step in numbered(2100):
            here.add(threading.get_ident())
            yield step

    def key(step: Numbered) -> str:
        here.add(threading.get_ident())
        return str(step.n)

    with SyncClient(dsn) as client:
        client.enqueue_many(steps(), key=key)
        client.enqueue_many(steps())
    assert here == {threading.get_ident()}
    assert count(dsn) == 4200


@pytest.mark.parametrize("error", [KeyError("mine"), StopIteration(), KeyboardInterrupt()], ids=repr)
def test_an_exception_of_the_caller_ends_the_call(dsn: str, error: BaseException) -> None:
    def key(step: Numbered) -> str:
        if step.n == 1500:
            raise error
        return str(step.n)

    wanted = RuntimeError if isinstance(error, StopIteration) else type(error)
    with SyncClient(dsn, pool_size=1) as client:
        with pytest.raises(wanted):
            client.enqueue_many(numbered(2000), key=key)
        client.enqueue(Write("after"))
    assert count(dsn) == 1


def test_an_interrupt_ends_a_wait(dsn: str) -> None:
    with SyncClient(dsn) as client:
        one = client.trigger(doubled, 1)
        threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            one.result()
        client.enqueue(Write("x"))


def test_it_may_be_called_in_an_event_loop(dsn: str) -> None:
    async def main() -> None:
        with SyncClient(dsn) as client:
            client.enqueue(Write("x"))
            with pytest.raises(EnqueueError, match="plain iterable of steps"):
                client.enqueue_many(slowly(numbered(3)))  # type: ignore[call-overload]
            await asyncio.sleep(0)

    run(main())
    assert count(dsn) == 1


# --- its life

CALLS: dict[str, Callable[[SyncClient], Any]] = {
    "enqueue": lambda client: client.enqueue(Write("x")),
    "enqueue_many": lambda client: client.enqueue_many(numbered(3)),
    "runs": lambda client: client.runs(),
    "failures": lambda client: next(iter(client.failures())),
    "result": lambda client: client.trigger(doubled, 1).result(),
    "close": lambda client: client.close(),
    "signal": lambda client: client.signal("0" * 32, "go"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_must_be_open(dsn: str, call: Callable[[SyncClient], Any]) -> None:
    client = SyncClient(dsn)
    for _ in range(2):
        with pytest.raises(EnqueueError, match=r"not open; use it as: with SyncClient\(\) as client"):
            call(client)
        with client as same:
            assert same is client


def test_it_opens_once_and_again_after_its_end(dsn: str) -> None:
    client = SyncClient(dsn)
    for _ in range(2):
        with client:
            with pytest.raises(EnqueueError, match="open already"):
                client.open()
            client.enqueue(Write("x"))
            assert client.dsn == dsn
    assert count(dsn) == 2
    assert not [one for one in threading.enumerate() if one.name == "pgtask client"]


def test_a_client_that_cannot_open_leaves_no_thread() -> None:
    with pytest.raises(DatabaseUnavailable):
        SyncClient("postgresql://127.0.0.1:1/x").open()
    assert not [one for one in threading.enumerate() if one.name == "pgtask client"]


def test_a_wait_ends_when_another_thread_closes_the_client(dsn: str) -> None:
    client = SyncClient(dsn).open()
    one = client.trigger(doubled, 1)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(one.result)
        while not rows(dsn, "SELECT FROM pg_stat_activity WHERE application_name = 'pgtask results'"):
            pass
        client.close()
        with pytest.raises(EnqueueError, match="the client was closed during the call"):
            waits.result(10)


def program(text: str, dsn: str, code: int = 0) -> str:
    """Run a program whose warnings are errors."""
    begin = f"import sys; sys.path[:0] = {sys.path!r}; import os, threading, pgtask, post\n"
    command = [sys.executable, "-W", "error", "-c", begin + inspect.cleandoc(text)]
    environment = {**os.environ, "DATABASE_URL": dsn}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (code, ""), done.stderr
    return done.stdout


def test_the_interpreter_ends_with_an_open_client(dsn: str) -> None:
    text = """
    import contextlib
    client = pgtask.SyncClient().open()
    run = client.trigger(post.doubled, 1)
    def wait():
        with contextlib.suppress(pgtask.EnqueueError):
            run.result()
    threading.Thread(target=wait, daemon=True).start()
    run.status()
    """
    program(text, dsn)
    assert count(dsn) == 1


FORK = """
client = pgtask.SyncClient().open()
client.enqueue(post.Write("parent"))
children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        client.enqueue(post.Write(f"child {number}"))
        client.enqueue_many([post.Write("more")] * 2000)
        if number == 0:
            client.close()
        if number == 1:
            os._exit(0)
        sys.exit(0)
    children.append(pid)
for _ in range(50):
    client.enqueue(post.Write("parent"))
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
for _ in range(50):
    client.enqueue(post.Write("parent"))
client.close()
print("ended")
"""


def test_a_forked_process_has_a_client_of_its_own(dsn: str) -> None:
    assert program(FORK, dsn) == "ended\n"
    assert count(dsn) == 101 + 3 * 2001


def test_a_fork_during_calls_of_other_threads(dsn: str) -> None:
    text = """
    client = pgtask.SyncClient(pool_size=2).open()
    stop = threading.Event()
    def work():
        while not stop.is_set():
            client.enqueue(post.Write("thread"))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        pid = os.fork()
        if not pid:
            client.enqueue(post.Write("child"))
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    client.close()
    print("ended")
    """
    assert program(text, dsn) == "ended\n"
    assert rows(dsn, "SELECT count(*) FROM pg_task WHERE step LIKE '%child%'") == [(10,)]


def test_tasks_of_a_sync_client(dsn: str) -> None:
    with SyncClient(dsn) as client:
        first = client.enqueue(Write("x"), key="k")
        client.enqueue_many(numbered(2500))
        task = client.task(first)
        assert (task.status().key, task.status().state) == ("k", "ready")
        assert task.reschedule(after=HOUR)
        assert task.move(queue="other")
        assert [one.id for one in client.tasks(queue="other")] == [first]
        assert client.tasks(step=Numbered).count() == 2500
        assert len({one.id for one in client.tasks(step=Numbered)}) == 2500
        assert client.tasks(step=Numbered).move(priority=7) == 2500
        assert client.tasks(step=Numbered).cancel() == 2500
        assert client.stats().lanes[0].queue == "other"
        assert task.cancel()
        again = client.enqueue(Write("x"), key="k", on_conflict="after", expires=HOUR)
        assert again.is_new
        with pytest.raises(EnqueueError, match="give task= as well"):
            client.tasks(key="k")
