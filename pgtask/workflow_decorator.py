"""The decorator `@workflow`, which makes a function durable."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

from pgtask.errors import DefinitionError
from pgtask.policy import Policy
from pgtask.workflow import Workflow, check_name
from pgtask.workflow_context import WorkflowContext

__all__ = ["workflow"]

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

DEFAULT_POLICY = Policy(retry_limit=5, backoff="exponential", jitter=0.25)


class workflow:  # noqa: N801 - a decorator
    """Make an `async def` function durable. It takes the context and at most one input.

        @workflow("zip_files")
        async def zip_files(ctx: WorkflowContext, params: ZipParams) -> ZipResult: ...

    - `name`: stored in rows. You may rename the function, but not the name.
    - `version`: raise it when you change the code so that it contradicts the checkpoints of runs. A run goes on with
      the function whose versions, `since` (default: `version`) to `version`, contain the one it began under.
    - `policy`: the `queue` and `priority` of its runs; the retries and timeout of its steps, unless a step has its own;
      the retries after exceptions outside of steps. By default five retries, after about 1, 2, 4, 8 and 16 seconds.

    A worker runs the function again from the top whenever its run goes on, so outside of steps it must do the same each
    time. Raises `DefinitionError`.
    """

    def __init__(
        self, name: str, *, version: int = 1, since: int | None = None, policy: Policy = DEFAULT_POLICY
    ) -> None:
        if inspect.isfunction(name):
            raise DefinitionError(
                f'@workflow without a name: write @workflow("{name.__name__}") before {name.__name__}(), '
                "with the name that rows are to store"
            )
        check_name("workflow", name, DefinitionError)
        if since is None:
            since = version
        for what, number in (("version", version), ("since", since)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**31:
                raise DefinitionError(f"workflow {name}: {what}={number!r} must be a whole number, 1 or more")
        if since > version:
            raise DefinitionError(f"workflow {name}: since={since} is later than version={version}")
        if not isinstance(policy, Policy):
            raise DefinitionError(f"workflow {name}: policy must be a pgtask.Policy, not {policy!r:.80}")
        self._options = (name, version, since, policy)

    @overload
    def __call__(self, function: Callable[[WorkflowContext], Awaitable[OutputT]]) -> Workflow[None, OutputT]: ...
    @overload
    def __call__(
        self, function: Callable[[WorkflowContext, InputT], Awaitable[OutputT]]
    ) -> Workflow[InputT, OutputT]: ...
    def __call__(self, function: Callable[..., Awaitable[Any]]) -> Workflow[Any, Any]:
        if not inspect.iscoroutinefunction(function):
            raise DefinitionError(f"workflow {self._options[0]}: {function!r:.80} is not an async def function")
        return Workflow(function, *self._options)
