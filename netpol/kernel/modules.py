"""Kernel modules: ask for one that is missing."""

from __future__ import annotations

import contextlib
import subprocess

_MODPROBE_S = 10.0


def load_module(name: str) -> None:
    """Try to load a module; whether it worked is told by what the module brings."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["modprobe", name], check=False, capture_output=True, timeout=_MODPROBE_S)
