"""Kernel settings under /proc/sys: read, write, and keep at a value."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys")

#: Whether bridged packets pass iptables at all (br_netfilter); at 0 pods of one node meet no policy.
BRIDGE_NF_KEYS = (
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
)


def read_sysctl(key: str, *, root: Path = _ROOT) -> str | None:
    """The value of a key such as net/ipv4/ip_forward; None where the kernel has no such key."""
    try:
        return (root / key).read_text(encoding="ascii").strip()
    except OSError:
        return None


def keep_sysctl(key: str, value: str, *, root: Path = _ROOT) -> str | None:
    """Make a key have a value; returns why it does not, or None.

    An absent key is no fault: without br_netfilter there are no bridged pods to miss.
    """
    have = read_sysctl(key, root=root)
    if have is None or have == value:
        return None
    try:
        (root / key).write_text(value, encoding="ascii")
    except OSError as e:
        return f"sysctl {key.replace('/', '.')}: needed {value}, got {have} ({e.strerror})"
    return None
