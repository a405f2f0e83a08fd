"""Nodes on real links with real BIRDs, for tests: subnets joined by a router that knows no pod route.

Each node is a namespace with eth0 in its subnet, and a bridge `pods` that bears the first address of its
podCIDRs, which stands for a pod. Owns the namespaces and the processes; knows nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from netpol.kernel import netns
from netpol.lib.errors import NetpolError
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import Node
from routes.bird.control import BirdControl
from routes.bird.reply import Reply

_numbers = itertools.count()
#: BIRD keeps another clock than it tells, so that the same moment comes out otherwise by a millisecond. A
#: session that ended is up again no sooner than the least connect delay, three quarters of a second.
_SAME_S = 0.1


def lasting(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Whether each session went on: before and after, by name, since when it is up."""

    def same(one: str, other: str) -> bool:
        apart = datetime.fromisoformat(other) - datetime.fromisoformat(one)
        return abs(apart.total_seconds()) < _SAME_S

    return all(name in after and same(since, after[name]) for name, since in before.items())


@dataclass(frozen=True)
class Host:
    """A node: its number in its subnet gives all its addresses."""

    name: str
    netns: str
    subnet: int
    number: int
    folder: Path

    @property
    def addresses(self) -> tuple[str, str]:
        return f"10.0.{self.subnet}.{self.number}", f"fd00:{self.subnet}::{self.number}"

    @property
    def pods(self) -> tuple[str, str]:
        return f"10.1.{self.number}.0/24", f"fd01:0:0:{self.number}::/64"

    @property
    def pod_addresses(self) -> tuple[str, str]:
        return f"10.1.{self.number}.1", f"fd01:0:0:{self.number}::1"

    def node(self, **annotations: str) -> Node:
        """The API object."""
        return Node(
            name=self.name,
            addresses=tuple(parse_address(a) for a in self.addresses),
            pod_cidrs=tuple(parse_prefix(p) for p in self.pods),
            annotations=tuple(sorted((f"netpol.io/{k}", v) for k, v in annotations.items())),
        )

    @property
    def socket(self) -> Path:
        return self.folder / "bird.ctl"

    def run(self, *command: str) -> str:
        """Run a command inside; its output."""
        return _run(self.netns, *command)

    def routes(self) -> set[str]:
        """Prefixes of BIRD's routes in the kernel; unreachable ones with their word before them."""
        return _routes(self.netns)

    def pings(self, other: Host) -> bool:
        """Whether its pod addresses reach another's, both families."""
        return all(
            ", 0% packet loss"
            in self.run("ping", "-c", "2", "-i", "0.1", "-W", "2", "-I", mine, theirs)
            for mine, theirs in zip(self.pod_addresses, other.pod_addresses, strict=True)
        )

    def ask(self, command: str) -> Reply:
        """Ask its BIRD."""
        return _ask(self.socket, command)


def _ask(path: Path, command: str) -> Reply:
    async def talk() -> Reply:
        control = BirdControl(path)
        try:
            return await control.ask(command)
        finally:
            await control.close()

    return asyncio.run(talk())


