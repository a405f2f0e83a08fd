"""`netpol-ctl cleanup --kube-proxy`: removes what a kube-proxy left on this node, in all its modes.

Also while netpol's agent runs, since that is when it is wanted: kube-proxy is gone, netpol serves, and the
old rules shall go. What is netpol's is not touched.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from netpol.ctl.cleanup_proxy import LEDGER_FILE, delete_servers, read_ledger
from netpol.ctl.output import emit, plural
from netpol.lib.errors import NetpolError, NoAnswerError

_IPVS = Path("/proc/thread-self/net/ip_vs")


def run(args: argparse.Namespace) -> int:
    """Remove; refused while a kube-proxy runs, since it would write everything again."""
    from netpol.kernel.kubeproxy import remove_leftovers, running_kube_proxy

    found = None if args.force else running_kube_proxy()
    # netpol's own proxy answers on the same port, and may go on.
    if found is not None and not _is_netpols(args.socket, found):
        raise NoAnswerError(
            "a kube-proxy would write everything again",
            needed="it stopped, or --force",
            got=found,
        )
    done = remove_leftovers()
    servers = 0
    if done.links and _IPVS.exists():
        servers = _clean_servers(done.addresses, Path(args.run_dir), done.left)
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


def _clean_servers(on_link: frozenset[bytes], run_dir: Path, left: list[str]) -> int:
    """Virtual servers on its link, and on the node's own addresses (NodePorts); not netpol's."""
    from netpol.kernel.ipvs_table import NetlinkIpvs
    from netpol.kernel.links import own_addresses

    ours = read_ledger(run_dir / LEDGER_FILE, left).ours
    where = on_link | frozenset(own_addresses())
    ipvs = NetlinkIpvs()
    try:
        theirs = [i for i in ipvs.dump() if i.address in where and i not in ours]
        return delete_servers(ipvs, theirs, left)
    finally:
        ipvs.close()
