"""The router outside the cluster: FRR in a namespace of its own, which speaks eBGP with every node.

Owns its configuration, the start of its daemons and what is asked of it. It waits for nodes, learns what they
announce and announces nothing. Its daemons go into the background; `lab down` finds them by their namespace.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netpol.lab import processes
from netpol.lab.plan import ROUTER_ASN, LabPlan, NodePlan
from netpol.lib.errors import KernelMissingError, NoAnswerError
from routes.options import DEFAULT_ASN

Obj = dict[str, Any]

#: Where Debian's package has the daemons.
_DAEMON_DIR = Path("/usr/lib/frr")
_DAEMONS = ("zebra", "bgpd")
_USER = "frr"
_TIMEOUT_S = 20.0


def missing() -> str | None:
    """Return why no FRR can be started here, or None."""
    wanted = [*(str(_DAEMON_DIR / name) for name in _DAEMONS), "vtysh"]
    absent = [program for program in wanted if shutil.which(program) is None]
    return f"no {', '.join(absent)}" if absent else None


def config(plan: LabPlan) -> str:
    """Return FRR's configuration: nodes of every segment may call, over IPv4, for both families."""
    families = ("ipv4", "ipv6")[: 2 if plan.dual_stack else 1]
    lines = [
        f"router bgp {ROUTER_ASN}",
        f" bgp router-id {plan.router_addresses(0)[0]}",
        " no bgp default ipv4-unicast",
        " no bgp ebgp-requires-policy",
        " neighbor NODES peer-group",
        f" neighbor NODES remote-as {DEFAULT_ASN}",
        *(
            f" bgp listen range {plan.segment_cidrs(segment)[0]} peer-group NODES"
            for segment in range(plan.subnets)
        ),
    ]
    for family in families:
        lines += [
            f" address-family {family} unicast",
            "  neighbor NODES activate",
            "  maximum-paths 16",
            " exit-address-family",
        ]
    return "\n".join(lines) + "\n"


def peers_yaml(plan: LabPlan, node: NodePlan) -> str:
    """Return the peers file of a node's agent: the router, as it is in the node's own segment."""
    address = plan.router_addresses(node.segment)[0]
    return json.dumps([{"address": address, "asn": ROUTER_ASN}]) + "\n"


def start(plan: LabPlan, env: Mapping[str, str]) -> None:
    """Start the daemons in the router's namespace; returns when they run.

    Raises:
        KernelMissingError: There is no FRR.
        NoAnswerError: A daemon does not start.
    """
    if (fault := missing()) is not None:
        raise KernelMissingError("--router frr", needed="FRR (Debian package frr)", got=fault)
    folder = plan.router_dir
    folder.mkdir(parents=True, exist_ok=True)
    shutil.chown(folder, _USER, _USER)
    folder.chmod(0o755)
    for name in _DAEMONS:
        file = folder / f"{name}.conf"
        processes.replace_text(file, config(plan) if name == "bgpd" else "")
        shutil.chown(file, _USER, _USER)
        _run(
            plan,
            str(_DAEMON_DIR / name),
            *("-d", "--vty_socket", str(folder), "-z", str(folder / "zserv.api")),
            *("-i", str(folder / f"{name}.pid"), "-f", str(file)),
            *("--log", f"file:{folder / name}.log", "--log-level", "warnings"),
            env=env,
        )


def learnt(plan: LabPlan) -> set[str]:
    """Return the blocks that the router's kernel has from BGP.

    Raises:
        NoAnswerError: They cannot be read.
    """
    found: set[str] = set()
    for family in ("-4", "-6"):
        text = _run(plan, "ip", "-j", family, "route", "show", "proto", "bgp")
        found |= {str(route["dst"]) for route in json.loads(text or "[]")}
    return found


def describe(plan: LabPlan) -> Obj:
    """Return the router's state for `lab status`."""
    state: Obj = {
        "netns": plan.router_netns,
        "asn": ROUTER_ASN,
        "addresses": [address for s in range(plan.subnets) for address in plan.router_addresses(s)],
        "sessions": [],
        "routes": [],
        "problem": "",
    }
    try:
        peers = json.loads(vtysh(plan, "show bgp ipv4 unicast summary json")).get("peers") or {}
        state["routes"] = sorted(learnt(plan))
    except (NoAnswerError, ValueError) as error:
        return state | {"problem": str(error)}
    names = {address: node.name for node in plan.nodes for address in node.addresses}
    state["sessions"] = [
        {"peer": names.get(address, address), "address": address, "state": peer.get("state")}
        for address, peer in sorted(peers.items())
    ]
    return state


def vtysh(plan: LabPlan, command: str) -> str:
    """Ask FRR something.

    Raises:
        NoAnswerError: It does not answer.
    """
    return _run(plan, "vtysh", "--vty_socket", str(plan.router_dir), "-c", command)


def _run(plan: LabPlan, *command: str, env: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            ["ip", "netns", "exec", plan.router_netns, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=dict(env) if env is not None else None,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswerError(f"router: {command[0]}", got=str(error)) from error
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[:300]
        raise NoAnswerError(f"router: {command[0]}", got=words or f"exit code {done.returncode}")
    return done.stdout
