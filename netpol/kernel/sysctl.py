"""Kernel settings under /proc/sys: read, write, and keep at a value."""

from __future__ import annotations

from pathlib import Path

from netpol.kernel.modules import load_module

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
    """Make a key have a value; returns why it does not, or None. An absent key is no fault."""
    have = read_sysctl(key, root=root)
    if have is None or have == value:
        return None
    try:
        (root / key).write_text(value, encoding="ascii")
    except OSError as e:
        return f"sysctl {key.replace('/', '.')}: needed {value}, got {have} ({e.strerror})"
    return None


def keep_bridge_nf(*, root: Path = _ROOT) -> list[str]:
    """Have bridged packets pass iptables; returns why they do not.

    Without br_netfilter pods of one bridge would meet no policy at all, so it is loaded, and its absence is
    a fault. Only for nodes whose pods are behind a bridge.
    """
    if read_sysctl(BRIDGE_NF_KEYS[0], root=root) is None:
        load_module("br_netfilter")
    faults = [f for key in BRIDGE_NF_KEYS if (f := keep_sysctl(key, "1", root=root)) is not None]
    if read_sysctl(BRIDGE_NF_KEYS[0], root=root) is None:
        faults.append(
            "the kernel has no br_netfilter (modprobe br_netfilter): pods of one bridge meet no policy"
        )
    return faults
