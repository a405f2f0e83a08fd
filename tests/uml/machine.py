"""User-Mode Linux as a test bed: a kernel of our own in a process of nobody's.

Owns what a guest needs: a folder that its user can read with our code and its few packages, the boot, the
end of every process of it. The guest sees the host's disk read-only and with its user's rights alone, so
that its root can harm nothing. What runs inside is `tests/uml/inside`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.uml.inside.main import GROUPS, SECONDS

ROOT = Path(__file__).parents[2]
KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
#: The interpreter inside: nobody cannot read a virtual environment everywhere.
PYTHON = Path("/usr/bin/python3")
#: Imported by what runs inside; each is pure Python or built for PYTHON.
PACKAGES = ("pyroute2", "msgspec", "structlog", "typing_extensions", "yaml")
USER = "nobody"
MEMORY = "256M"
#: Half the groups take half a minute here; a machine under load several times that.
RUN_TIMEOUT_S = 300.0
#: Guests at once: each has one processor.
GUESTS = min(2, os.cpu_count() or 1)
#: For developers: names of groups (`inside.main.GROUPS`) with commas; tests of the others are skipped.
GROUPS_VARIABLE = "NETPOL_UML_GROUPS"


class GuestError(Exception):
    """The guest did not bring a result; the text is what it said."""


def lacking() -> str:
    """What is missing on this machine to boot a guest, or ""."""
    if shutil.which(KERNEL) is None or not MODULES.is_dir():
        return "needs the package user-mode-linux"
    if not PYTHON.exists():
        return f"needs {PYTHON}"
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print(sys.implementation.cache_tag)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if version != sys.implementation.cache_tag:  # msgspec is a binary of this one
        return f"needs {PYTHON} to be {sys.implementation.cache_tag}, got {version}"
    return ""


def chosen() -> tuple[str, ...]:
    """The groups that a developer wants; none for all."""
    return tuple(filter(None, os.environ.get(GROUPS_VARIABLE, "").split(",")))


def run_groups(only: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The results of all groups, or those named, of several guests at once; see `run_guest`."""
    shares: list[tuple[str, ...]] = [()] * GUESTS
    for group in sorted(only or GROUPS, key=_seconds, reverse=True):
        least = min(range(GUESTS), key=lambda at: sum(map(_seconds, shares[at])))
        shares[least] += (group,)
    # In their order: the first one wants a fresh kernel.
    ordered = [tuple(g for g in only or GROUPS if g in share) for share in shares if share]
    with ThreadPoolExecutor(len(ordered)) as pool:
        return {k: v for found in pool.map(run_guest, ordered) for k, v in found.items()}


def _seconds(group: str) -> int:
    return SECONDS.get(group, 10)


def run_guest(
    only: tuple[str, ...] = (),
    *,
    packages: tuple[str, ...] = (),
    memory: str = MEMORY,
    timeout_s: float = RUN_TIMEOUT_S,
) -> dict[str, dict[str, Any]]:
    """Boot, run the groups inside (all, or those named), and return what each wrote.

    Args:
        only: names of groups, or dotted names of modules that have a `run(say)`.
        packages: what they import beside PACKAGES.
        memory: of the guest.
        timeout_s: after which it is killed.

    Raises:
        GuestError: it did not come to an end, or a group ended without results.
    """
    user = pwd.getpwnam(USER) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    stage = Path(tempfile.mkdtemp(prefix="netpol-uml-"))
    try:
        _fill(stage, (*PACKAGES, *packages))
        (stage / "groups").write_text(" ".join(only))
        for folder in (stage, *stage.rglob("*")):
            os.chown(folder, user.pw_uid, user.pw_gid)
        said = _boot(stage, user, memory=memory, timeout_s=timeout_s)
        log = stage / "out/log"
        inside = log.read_text(errors="replace") if log.exists() else ""
        results = {}
        for group in only or GROUPS:
            try:
                results[group] = json.loads((stage / f"out/{group}.json").read_text())
            except (OSError, ValueError) as e:
                raise GuestError(f"{group}: no results\n{said[-2000:]}\n{inside[-6000:]}") from e
        return results
    finally:
        shutil.rmtree(stage)


def _fill(stage: Path, packages: tuple[str, ...]) -> None:
    stage.chmod(0o755)
    for name in ("out", "home", "site"):
        (stage / name).mkdir()
    site = stage / "site"
    for name in dict.fromkeys(packages):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GuestError(f"no package {name}")
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, site / name)
        else:
            shutil.copy2(origin, site)
    for name in ("netpol", "proxy", "routes", "bench"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    (site / "tests/kernel").mkdir(parents=True)
    for name in ("builders.py", "cniruntime.py", "engine.py", "kernel/birdnet.py"):
        shutil.copy2(ROOT / "tests" / name, site / "tests" / name)
    shutil.copytree(ROOT / "tests/uml", site / "tests/uml")
    # Compiled once here: inside it takes four times as long, and cannot be kept.
    subprocess.run([PYTHON, "-m", "compileall", "-q", "-j", "2", site], check=False)
    shutil.copy2(ROOT / "tests/uml/inside/init.sh", stage)


def _boot(stage: Path, user: pwd.struct_passwd, *, memory: str, timeout_s: float) -> str:
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    process = subprocess.Popen(
        [
            KERNEL,
            f"mem={memory}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={stage}/init.sh",
            "con=null",
            "con0=null,fd:1",
            "panic=-1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=stage,
        env={"PATH": os.defpath, "HOME": str(stage / "home"), "TMPDIR": str(stage / "home")},
        start_new_session=True,
        text=True,
        errors="replace",
        **identity,
    )
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        said += f"\nkilled after {timeout_s:.0f} s"
    return said
