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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
#: The interpreter inside: nobody cannot read a virtual environment everywhere.
PYTHON = Path("/usr/bin/python3")
#: Imported by what runs inside; each is pure Python or built for PYTHON.
PACKAGES = ("pyroute2", "msgspec", "structlog", "typing_extensions")
USER = "nobody"
MEMORY = "256M"
#: Boot and script take about 15 s here; a machine under load several times that.
RUN_TIMEOUT_S = 100.0


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


def run_guest() -> dict[str, Any]:
    """Boot, run the script inside, and return what it wrote.

    Raises:
        GuestError: it did not come to an end, or ended without results.
    """
    user = pwd.getpwnam(USER) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    stage = Path(tempfile.mkdtemp(prefix="netpol-uml-"))
    try:
        _fill(stage)
        for folder in (stage, *stage.rglob("*")):
            os.chown(folder, user.pw_uid, user.pw_gid)
        said = _boot(stage, user)
        try:
            results: dict[str, Any] = json.loads((stage / "out/results.json").read_text())
        except (OSError, ValueError) as e:
            log = stage / "out/log"
            inside = log.read_text(errors="replace") if log.exists() else ""
            raise GuestError(f"{said[-2000:]}\n{inside[-6000:]}") from e
        return results
    finally:
        shutil.rmtree(stage)


def _fill(stage: Path) -> None:
    stage.chmod(0o755)
    for name in ("out", "home", "site"):
        (stage / name).mkdir()
    site = stage / "site"
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GuestError(f"no package {name}")
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, site / name)
        else:
            shutil.copy2(origin, site)
    shutil.copytree(ROOT / "netpol", site / "netpol")
    for name in ("builders.py", "engine.py"):
        (site / "tests").mkdir(exist_ok=True)
        shutil.copy2(ROOT / "tests" / name, site / "tests")
    shutil.copytree(ROOT / "tests/uml", site / "tests/uml")
    shutil.copy2(ROOT / "tests/uml/inside/init.sh", stage)


def _boot(stage: Path, user: pwd.struct_passwd) -> str:
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    process = subprocess.Popen(
        [
            KERNEL,
            f"mem={MEMORY}",
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
        said, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        said += f"\nkilled after {RUN_TIMEOUT_S:.0f} s"
    return said
