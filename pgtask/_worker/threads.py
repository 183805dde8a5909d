"""threads: the threads in which plain steps run, and the number of calls of one kind that run at once.

Invariants: every submitted call runs in one of these threads or is cancelled; if the system gives no thread, the call
does not fail: it waits for one of the threads that exist.

All threads of a worker share one interpreter. Steps that wait (for a network, a disk, a program) may do so side by
side, up to the number of slots. Steps that compute only slow each other down there, while another worker may be idle:
one of these at a time is enough. Their use of the CPU tells the two kinds apart; a step does not declare it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from pgtask._log import EventLog
from pgtask._worker.prefetch import PREFETCH

__all__ = ["MIN_SAMPLE", "CallKind", "StepThreads", "ThreadCall"]

log = EventLog("pgtask.dispatch")

P = ParamSpec("P")
T = TypeVar("T")
MIN_SAMPLE = 0.005  # seconds after which a call that has begun shows whether it computes or waits
WAITING_SHARE = 0.3  # of one core: calls of a kind that use less wait for something else
COMPUTING_SHARE = 0.8  # of one core: a call that uses more computes
STALL = 0.001  # seconds between two looks at the calls that wait for a busy thread
MAX_STALL = 0.02  # seconds after which another thread takes these, if the busy one computes
EAGER, MAX_EAGER = 0.1, 5.0  # seconds after a stall for which each call has a thread of its own at once
THREAD_RETRY = 1.0  # seconds after which a worker asks again for a thread that the system has refused
_clock_of = getattr(time, "pthread_getcpuclockid", None)  # not on macOS


def _seconds_queued(thread: int) -> float:
    """Return the seconds for which a thread of this process has waited for a core. Linux only."""
    with open(f"/proc/self/task/{thread}/schedstat", "rb", buffering=0) as file:
        return int(file.read(100).split()[1]) / 1e9


def _seconds_wanted(thread: int, clock: int) -> float:
    """Return the seconds for which a thread of this process has had a core, or waited for one, as far as the system
    tells."""
    try:
        return time.clock_gettime(clock) + (_seconds_queued(thread) if _has_schedule else 0.0) if clock else 0.0
    except (OSError, ValueError, IndexError):
        return 0.0


try:
    _has_schedule = _clock_of is not None and _seconds_queued(threading.get_native_id()) >= 0
except (OSError, ValueError, IndexError):
    _has_schedule = False


class Work(Protocol):
    """A call for a thread. The thread calls `run`, and then the loop `end`; or the loop calls `cancel` alone."""

    def run(self) -> None: ...
    def end(self) -> None: ...
    def cancel(self) -> None: ...


class _FutureWork:
    """A call whose result is that of a future, which the thread sets."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._call: Callable[[], Any] | None = call
        self._ended: Callable[[], None] = lambda: None

    def run(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:
            self._ended = partial(self.future.set_exception, error)
        else:
            self._ended = partial(self.future.set_result, result)

    def end(self) -> None:
        self._ended()

    def cancel(self) -> None:
        self.future.cancel()


class StepThreads(Executor):
    """Up to `max_threads` threads, each started when it is first needed. Submit from the loop that made the object.

    To wake a thread costs more than many a call, so while calls are short one thread takes one after the other, and the
    loop learns of their ends in one go. Every `STALL` seconds the loop looks whether the waiting calls move on. If not,
    since the busy thread waits, each of them gets a thread at once, and so do the calls of the next `EAGER` seconds, or
    longer if that recurs.
    The thread that has become idle last is the first to be woken, so few threads have connections open.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._loop = asyncio.get_running_loop()
        self._work: deque[Work] = deque()
        self._ended: deque[Work] = deque()
        self._lock = threading.Lock()
        self._idle: list[threading.Lock] = []  # of threads that wait for work; each is released to wake its thread
        self._threads = 0
        self._spare = 0  # threads without a call; below zero: calls that wait for one
        self._retry_at = 0.0
        self._has_warned = False
        self._is_closed = False
        self._is_told = False  # the loop is about to end calls
        self._begun = 0  # calls
        self._latest = (0, 0)  # the thread of the last of these: its native id, and its clock
        self._stalls = Stalls()

    def has_room(self) -> bool:
        """Return whether a thread is free for the next call, or soon will be. Starts one if need be."""
        with self._lock:
            if self._spare > 0:
                return True
            if self._waits_well() and self._threads - self._spare < self._max_threads:
                return True
            return self._start_thread()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `function` in a thread as soon as there is one."""
        work = _FutureWork(partial(function, *args, **kwargs))
        self.start(work)
        return work.future

    def start(self, work: Work) -> None:
        """Run a call in a thread as soon as there is one."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the worker takes no more steps")
            self._spare -= 1
            self._work.append(work)
            if not self._waits_well():
                self._find_thread()
        if not self._stalls.is_watched and self._work:
            self._stalls.is_watched = True
            self._loop.call_later(STALL, self._watch)

    def _waits_well(self) -> bool:
        """Return whether a call may wait for a busy thread, since calls are short."""
        return len(self._idle) < self._threads and not self._stalls.is_eager and not self._retry_at

    def _find_thread(self) -> bool:
        """Wake or start a thread, unless one is about to look for work. False if the system gives none."""
        if self._idle:
            self._idle.pop().release()
        elif self._spare < 0 and not self._start_thread():
            if not self._threads:
                self._loop.call_later(THREAD_RETRY, self._retry_thread)
            return False
        return True

    def _watch(self) -> None:
        """Look whether the calls that wait move on, and find threads for them if not."""
        with self._lock:
            if not self._work:
                self._stalls.is_watched = False
                return
            wanted = min(self._stalls.look(self._begun, self._latest), len(self._work))
            all(self._find_thread() for _ in range(wanted))
        self._loop.call_later(STALL, self._watch)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. Running ones continue, and nothing waits for them; `wait` has no effect."""
        with self._lock:
            self._is_closed = True
            while cancel_futures and self._work:
                self._work.popleft().cancel()
            for wake in self._idle:
                wake.release()
            self._idle.clear()

    def _start_thread(self) -> bool:
        """Start a thread. False if there are enough, or the system gives none."""
        if self._threads >= self._max_threads or time.monotonic() < self._retry_at:
            return False
        try:
            threading.Thread(target=self._run_calls, name=f"pgtask-step_{self._threads}", daemon=True).start()
        except (RuntimeError, MemoryError, OSError) as error:
            self._retry_at = time.monotonic() + THREAD_RETRY
            if not self._has_warned:
                self._has_warned = True
                hint = "raise the limit of processes or of memory (ulimit, pids limit), or lower --concurrency"
                log.warning("threads.scarce", threads=self._threads, error=str(error), hint=hint)
            return False
        self._retry_at = 0.0
        self._threads += 1
        self._spare += 1
        return True

    def _retry_thread(self) -> None:
        """Start the first thread for the calls that have been submitted."""
        with self._lock:
            if self._spare < 0 and not self._threads and not self._is_closed and not self._start_thread():
                self._loop.call_later(THREAD_RETRY, self._retry_thread)

    def _run_calls(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        me = threading.get_native_id(), _clock_of(threading.get_ident()) if _clock_of is not None else 0
        while True:
            with self._lock:
                if self._work:
                    work = self._work.popleft()
                    self._begun += 1
                    self._latest = me
                elif self._is_closed:
                    return
                else:
                    self._idle.append(wake)
                    work = None
            if work is None:
                wake.acquire()
                continue
            work.run()
            self._end(work)
            del work  # do not keep it alive until the next call

    def _end(self, work: Work) -> None:
        """Have the loop end a call, with others that end meanwhile."""
        with self._lock:  # before the loop learns of the result
            self._spare += 1
        self._ended.append(work)
        if not self._is_told:
            self._is_told = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._end_calls)

    def _end_calls(self) -> None:
        self._is_told = False  # first: what ends from now on is another go
        for _ in range(len(self._ended)):
            self._ended.popleft().end()


class Stalls:
    """Looks whether the calls that wait for a busy thread move on, and says how many more threads to wake."""

    def __init__(self) -> None:
        self.is_watched = False
        self._begun = -1
        self._moved_at = 0.0
        self._wanted: float | None = None  # seconds of a core, as of the last look
        self._looked_at = 0.0
        self._eager_until = 0.0
        self._eager_for = EAGER

    @property
    def is_eager(self) -> bool:
        """True for some time after a stall."""
        return self._eager_until > 0.0 and time.monotonic() < self._eager_until

    def look(self, begun: int, latest: tuple[int, int]) -> int:
        """Return how many threads to wake, if `begun` calls have begun so far, the last one in the thread `latest`.

        All, if it waits: since the last look neither that thread nor the loop has had or wanted a core. One, if it
        computes for long, or the machine has no core for it."""
        now = time.monotonic()
        if begun != self._begun:
            self._begun, self._moved_at, self._wanted = begun, now, None
            return 0
        wanted = _seconds_wanted(*latest) + time.thread_time()
        before, window = self._wanted, now - self._looked_at
        self._wanted, self._looked_at = wanted, now
        if before is not None and wanted - before < WAITING_SHARE * window:
            recurs = now - self._eager_until < self._eager_for
            self._eager_for = min(2 * self._eager_for, MAX_EAGER) if recurs else EAGER
            self._eager_until = now + self._eager_for
            return sys.maxsize
        if now - self._moved_at < MAX_STALL:
            return 0
        self._moved_at = now
        return 1


class ThreadCall:
    """A call in a thread, and the CPU time that it takes. `is_watched`: the loop will probably sample it."""

    __slots__ = ("began", "clock", "cpu", "is_watched", "sampled", "thread", "wall")

    def __init__(self, *, is_watched: bool) -> None:
        self.is_watched = is_watched
        self.began = 0.0  # monotonic seconds; 0: not yet
        self.thread, self.clock = 0, 0
        self.sampled: float | None = None  # seconds for which its thread had wanted a core, at the last sample
        self.cpu = self.wall = 0.0

    def run_timed(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function`, in the thread."""
        self.thread = threading.get_native_id()
        if _clock_of is not None:
            self.clock = _clock_of(threading.get_ident())
        if self.is_watched:
            self.seconds_wanted()
        before = time.thread_time()
        self.began = time.monotonic()
        try:
            return function(*args)
        finally:
            self.cpu = time.thread_time() - before
            self.wall = time.monotonic() - self.began

    def seconds_wanted(self) -> float | None:
        """Return the seconds since the last sample for which the call had a core, or waited for one while the machine
        had none free. None for the first sample, and while the system does not tell."""
        if _clock_of is None:
            return 0.0
        try:
            now = time.clock_gettime(self.clock)
            if _has_schedule:
                now += _seconds_queued(self.thread)
        except (OSError, ValueError):  # no more files, for one; or the thread has ended
            return None
        before, self.sampled = self.sampled, now
        return None if before is None else now - before


class CallKind:
    """The calls of one step's function, or of another thing alike, and the number of them that may run at once.

    One to begin with. While more are wanted and the running ones use little of a core, four times as many, and so on up
    to `limit`. As many as need `PREFETCH` seconds of the CPU may run in any case. Where the calls use a whole core, the
    number falls by one with each call that ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.running: set[ThreadCall] = set()
        self.max_running = 1
        self._calls = 0
        self._cpu = 0.0  # seconds of a call, a moving average
        self._used = 0.0  # CPU seconds of calls that have ended since the last sample
        self._sampled_at = 0.0
        self._others = 0.0  # CPU seconds of all threads but the loop's at the last sample

    def has_room(self) -> bool:
        """Return whether another call may begin."""
        count = len(self.running)
        return count < self.max_running or (self._calls > 0 and count * self._cpu < PREFETCH)

    def begin_call(self) -> ThreadCall:
        """Count a call that is about to run in a thread."""
        if not self.running:
            self._begin_sample(time.monotonic())
        is_short = self._calls > 0 and self._limit * self._cpu < PREFETCH  # all may run: there will be no sample
        call = ThreadCall(is_watched=self.max_running < self._limit and not is_short)
        self.running.add(call)
        return call

    def end_call(self, call: ThreadCall) -> None:
        """Learn from a call that has ended."""
        count = len(self.running)
        self.running.discard(call)
        self._used += min(call.cpu, time.monotonic() - self._sampled_at)
        self._cpu = call.cpu if not self._calls else self._cpu + 0.2 * (call.cpu - self._cpu)
        self._calls += 1
        if count * call.cpu > max(COMPUTING_SHARE * call.wall, PREFETCH):
            self.max_running = max(1, min(self.max_running, count - 1))

    def sample(self, *, late: float) -> None:
        """Sample the running calls, since more are wanted. `late`: the seconds by which the sample is late, as it is
        when one of them holds the interpreter."""
        now = time.monotonic()
        if not all(call.began for call in self.running):
            return
        window = now - max([self._sampled_at, *(call.began for call in self.running)])
        enough = 2 * MIN_SAMPLE if self.max_running == 1 else MIN_SAMPLE / 2
        if window < enough:  # the first call may have had to wait for the interpreter
            return
        wanted = [call.seconds_wanted() for call in self.running]
        used = self._used + sum(seconds or 0.0 for seconds in wanted)
        if _clock_of is None:
            used = _cpu_of_others() - self._others
        if used < WAITING_SHARE * window and late <= MIN_SAMPLE and None not in wanted:
            self.max_running = min(4 * self.max_running, self._limit)
        self._begin_sample(now)

    def _begin_sample(self, now: float) -> None:
        self._sampled_at, self._used = now, 0.0
        if _clock_of is None:
            self._others = _cpu_of_others()


def _cpu_of_others() -> float:
    """Return the CPU seconds of all threads of this process but the calling one."""
    return time.process_time() - time.thread_time()
