"""Which implementation of iptables this host uses, found out without creating anything.

kubelet leaves a chain in the variant it uses (KUBE-IPTABLES-HINT, before 1.24 KUBE-KUBELET-CANARY), and
agents are expected to follow it. Both variants' rules are evaluated, so a wrong guess would not open
anything, but it would leave two places where an operator has to look.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from netpol.kernel.drivers import Variant
from netpol.lib.errors import KernelMissingError

_HINTS = (":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY ")
#: The kernel's list of legacy tables; reading a table that is not in it would create it.
#: "thread-self", since "/proc/net" is the namespace of the process's first thread.
_LEGACY_TABLES = (
    Path("/proc/thread-self/net/ip_tables_names"),
    Path("/proc/thread-self/net/ip6_tables_names"),
)


def detect() -> Variant:
    """Follow kubelet's hint, else the variant with more rules, else the host's default.

    Raises:
        KernelMissingError: no iptables on this host.
    """
    saved = saved_rules()
    for variant, lines in saved.items():
        if any(line.startswith(_HINTS) for line in lines):
            return variant
    rules = {v: sum(line.startswith("-A") for line in lines) for v, lines in saved.items()}
    if rules[Variant.NFT] != rules[Variant.LEGACY]:
        return max(rules, key=lambda v: rules[v])
    return _default()


def saved_rules() -> dict[Variant, list[str]]:
    """Everybody's rules in every table that exists, as the save tools print them, by variant."""
    legacy_tables = {t for f in _LEGACY_TABLES for t in _lines(f)}
    return {
        Variant.NFT: _save("iptables-nft-save") + _save("ip6tables-nft-save"),
        Variant.LEGACY: (
            _save("iptables-legacy-save") + _save("ip6tables-legacy-save") if legacy_tables else []
        ),
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _save(tool: str) -> list[str]:
    try:
        done = subprocess.run([tool], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def _default() -> Variant:
    try:
        done = subprocess.run(
            ["iptables", "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError as e:
        raise KernelMissingError("iptables", needed="the iptables tools", got=str(e)) from e
    return Variant.NFT if "nf_tables" in done.stdout else Variant.LEGACY
