"""Other people's engines: each a directory of `bench/peers` with a `peer.toml` and a program, run by one set of rules.

Invariants: nothing of a peer is known here but what its `peer.toml` says; a peer that cannot be installed, or does not
know a workload, is skipped with the reason. docs/performance.md describes the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.contender import Arena, Effort, RunFailed, Skipped
from bench.process import last_line, run_measured
from bench.server import BenchError
from bench.workloads import Workload

__all__ = ["HOME", "PEERS", "Figures", "Peer", "find_peers", "portable"]

PEERS = Path(__file__).parent / "peers"
HOME = Path(__file__).parent.parent / ".bench"
_INSTALL_TIMEOUT = 1800.0
_FILL_TIMEOUT = 600.0
_LATENCY_SLACK = 60.0


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that it is worth to ask of a peer."""

    procs: int | None = None
    tasks: int | None = None


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `peer.toml`. Commands are lists of words, without a shell."""

    name: str
    about: str
    version: list[str]
    fill: list[str]
    drain: list[str]
    left: str
    needs: list[str] = []
    install: list[list[str]] = []
    settle: list[str] = []
    latency: list[str] | None = None
    workloads: tuple[str, ...] = ("noop",)
    limits: Limits = Limits()


class Figures(msgspec.Struct, frozen=True):
    """What a peer prints of its latency; milliseconds."""

    start_p50: float
    start_p99: float
    enqueue_p50: float
    enqueue_p99: float
    samples: int


class Peer:
    """A contender that is driven by the commands of its card. Its database is empty before the fill."""

    on_our_schema = False

    def __init__(self, directory: Path, homes: Path) -> None:
        try:
            self._card = msgspec.toml.decode((directory / "peer.toml").read_bytes(), type=Card)
        except (OSError, msgspec.MsgspecError) as error:
            raise BenchError(f"{directory / 'peer.toml'}: {error}") from None
        self.name = self._card.name
        self.about = self._card.about
        self.left = self._card.left
        self.settle = tuple(self._card.settle)
        self.most_tasks = self._card.limits.tasks
        self.most_procs = self._card.limits.procs
        self.can_measure_latency = self._card.latency is not None
        self._here = directory.resolve()
        self._home = (homes / directory.name).resolve()

    def prepare(self, workload: Workload) -> str:
        if workload.name not in self._card.workloads:
            raise Skipped(f"it does not do {workload.name}")
        return self.install()

    def install(self) -> str:
        """Install it, unless that has been done with the very same files; the version. Raises `Skipped`."""
        for program in self._card.needs:
            if shutil.which(program) is None:
                raise Skipped(f"{program} is not on the PATH")
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with _locked(self._home.with_name(self._home.name + ".lock")):
                return self._install()
        except OSError as error:
            raise Skipped(f"{error.filename}: {error.strerror}") from None

    def _install(self) -> str:
        stamp, now = self._home / ".stamp", _digest(self._here)
        if not stamp.exists() or stamp.read_text() != now:
            shutil.rmtree(self._home)
            self._home.mkdir()
            for command in self._card.install:
                self._ask(command, _INSTALL_TIMEOUT, "install")
            stamp.write_text(now)
        said = self._ask(self._card.version, 60, "version")
        return said if re.match(rf"{re.escape(self.name)}\b", said) or " " in said else f"{self.name} {said}"

    def fill(self, arena: Arena) -> float | None:
        self._run(self._card.fill, arena, _FILL_TIMEOUT)
        return None

    def drain(self, arena: Arena) -> Effort:
        command = self._words(self._card.drain, arena)
        ended = run_measured(command, directory=arena.directory, env=_environment(), timeout=arena.timeout, look=True)
        return Effort(
            began_at=ended.began_at,
            seconds=ended.seconds,
            cpu_seconds=ended.cpu_seconds,
            tree_cpu_seconds=ended.cpu_seconds,
            peak_rss_bytes=ended.peak_rss_bytes,
        )

    def latency(self, dsn: str, *, procs: int, per_second: float, seconds: float) -> Figures:
        """Raises `RunFailed`."""
        assert self._card.latency is not None
        values = {
            "dsn": portable(dsn),
            "procs": min(procs, self.most_procs or procs),
            "per_second": f"{per_second:g}",
            "seconds": f"{seconds:g}",
        }
        with tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory:
            ended = run_measured(
                self._fill_in(self._card.latency, values),
                directory=Path(directory),
                env=_environment(),
                timeout=seconds + _LATENCY_SLACK,
            )
        try:
            return msgspec.json.decode(last_line(ended.stdout), type=Figures)
        except msgspec.MsgspecError as error:
            raise RunFailed(f"no figures in {last_line(ended.stdout)!r}: {error}") from None

    # --- commands

    def _run(self, command: Sequence[str], arena: Arena, timeout: float) -> None:
        run_measured(self._words(command, arena), directory=arena.directory, env=_environment(), timeout=timeout)

    def _words(self, command: Sequence[str], arena: Arena) -> list[str]:
        values = {
            "dsn": portable(arena.dsn),
            "tasks": arena.tasks,
            "procs": arena.procs,
            "workload": arena.workload.name,
        }
        return self._fill_in(command, values)

    def _fill_in(self, command: Sequence[str], values: Mapping[str, object]) -> list[str]:
        """By hand, since a word may well have braces of its own."""
        known: dict[str, object] = {"home": self._home, "here": self._here, **values}
        return [re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), word) for word in command]

    def _ask(self, command: Sequence[str], timeout: float, what: str) -> str:
        """What the command says in its last line. Raises `Skipped`."""
        words = self._fill_in(command, {})
        try:
            ended = subprocess.run(
                words, cwd=self._home, env=_environment(), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"{what}: not finished after {timeout:g} s") from None
        if ended.returncode != 0:
            said = last_line(ended.stderr) or last_line(ended.stdout)
            raise Skipped(f"{what}: {said or f'exit code {ended.returncode}'}")
        return last_line(ended.stdout)


def find_peers(directory: Path, homes: Path) -> dict[str, Peer]:
    """By name, in the order of the alphabet."""
    peers = (Peer(path.parent, homes) for path in sorted(directory.glob("*/peer.toml")))
    return {peer.name: peer for peer in peers}


def portable(dsn: str) -> str:
    """The same DSN in the form that the drivers of all languages read: many refuse a user before an empty host."""
    found = re.fullmatch(r"(\w+://)([^@/?:]+)@(/[^?]*)\?(.*)", dsn)
    return f"{found[1]}{found[3]}?{found[4]}&user={found[2]}" if found else dsn


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _environment() -> dict[str, str]:
    """Ours without anybody's settings of a database."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PGTASK_", "PGHOST", "PGUSER", "PGDATABASE", "PGPORT", "PGPASS"))
        and name not in ("DATABASE_URL", "PYTHONPATH", "VIRTUAL_ENV")
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two benches must not install the same peer at once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
