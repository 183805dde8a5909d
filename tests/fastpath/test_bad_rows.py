"""Rows from which no step can be started: they are put back or parked, and harm no other."""

from __future__ import annotations

from typing import ClassVar

import pytest
from dispatch_stage import SCRIPT, Act, Scripts, stage
from jumping_loop import Clock, run_on
from step_programs import MAX_STEP_BYTES

from pgtask import App, Context, Done, Task


def test_undecodable_rows_are_put_back_or_parked(clock: Clock) -> None:
    async def main() -> None:
        asked = []

        def unknown(name: str) -> float | None:
            asked.append(name)
            return None if name == "Script.Gone" else 30.0

        with stage(SCRIPT, unknown=unknown, resources=Scripts()) as dispatch:
            leases = dispatch.claim(
                '{"Script":{"New":{}}}', '{"Script":{"Gone":null}}', '{"Script":{"Act":{}}}', "{", Act("done"), tried=4
            )
            leases += dispatch.claim("", size=20_000)
            dispatch.admit(leases)
            entries = {entry.id: entry for entry in await dispatch.all_outcomes(leases)}
            new, gone, wrong, broken, good, large = (entries[lease.id] for lease in leases)
            assert asked == ["Script.New", "Script.Gone"]
            assert (new.kind, new.tried, new.error, new.delay) == ("rescheduled", None, None, 30.0)
            assert (gone.error or "").startswith("unknown step Script.Gone")
            assert "Script.Act cannot be decoded: Object missing required field `name`" in (wrong.error or "")
            assert "the step is not valid JSON" in (broken.error or "")
            assert f"20000 bytes, more than the {MAX_STEP_BYTES} allowed" in (large.error or "")
            for entry in (gone, wrong, broken, large):
                assert (entry.kind, entry.step, entry.tried, entry.delay) == ("rescheduled", None, None, 0.0)
            assert good.kind == "done"
            assert (dispatch.steps, dispatch.errors) == (1, 4)
            assert dispatch.suspended == 0

    run_on(clock, main())


@pytest.mark.parametrize("lacks", ["always", "once"])
def test_memory_error_at_step_start_is_retried(clock: Clock, lacks: str) -> None:
    """A lack of memory is not an error of the row: another try, or another worker, may have enough."""

    async def main() -> None:
        with stage(App(Greedy)) as dispatch:
            (lease,) = dispatch.claim('{"Greedy":{"Large":{"number":1}}}', claims=1)
            Large.lacking = 100 if lacks == "always" else 1
            dispatch.admit([lease])
            (entry,) = await dispatch.all_outcomes([lease])
            assert (entry.kind, entry.error, entry.tried) == ("rescheduled", None, None)
            assert entry.delay > 0
            for _ in range(10):
                (lease,) = dispatch.claim('{"Greedy":{"Large":{"number":1}}}', id=lease.id)
                dispatch.admit([lease])
                (entry,) = await dispatch.all_outcomes([lease])
                if entry.error is not None or entry.kind == "done":
                    break
            if lacks == "once":
                assert entry.kind == "done"
            else:
                assert "MemoryError" in (entry.error or ""), "the step is repeated without end"

    run_on(clock, main())


class Greedy(Task): ...


class Large(Greedy):
    number: int
    lacking: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if Large.lacking:
            Large.lacking -= 1
            raise MemoryError

    async def run(self, ctx: Context) -> Done:
        return Done()
