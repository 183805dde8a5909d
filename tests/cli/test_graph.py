"""`pgtask graph`: the diagram shows each edge of the annotations, and where a task begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from paths import REPOSITORY

from pgtask import App, Context, Done, Fail, Next, Policy, Task, WorkflowContext, workflow
from pgtask._cli.commands.graph import mermaid
from pgtask._cli.main import main


class Greeter(Task):
    pass


class ReadName(Greeter):
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello]:
        return Next(SayHello(self.filename))


class SayHello(Greeter):
    name: str

    async def run(self, ctx: Context) -> Done | Fail:
        return Done()


class Counter(Task):
    pass


class Count(Counter):
    left: int

    async def run(self, ctx: Context) -> Next[Count] | Done:
        return Done()


class Circle(Task):
    """Nothing leads into the ring from outside."""


class Odd(Circle):
    def run(self, ctx: Context) -> Next[Even]:
        return Next(Even())


class Even(Circle):
    def run(self, ctx: Context) -> Next[Odd | Note]:
        return Next(Odd())


class Note(Circle):
    """Its name means something in Mermaid."""

    def run(self, ctx: Context) -> Fail:
        return Fail("no")


class Other(Task):
    pass


def _other_say_hello() -> type[Task]:
    class SayHello(Other):
        async def run(self, ctx: Context) -> Done:
            return Done()

    return SayHello


OtherSayHello = _other_say_hello()


class Mailed(Task):
    pass


class Send(Mailed):
    policy = Policy(queue="mail")

    async def run(self, ctx: Context) -> Done:
        return Done()


@workflow('zip "files"')
async def zip_files(ctx: WorkflowContext, n: int) -> int:
    return n


greeter = App(Greeter)


def test_edges_beginnings_and_ends() -> None:
    expected = """\
        stateDiagram-v2
            [*] --> ReadName
            ReadName --> SayHello
            SayHello --> [*]
            SayHello --> parked: Fail
        """
    assert mermaid(greeter) == textwrap.dedent(expected)


def test_a_step_that_leads_to_itself_alone_is_a_beginning() -> None:
    expected = """\
        stateDiagram-v2
            [*] --> Count
            Count --> Count
            Count --> [*]
        """
    assert mermaid(App(Counter)) == textwrap.dedent(expected)


def test_ring_begins_at_its_first_step_and_renames_keywords() -> None:
    expected = """\
        stateDiagram-v2
            state "Note" as Circle__Note
            [*] --> Odd
            Odd --> Even
            Even --> Odd
            Even --> Circle__Note
            Circle__Note --> parked: Fail
        """
    assert mermaid(App(Circle)) == textwrap.dedent(expected)


def test_tasks_are_boxes_and_equal_step_names_stay_apart() -> None:
    expected = """\
        stateDiagram-v2
            state Greeter {
                state "parked" as ReadName__parked
                state "SayHello" as Greeter__SayHello
                [*] --> ReadName
                ReadName --> Greeter__SayHello
                Greeter__SayHello --> [*]
                Greeter__SayHello --> ReadName__parked: Fail
            }
            state Other {
                state "SayHello" as Other__SayHello
                [*] --> Other__SayHello
                Other__SayHello --> [*]
            }
        """
    assert mermaid(App(Greeter, Other)) == textwrap.dedent(expected)


def test_a_workflow_is_one_state_and_a_queue_is_shown() -> None:
    expected = """\
        stateDiagram-v2
            state Mailed {
                state "Send (queue mail)" as Send
                [*] --> Send
                Send --> [*]
            }
            state "workflow zip _files_" as workflow1
            [*] --> workflow1
            workflow1 --> [*]
        """
    assert mermaid(App(Mailed, zip_files)) == textwrap.dedent(expected)


def test_the_command_needs_no_database(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", "postgresql://nobody@127.0.0.1:1/nowhere")
    assert main(["graph", f"{__name__}:greeter"]) == 0
    assert capsys.readouterr().out == mermaid(greeter)
    monkeypatch.setenv("PGTASK_APP", f"{__name__}:greeter")
    assert main(["graph"]) == 0
    assert capsys.readouterr().out == mermaid(greeter)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ([], 2, "no app is configured"),
        (["nonsense"], 4, "not of the form module:attribute"),
        (["no_such_module_here:app"], 4, "no module named 'no_such_module_here'"),
        ([f"{__name__}:Greeter"], 4, "not a pgtask.App"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, line: str
) -> None:
    assert main(["graph", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pgtask: ")
    assert line in err
    assert err.count("\n") == 1


def test_the_app_is_found_in_the_working_directory(tmp_path: Path) -> None:
    """Run it like a console script: Python does not search that directory by itself."""
    source = """\
        from __future__ import annotations
        from pgtask import App, Context, Done, Task

        class Hello(Task):
            pass

        class World(Hello):
            async def run(self, ctx: Context) -> Done:
                return Done()

        app = App(Hello)
        """
    (tmp_path / "hello_world.py").write_text(textwrap.dedent(source))
    (tmp_path / "pyproject.toml").write_text('[tool.pgtask]\napp = "hello_world:app"\n')
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pgtask", "graph"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "stateDiagram-v2\n    [*] --> World\n    World --> [*]\n"