def _run(space: str, *command: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", space, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


def _routes(space: str) -> set[str]:
    out = set()
    for family in ("-4", "-6"):
        for line in _run(space, "ip", family, "route", "show", "proto", "bird").splitlines():
            words = line.split()
            if words and not line.startswith("\t"):
                out.add(" ".join(words[:2]) if words[0] == "unreachable" else words[0])
    return out


class BirdNet:
    """The nodes, their links, their daemons."""

    def __init__(self, folder: Path, nodes: Iterable[tuple[int, int]]) -> None:
        self.folder = folder
        self._prefix = f"knpt-b{os.getpid()}x{next(_numbers)}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._spaces: list[str] = []
        self.hosts: dict[str, Host] = {}
        self.router = self._space("rt")
        for subnet, number in nodes:
            name = f"n{number}"
            where = folder / name
            where.mkdir()
            self.hosts[name] = Host(name, self._space(name), subnet, number, where)
        self._wire()

    def _space(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        netns.create(full)
        self._spaces.append(full)
        return full

    def _wire(self) -> None:
        lines: list[str] = []
        subnets = sorted({h.subnet for h in self.hosts.values()})
        for s in subnets:
            lines += [
                f"link add br{s} type bridge",
                f"link set br{s} up",
                f"address add 10.0.{s}.254/24 dev br{s}",
                f"address add fd00:{s}::254/64 dev br{s} nodad",
            ]
        for h in self.hosts.values():
            lines += [
                f"link add {h.name} type veth peer name eth0 netns {h.netns}",
                f"link set {h.name} master br{h.subnet} up",
            ]
        _batch(self.router, lines)
        _sysctls(self.router)
        for h in self.hosts.values():
            _sysctls(h.netns)
            four, six = h.addresses
            _batch(
                h.netns,
                [
                    f"address add {four}/24 dev eth0",
                    f"address add {six}/64 dev eth0 nodad",
                    "link set eth0 up",
                    "link add pods type bridge",
                    "link set pods up",
                    f"address add {h.pod_addresses[0]}/24 dev pods",
                    f"address add {h.pod_addresses[1]}/64 dev pods nodad",
                    f"route add default via 10.0.{h.subnet}.254",
                    f"route add default via fd00:{h.subnet}::254",
                ],
            )

    def start(self, name: str, config: str, *flags: str) -> None:
        """Write a node's configuration and start its BIRD."""
        host = self.hosts[name]
        path = host.folder / "bird.conf"
        path.write_text(config, encoding="utf-8")
        self.run_bird(name, host.netns, path, *flags)

    def ask(self, path: Path, command: str) -> Reply:
        """Ask a BIRD by its socket."""
        return _ask(path, command)

    def routes_in(self, space: str) -> set[str]:
        """BIRD's routes in any namespace."""
        return _routes(space)

    def run_bird(self, name: str, space: str, path: Path, *flags: str) -> None:
        """Start a BIRD with a file of one's own; its socket is beside the file."""
        self._daemons[name] = subprocess.Popen(
            [
                *("ip", "netns", "exec", space),
                *("bird", "-f", "-c", str(path), "-s", str(path.with_suffix(".ctl")), *flags),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self, name: str) -> None:
        """End a node's BIRD without a word."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def nudge(self) -> None:
        """Ask every BIRD something: an idle one sleeps up to three seconds with work to do."""
        for name in self._daemons.keys() & self.hosts.keys():
            with contextlib.suppress(NetpolError):
                self.hosts[name].ask("show status")

    def wait(self, condition: Callable[[], bool], *, within_s: float = 20.0) -> bool:
        """Wait for a condition, keeping the BIRDs awake."""
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.nudge()
            time.sleep(0.1)
        return True

    def close(self) -> None:
        """End all daemons and remove all namespaces."""
        for name in list(self._daemons):
            self.kill(name)
        for space in self._spaces:
            netns.delete(space)


def _batch(space: str, lines: list[str]) -> None:
    subprocess.run(
        ["ip", "-n", space, "-batch", "-"], input="\n".join(lines), text=True, check=True
    )


def _sysctls(space: str) -> None:
    keys = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")

    def write() -> None:
        for key in keys:
            Path("/proc/sys", key).write_text("1", encoding="ascii")

    netns.in_netns(space, write)


@contextlib.contextmanager
def bird_net(nodes: Iterable[tuple[int, int]]) -> Iterator[BirdNet]:
    """Nodes as (subnet, number); gone at the end.

    Their files are in a folder that a daemon's user can enter, unlike pytest's own.
    """
    with tempfile.TemporaryDirectory(prefix="knpt-bird-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        net = BirdNet(folder, nodes)
        try:
            yield net
        finally:
            net.close()
