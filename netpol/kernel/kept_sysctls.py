"""Kernel settings that a room keeps at a value, and what they were before, for whoever cleans up.

The values before are written to a file before the first change, and never again: a later start finds our
own values. The file is on a file system that the next boot finds empty, as it finds the settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from netpol.kernel.sysctl import keep_sysctl, read_sysctl
from netpol.lib.errors import KernelError

_ROOT = Path("/proc/sys")
FILE = "sysctls.json"

#: From here on IPVS takes a reused port for a new connection without losing a second (f0a5e4d7a594).
_REUSE_SAFE = (5, 9)

_FOR_SERVICES = {
    # Backends' replies are found in conntrack, and rules see connections as established.
    "net/ipv4/vs/conntrack": "1",
    # A connection, or a client that must stay with its backend, does not wait for one that is gone.
    "net/ipv4/vs/expire_nodest_conn": "1",
    "net/ipv4/vs/expire_quiescent_template": "1",
    # Addresses of Services on the dummy link are nobody's on the network: not told by ARP.
    "net/ipv4/conf/all/arp_ignore": "1",
    "net/ipv4/conf/all/arp_announce": "2",
    "net/ipv4/ip_forward": "1",
}


def service_sysctls(release: str | None = None) -> dict[str, str]:
    """What the proxy needs of a kernel of this release (default: the one that runs)."""
    parts = (release or os.uname().release).split(".")[:2]
    numbers = tuple(int(p) for p in parts if p.isdigit())
    reuse = "1" if numbers >= _REUSE_SAFE else "0"
    return {**_FOR_SERVICES, "net/ipv4/vs/conn_reuse_mode": reuse}


class KeptSysctls:
    """Some settings of the caller's network namespace.

    Args:
        wanted: keys such as net/ipv4/ip_forward, and their values.
        file: where the values before are kept.
    """

    def __init__(self, wanted: Mapping[str, str], file: Path, *, root: Path = _ROOT) -> None:
        self._wanted, self._file, self._root = dict(wanted), file, root
        self._before = _read(file)

    def keep(self) -> list[str]:
        """Set what differs; returns why some do not have their value. An absent key is no fault here."""
        # Set also what cannot be remembered: traffic matters more than a cleanup that knows less.
        faults = self.remember()
        for key in self._differing():
            fault = keep_sysctl(key, self._wanted[key], root=self._root)
            if fault is not None:
                faults.append(fault)
        return faults

    def remember(self) -> list[str]:
        """Write down what is to be changed, without changing it; returns why that cannot be done."""
        new = {k: v for k, v in self._differing().items() if k not in self._before}
        if not new:
            return []
        self._before |= new
        try:
            self._write()
        except OSError as e:
            return [f"{self._file}: {e.strerror}"]
        return []

    def _differing(self) -> dict[str, str]:
        """What has another value than it shall have, and which."""
        found = {key: read_sysctl(key, root=self._root) for key in self._wanted}
        return {k: v for k, v in found.items() if v is not None and v != self._wanted[k]}

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._before), encoding="ascii")
        temporary.replace(self._file)


def restore_sysctls(file: Path, *, root: Path = _ROOT) -> int:
    """Set what is remembered to what it was, and forget it; returns how many were changed.

    Raises:
        KernelError: some could not be; the file stays.
    """
    count, faults = 0, []
    for key, value in _read(file).items():
        have = read_sysctl(key, root=root)
        if have is None or have == value:
            continue
        fault = keep_sysctl(key, value, root=root)
        if fault is None:
            count += 1
        else:
            faults.append(fault)
    if faults:
        raise KernelError("; ".join(faults))
    file.unlink(missing_ok=True)
    return count


def _read(file: Path) -> dict[str, str]:
    """What is remembered; nothing where that cannot be read: then it is as on a fresh node."""
    try:
        data = json.loads(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    known = data.items() if isinstance(data, dict) else ()
    # Keys become paths: nothing but settings of the network may be named.
    texts = {k: str(v) for k, v in known if k.startswith("net/") and ".." not in k}
    return {k: v for k, v in texts.items() if v.isascii()}
