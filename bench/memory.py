"""The resident memory of a real agent after it has synced with a real API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import worlds
from bench.measure import Row
from bench.worlds import LOCAL_NODE, NODE_ADDRESS, Shape
from netpol.admin.client import call

QUIET_S = 30.0
START_TIMEOUT_S = 240.0
MB = 1_000_000


def pods_10k() -> Iterator[Row]:
    """10,000 pods, 1,000 policies."""
    yield _agent(worlds.TEAMS_WORLD, "memory.pods_10k.mb", target=128.0)


def pods_100k() -> Iterator[Row]:
    """100,000 pods; policies as many as before."""
    yield _agent(Shape(pods=100_000), "memory.pods_100k.mb", target=300.0)


def _agent(shape: Shape, name: str, *, target: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="netpol-bench-") as text:
        folder = Path(text)
        folder.chmod(0o755)  # BIRD is another user
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.serve", json.dumps(vars(shape))],
            stdout=subprocess.PIPE,
            text=True,
        )
        agent: subprocess.Popen[bytes] | None = None
        try:
            url = server.stdout.readline().strip() if server.stdout else ""
            if not url:
                raise RuntimeError("the API server did not start")
            begin = time.monotonic()
            _link()
            agent = _start(folder, url)
            status = _synced(folder / "agent.sock", agent)
            sync_s = time.monotonic() - begin
            time.sleep(QUIET_S)
            memory = _memory_mb(agent.pid)
            cpu_s = _cpu_s(agent.pid)
            bird = _bird(folder)
            bird_mb = _memory_mb(bird)["VmRSS"]
        finally:
            for process in (agent, server):
                if process is not None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(20)
            with contextlib.suppress(OSError, ValueError):
                os.kill(_bird(folder), signal.SIGKILL)
    watched = {w["name"]: w["objects"] for w in status["watches"]}
    if watched.get("cluster pods") != shape.pods:
        raise AssertionError(f"the agent knows {watched}")
    return Row(
        name,
        memory["VmRSS"],
        "MB",
        target=target,
        note=f"peak {memory['VmHWM']:.0f}, anonymous {memory['RssAnon']:.0f}, files "
        f"{memory['RssFile']:.0f} MB; in sync after {sync_s:.1f} s (start of Python included), "
        f"CPU {cpu_s:.1f} s; VmRSS {QUIET_S:.0f} s later; policy and routes on (this kernel has no "
        f"IPVS), BIRD beside it {bird_mb:.0f} MB",
    )


def _link() -> None:
    """The node's link, with its address: BGP needs one. Nobody is behind it."""
    lines = ("link add up0 type veth peer name up1", f"address add {NODE_ADDRESS}/16 dev up0")
    lines += ("link set up0 up", "link set up1 up")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _bird(folder: Path) -> int:
    return int((folder / "run/bird/bird.pid").read_text())


def _start(folder: Path, url: str) -> subprocess.Popen[bytes]:
    arguments = {
        "--node": LOCAL_NODE,
        "--api-server": url,
        "--admin-socket": str(folder / "agent.sock"),
        "--state-dir": str(folder / "state"),
        "--cni-conf-dir": str(folder),
        "--health-addr": "127.0.0.1:9461",
        "--xtables-lockfile": str(folder / "xtables.lock"),
        "--iptables": "nft",
        "--pod-interfaces": "cni0",
        "--pod-ranges": "10.64.1.0/24",
        "--hold-unknown-pods": "on",
        "--audit-log": str(folder / "audit.log"),
        "--run-dir": str(folder / "run"),
    }
    words = [word for pair in arguments.items() for word in pair]
    words += ["--routes", "--no-write-cni"]
    return subprocess.Popen([sys.executable, "-m", "netpol", *words], stderr=subprocess.DEVNULL)


def _synced(path: Path, agent: subprocess.Popen[bytes]) -> dict[str, Any]:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if agent.poll() is not None:
            raise RuntimeError(f"the agent ended with {agent.returncode}")
        if path.exists():
            status: dict[str, Any] = call(str(path), "status")
            if status.get("in_sync"):
                return status
        time.sleep(0.2)
    raise TimeoutError("the agent is not in sync")


def _memory_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 / MB for name in names}


def _cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
