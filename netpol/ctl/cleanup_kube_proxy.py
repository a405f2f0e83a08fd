"""`netpol-ctl cleanup --kube-proxy`: removes what a kube-proxy left on this node, in all its modes.

Also while netpol's agent runs, since that is when it is wanted: kube-proxy is gone, netpol serves, and the
old rules shall go. What is netpol's is not touched, nor what nobody can tell whose it is: of IPVS's
servers only those on kube-proxy's link go, and those whose ports its sets name.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netpol.ctl.cleanup_proxy import LEDGER_FILE
from netpol.ctl.output import emit, plural, remark
from netpol.lib.errors import NetpolError, NoAnswerError
from netpol.model.ipvs import DeleteServer, ServerId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from netpol.kernel.kubeproxy import IpvsTraces
    from proxy.ledger import Ledger

_IPVS = Path("/proc/thread-self/net/ip_vs")


def run(args: argparse.Namespace) -> int:
    """Remove; refused while a kube-proxy runs, since it would write everything again."""
    from netpol.kernel.kubeproxy import ipvs_traces, remove_leftovers, running_kube_proxy

    found = None if args.force else running_kube_proxy()
    # netpol's own proxy answers on the same port, and may go on.
    if found is not None and not _is_netpols(args.socket, found):
        raise NoAnswerError(
            "a kube-proxy would write everything again",
            needed="it stopped, or --force",
            got=found,
        )
    # First: what tells whose they are goes after them.
    traces = ipvs_traces()
    servers = _clean_servers(traces, Path(args.run_dir)) if any(traces) and _IPVS.exists() else 0
    done = remove_leftovers()
    if done.left:
        raise NoAnswerError("not all of it could be removed", got="; ".join(done.left))
    removed: dict[str, Any] = {
        "chains": done.chains,
        "jumps": done.jumps,
        "sets": done.sets,
        "links": done.links,
        "tables": done.tables,
        "servers": servers,
    }
    what = ", ".join(plural(n, k[:-1]) for k, n in removed.items() if n)
    text = f"removed of kube-proxy: {what}" if what else "nothing of kube-proxy here"
    emit({"removed": removed}, text, form=args.output)
    return 0


def _is_netpols(socket: str, found: str) -> bool:
    """Whether what answers is netpol's own proxy."""
    from netpol.admin import client

    if found.startswith("process "):
        return False
    try:
        status = client.call(socket, "status", timeout_s=2.0)
    except NetpolError:
        return False
    return isinstance(status, dict) and "proxy" in (status.get("rooms") or {})


def _clean_servers(traces: IpvsTraces, run_dir: Path) -> int:
    """Delete its virtual servers; how many there were.

    Raises:
        NoAnswerError: it cannot be told which those are, or some of them stay; nothing else is removed then.
    """
    from netpol.kernel.ipvs_table import NetlinkIpvs
    from netpol.kernel.links import own_addresses
    from netpol.kernel.vips import DummyVips

    vips = DummyVips()
    try:
        on_link = vips.dump()
    finally:
        vips.close()
    ledger = read_whole_ledger(run_dir / LEDGER_FILE, there_is_link=on_link is not None)
    ipvs = NetlinkIpvs()
    try:
        others = [i for i in ipvs.dump() if not ledger.owns(i, on_link or frozenset())]
        gone, unclear = theirs(others, traces, own=own_addresses())
        failures = ipvs.apply([DeleteServer(i) for i in gone])
    finally:
        ipvs.close()
    if failures:
        got = "; ".join(f"{f.op}: errno {f.code}" for f in failures)
        raise NoAnswerError("not all servers of IPVS could be removed", got=got)
    if unclear:
        remark(
            f"left alone: {plural(len(unclear), 'server')} of IPVS on the node's own addresses, which "
            "neither kube-proxy's sets nor netpol's ledger name"
        )
    return len(gone)


def theirs(
    servers: Iterable[ServerId], traces: IpvsTraces, *, own: Collection[bytes]
) -> tuple[list[ServerId], list[ServerId]]:
    """Of servers that are not netpol's: kube-proxy's, and those on addresses of the node that may be."""
    gone: list[ServerId] = []
    unclear: list[ServerId] = []
    for server in servers:
        if server.address in traces.addresses:
            gone.append(server)
        elif server.address in own and server.protocol is not None:
            at = (server.family, server.protocol, server.port)
            (gone if at in traces.node_ports else unclear).append(server)
    return gone, unclear


def read_whole_ledger(file: Path, *, there_is_link: bool) -> Ledger:
    """What netpol's agent knows of whose servers are.

    Raises:
        NoAnswerError: it cannot be read, or is not there although an agent has worked here.
    """
    from proxy.ledger import Ledger, parse

    try:
        return parse(file.read_bytes())
    except FileNotFoundError as e:
        if not there_is_link:
            return Ledger()
        needed, got = "--run-dir as the agent has it", f"no {file}"
        cause: Exception = e
    except (OSError, ValueError) as e:
        needed = "a ledger that can be read (an agent that starts writes it anew)"
        got, cause = f"{file}: {e}", e
    raise NoAnswerError(
        "servers of IPVS cannot be told from netpol's; nothing was removed", needed=needed, got=got
    ) from cause
