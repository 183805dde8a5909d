"""Wrong names and types of fields, arguments and attributes."""

from __future__ import annotations

from pgtask import App, Context, Done, Next, Policy, Task


class Greeter(Task):
    pass


class ReadName(Greeter):
    policy = Policy(retries=5)  # wrong: mypy call-arg, pyright reportCallIssue
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello]:
        ctx.job_id  # wrong: mypy attr-defined, pyright reportAttributeAccessIssue  # noqa: B018
        return Next(SayHello(self.file_name))  # wrong: mypy attr-defined, pyright reportAttributeAccessIssue


class SayHello(Greeter):
    policy = Policy(retry_delay=1)  # wrong: mypy arg-type, pyright reportArgumentType
    name: str
    times: int = 1

    async def run(self, ctx: Context) -> Next[ReadName] | Done:
        if self.times:
            return Next(ReadName(self.times))  # wrong: mypy arg-type, pyright reportArgumentType
        if self.name:
            return Next(ReadName(filenam="x"))  # wrong: mypy call-arg, pyright reportCallIssue
        if ctx.attempt:
            return Next(ReadName())  # wrong: mypy call-arg, pyright reportCallIssue
        return Next(ReadName(""), after=5)  # wrong: mypy arg-type, pyright reportArgumentType


app = App(SayHello("x"))  # wrong: mypy arg-type, pyright reportArgumentType
backoff = Policy(backoff="linear")  # wrong: mypy arg-type, pyright reportArgumentType
