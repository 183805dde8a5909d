"""Other engines: each is a directory of `bench/peers` with a `peer.toml` and a program, all run by the same rules.

Invariants: this module knows of a peer only its `peer.toml`; a peer that cannot be installed, or does not support a
workload, is skipped with the reason. docs/performance.md describes the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.harness.contender import Arena, ContenderSkipped, Effort, Latency, RunFailed
from bench.harness.process import last_line, run_measured
from bench.harness.server import BenchError, Server
from bench.workloads.workload import Workload

__all__ = ["Peer", "find_peers", "portable_dsn"]

_INSTALL_TIMEOUT = 1800.0
_FILL_TIMEOUT = 600.0
_LATENCY_SLACK = 60.0


class PeerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Maximum of processes that a peer can use, and of tasks that it finishes in reasonable time."""

    procs: int | None = None
    tasks: int | None = None


class PeerDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `peer.toml`. Each command is a list of words, run without a shell."""

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
    limits: PeerLimits = PeerLimits()


class PeerLatency(msgspec.Struct, frozen=True):
    """Latency as a peer prints it, in milliseconds."""

    start_p50: float
    start_p99: float
    enqueue_p50: float
    enqueue_p99: float
    samples: int


class Peer:
    """A contender that the commands of its `peer.toml` drive. Its database is empty before the fill."""

    on_our_schema = False

    def __init__(self, directory: Path, homes: Path) -> None:
        try:
            self._definition = msgspec.toml.decode((directory / "peer.toml").read_bytes(), type=PeerDefinition)
        except (OSError, msgspec.MsgspecError) as error:
            raise BenchError(f"{directory / 'peer.toml'}: {error}") from None
        self.name = self._definition.name
        self.about = self._definition.about
        self.left = self._definition.left
        self.settle = tuple(self._definition.settle)
        self.max_tasks = self._definition.limits.tasks
        self.max_procs = self._definition.limits.procs
        self.can_measure_latency = self._definition.latency is not None
        self._here = directory.resolve()
        self._home = (homes / directory.name).resolve()

    def prepare(self, workload: Workload) -> str:
        if workload.name not in self._definition.workloads:
            raise ContenderSkipped(f"it does not do {workload.name}")
        return self.install()

    def install(self) -> str:
        """Install the peer unless these very files are installed already; return its version. Raises
        `ContenderSkipped`."""
        for program in self._definition.needs:
            if shutil.which(program) is None:
                raise ContenderSkipped(f"{program} is not on the PATH")
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with _locked(self._home.with_name(self._home.name + ".lock")):
                return self._install_locked()
        except OSError as error:
            raise ContenderSkipped(f"{error.filename}: {error.strerror}") from None

    def _install_locked(self) -> str:
        stamp, digest = self._home / ".stamp", _digest_files(self._here)
        if not stamp.exists() or stamp.read_text() != digest:
            shutil.rmtree(self._home)
            self._home.mkdir()
            for command in self._definition.install:
                self._read_output(command, _INSTALL_TIMEOUT, "install")
            stamp.write_text(digest)
        version = self._read_output(self._definition.version, 60, "version")
        has_name = " " in version or re.match(rf"{re.escape(self.name)}\b", version)
        return version if has_name else f"{self.name} {version}"

    def fill(self, arena: Arena) -> float | None:
        self._run(self._definition.fill, arena, _FILL_TIMEOUT)
        return None

    def drain(self, arena: Arena) -> Effort:
        command = self._words(self._definition.drain, arena)
        result = run_measured(
            command, directory=arena.directory, env=_clean_environment(), timeout=arena.timeout, sample_memory=True
        )
        return Effort(
            began_at=result.began_at,
            seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
            tree_cpu_seconds=result.cpu_seconds,
            peak_rss_bytes=result.peak_rss_bytes,
        )

    def measure_latency(self, server: Server, *, procs: int, per_second: float, seconds: float) -> Latency:
        """Run the peer's own measurement, for whole seconds."""
        assert self._definition.latency is not None
        seconds = math.ceil(seconds)
        with (
            server.fresh_database(empty=True) as database,
            tempfile.TemporaryDirectory(prefix="pgtask-bench-") as directory,
        ):
            values = {
                "dsn": portable_dsn(server.database(database)),
                "procs": min(procs, self.max_procs or procs),
                "per_second": f"{per_second:g}",
                "seconds": f"{seconds:g}",
            }
            result = run_measured(
                self._fill_in(self._definition.latency, values),
                directory=Path(directory),
                env=_clean_environment(),
                timeout=seconds + _LATENCY_SLACK,
            )
        try:
            figures = msgspec.json.decode(last_line(result.stdout), type=PeerLatency)
        except msgspec.MsgspecError as error:
            raise RunFailed(f"no figures in {last_line(result.stdout)!r}: {error}") from None
        return Latency(per_second=per_second, **msgspec.structs.asdict(figures))

    # --- commands

    def _run(self, command: Sequence[str], arena: Arena, timeout: float) -> None:
        run_measured(self._words(command, arena), directory=arena.directory, env=_clean_environment(), timeout=timeout)

    def _words(self, command: Sequence[str], arena: Arena) -> list[str]:
        values = {
            "dsn": portable_dsn(arena.dsn),
            "tasks": arena.tasks,
            "procs": arena.procs,
            "workload": arena.workload.name,
        }
        return self._fill_in(command, values)

    def _fill_in(self, command: Sequence[str], values: Mapping[str, object]) -> list[str]:
        """Replace the placeholders that have a value. A word may have other braces, so `str.format` would not do."""
        known: dict[str, object] = {"home": self._home, "here": self._here, **values}
        return [re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), word) for word in command]

    def _read_output(self, command: Sequence[str], timeout: float, what: str) -> str:
        """Run a command and return the last line of its output. Raises `ContenderSkipped`."""
        words = self._fill_in(command, {})
        try:
            ended = subprocess.run(
                words, cwd=self._home, env=_clean_environment(), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise ContenderSkipped(f"{what}: not finished after {timeout:g} s") from None
        if ended.returncode != 0:
            output = last_line(ended.stderr) or last_line(ended.stdout)
            raise ContenderSkipped(f"{what}: {output or f'exit code {ended.returncode}'}")
        return last_line(ended.stdout)


def find_peers(directory: Path, homes: Path) -> dict[str, Peer]:
    """Return the peers by name, in the order of the alphabet."""
    peers = (Peer(path.parent, homes) for path in sorted(directory.glob("*/peer.toml")))
    return {peer.name: peer for peer in peers}


def portable_dsn(dsn: str) -> str:
    """Move the user into the parameters of the DSN, as many drivers refuse a user before an empty host."""
    found = re.fullmatch(r"(\w+://)([^@/?:]+)@(/[^?]*)\?(.*)", dsn)
    return f"{found[1]}{found[3]}?{found[4]}&user={found[2]}" if found else dsn


def _digest_files(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _clean_environment() -> dict[str, str]:
    """Copy our environment without any setting of a database or of Python."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PGTASK_", "PGHOST", "PGUSER", "PGDATABASE", "PGPORT", "PGPASS"))
        and name not in ("DATABASE_URL", "PYTHONPATH", "VIRTUAL_ENV")
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, so that two benches never install the same peer at once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
