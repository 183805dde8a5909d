"""Steps in threads: their outcomes and errors are those of any step, but they cannot be cancelled."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from dispatch_stage import Act, Threaded, ThreadedTimed, scripted
from jumping_loop import Clock, run_on
from step_programs import turns

from pgtask import Context, Done, Next


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (ValueError("wrong"), "ValueError: wrong"),
        (StopIteration(5), "StopIteration: 5"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt (at"),
        (GeneratorExit(), "GeneratorExit (at"),
        (asyncio.CancelledError(), "Script.Threaded was cancelled from within"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_in_thread_fails_its_step(clock: Clock, raised: BaseException, text: str) -> None:
    def raises(ctx: Context) -> Done:
        raise raised

    async def main() -> None:
        with scripted(raises=raises) as (dispatch, _):
            leases = dispatch.claim(Threaded("raises"), Act("done"))
            dispatch.admit(leases)
            entries = {entry.id: entry for entry in await dispatch.all_outcomes(leases)}
            assert (entries[leases[0].id].error or "").startswith(text)
            assert entries[leases[1].id].kind == "done"

    run_on(clock, main())


def test_thread_step_continues_or_fails_by_its_return_value(clock: Clock) -> None:
    idents = []

    def goes_on(ctx: Context) -> Next[Act]:
        idents.append(threading.get_ident())
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return Next(Act("done"))

    def nothing(ctx: Context) -> Any:
        return None

    async def main() -> None:
        with scripted(goes_on=goes_on, nothing=nothing) as (dispatch, _):
            leases = dispatch.claim(Threaded("goes_on"), Threaded("nothing"))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
            assert [entry.kind for entry in entries if entry.id == leases[0].id] == ["continued", "done"]
            (wrong,) = [entry for entry in entries if entry.id == leases[1].id]
            assert "Script.Threaded returned None: a return is missing" in (wrong.error or "")
            assert threading.get_ident() not in idents

    run_on(clock, main())


def test_timed_out_thread_is_abandoned_but_keeps_its_slot(clock: Clock) -> None:
    gate = threading.Event()

    def blocks(ctx: Context) -> Done:
        gate.wait(20)
        return Done()

    async def main() -> None:
        with scripted(concurrency=1, blocks=blocks) as (dispatch, _):
            slow, other = dispatch.claim(ThreadedTimed("blocks"), Act("done"))
            dispatch.admit([slow, other])
            try:
                (entry,) = await dispatch.all_outcomes([slow])
                text = "Script.ThreadedTimed ran longer than its timeout of 0.005 s"
                assert (entry.id, entry.error, entry.tried) == (slow.id, text, 1)
                await turns(10)
                assert (dispatch.suspended, len(dispatch.ready)) == (1, 1)
            finally:
                gate.set()
            (entry,) = await dispatch.all_outcomes([slow, other])  # the thread's own outcome is not among them
            assert (entry.id, entry.kind) == (other.id, "done")
            assert dispatch.suspended == 0

    run_on(clock, main())


@pytest.mark.parametrize("end", ["drop_lost", "cancel_step"])
def test_thread_is_not_cancelled_by_loss_or_stop(clock: Clock, end: str) -> None:
    gate = threading.Event()

    def blocks(ctx: Context) -> Done:
        gate.wait(20)
        raise ValueError

    async def main() -> None:
        with scripted(concurrency=1, blocks=blocks) as (dispatch, _):
            lease, other = dispatch.claim(Threaded("blocks"), Act("done"))
            dispatch.admit([lease, other])
            await turns(3)
            getattr(dispatch, end)(lease)
            assert dispatch.suspended == 1
            gate.set()
            (entry,) = await dispatch.all_outcomes([other])
            assert entry.id == other.id
            assert lease.is_open == (end == "cancel_step")
            assert (dispatch.suspended, dispatch.errors) == (0, 0)

    run_on(clock, main())
