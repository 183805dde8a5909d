"""Hosts that are network namespaces on a switch of their own, so that a test can cut one off, and Postgres on them.

Needs root and iproute2. No packet leaves these namespaces. The end of the `with` block, also by Ctrl-C, ends the
programs on the hosts and removes all; what a killed process has left, the next one removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from fix_database import memory

from pgtask._postgres.embedded import binary
from pgtask._postgres.server_user import server_user

PREFIX = "pgt"
PORT = 5432


def why_no_switch() -> str | None:
    """Return why there can be no switch here, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("setpriv") is None:
        return "needs root, iproute2 and setpriv"
    name = f"{PREFIX}{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None if done.returncode == 0 else "network namespaces are not allowed here"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Switch:
    """A switch with hosts: `with Switch("a", "b") as switch`."""

    def __init__(self, *hosts: str) -> None:
        self._space = f"{PREFIX}{os.getpid()}"
        self.addresses = {host: f"10.77.0.{number}" for number, host in enumerate(hosts, 1)}

    def __enter__(self) -> Switch:
        _remove_left()
        try:
            _ip("netns", "add", self._space)
            _ip("-n", self._space, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._space, "link", "set", "br0", "up")
            for host in self.addresses:
                self._plug_in(host)
            self._fix_neighbours()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.addresses:
            _remove(self._name(host))
        _remove(self._space)

    def command(self, host: str, *words: str) -> list[str]:
        """Return a command that runs these words on a host."""
        return ["ip", "netns", "exec", self._name(host), *words]

    def cut(self, host: str) -> None:
        """Cut a host off: the switch swallows what it sends and what others send to it."""
        _ip("-n", self._space, "link", "set", host, "down")

    def mute(self, host: str) -> None:
        """Cut a host off in a single direction: it hears the others, and its answers are lost."""
        _ip("-n", self._name(host), "route", "add", "blackhole", "10.77.0.0/25")
        _ip("-n", self._name(host), "route", "add", "blackhole", "10.77.0.128/25")

    def heal(self, host: str) -> None:
        """Undo `cut`."""
        _ip("-n", self._space, "link", "set", host, "up")

    def unmute(self, host: str) -> None:
        """Undo `mute`."""
        _ip("-n", self._name(host), "route", "delete", "blackhole", "10.77.0.0/25")
        _ip("-n", self._name(host), "route", "delete", "blackhole", "10.77.0.128/25")

    def _name(self, host: str) -> str:
        return f"{self._space}-{host}"

    def _plug_in(self, host: str) -> None:
        name = self._name(host)
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", self._space)
        _ip("-n", self._space, "link", "set", host, "master", "br0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")

    def _fix_neighbours(self) -> None:
        """Let each host know the others for good. Else a host that is cut off would be unreachable after a moment, as
        on a segment of its own; behind a router its packets are swallowed."""
        hardware = {}
        for host in self.addresses:
            path = self.command(host, "cat", "/sys/class/net/eth0/address")
            hardware[host] = subprocess.run(path, capture_output=True, text=True, check=True).stdout.strip()
        for host in self.addresses:
            for other, address in self.addresses.items():
                if other != host:
                    about = (address, "lladdr", hardware[other], "nud", "permanent", "dev", "eth0")
                    _ip("-n", self._name(host), "neighbour", "replace", *about)


def _remove(space: str) -> None:
    """End the programs in a namespace and remove it, if it is there."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def _remove_left() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        space = line.split()[0]
        pid = space.removeprefix(PREFIX).partition("-")[0]
        if space.startswith(PREFIX) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(space)


# --- Postgres ------------------------------------------------------------------------------------------------


class Server:
    """The Postgres of a host. `local` is its DSN over a socket, which no cut concerns."""

    def __init__(self, switch: Switch, host: str, directory: Path) -> None:
        self._switch, self._host = switch, host
        self.address = switch.addresses[host]
        self.directory = directory / host
        self.local = f"postgresql://postgres@/postgres?host={self.directory}&port={PORT}"
        self.directory.mkdir(mode=0o750)
        self._user = server_user(self.directory / "data")
        os.chown(self.directory, *self._user)

    def create(self) -> None:
        """Make the data of a primary."""
        self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        data = self.directory / "data"
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("listen_addresses = '*'\nfsync = off\nmax_connections = 60\nshared_buffers = 32MB\n")
            settings.write("synchronous_standby_names = ''\nwal_sender_timeout = 5s\nwal_receiver_timeout = 5s\n")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 trust\nhost replication all 10.77.0.0/24 trust\n")

    def follow(self, primary: Server) -> None:
        """Make the data of a standby."""
        url = f"postgresql://postgres@{primary.address}:{PORT}/postgres?application_name={self._host}"
        self._run("pg_basebackup", "-d", url, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")

    def start(self) -> None:
        options = f"-p {PORT} -c unix_socket_directories={self.directory}"
        self._run("pg_ctl", "start", "--wait", "--silent", "-o", options)

    def promote(self) -> None:
        self._run("pg_ctl", "promote", "--wait", "--silent")

    def _run(self, program: str, *words: str) -> None:
        """Run a program of Postgres on the host, as a user that may."""
        identity = ("setpriv", f"--reuid={self._user.uid}", f"--regid={self._user.gid}", "--clear-groups")
        told = ("-D", str(self.directory / "data"))
        command = self._switch.command(self._host, *identity, str(binary(program)), *told, *words)
        with (self.directory / "output").open("ab") as output:  # a pipe would stay open in the server
            done = subprocess.run(command, cwd=self.directory, stdout=output, stderr=output, check=False)
        assert done.returncode == 0, (self.directory / "output").read_text()


@contextlib.contextmanager
def replicated(switch: Switch, primary: str, standby: str) -> Iterator[tuple[Server, Server]]:
    """Yield a primary and a standby that streams from it."""
    directory = Path(tempfile.mkdtemp(prefix="pgtask-hosts-", dir=memory()))
    directory.chmod(0o755)
    try:
        first, second = Server(switch, primary, directory), Server(switch, standby, directory)
        first.create()
        first.start()
        second.follow(first)
        second.start()
        yield first, second
    finally:
        switch.__exit__()  # ends the servers, whose data goes
        for _ in range(50):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                break
            time.sleep(0.1)
