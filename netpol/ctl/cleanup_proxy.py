"""The service proxy's part of `netpol-ctl cleanup`: servers of IPVS, the dummy link, kernel settings.

Ours is what the agent's rule says is ours (`proxy.ledger`): what the ledger names, and what stands on our
link and is not somebody else's. Where IPVS is not loaded nothing of it is there; it is not loaded to look.

The order lets nobody reach the node's own ports by an address of a Service, and a cleanup that was killed
is finished by the next one: ports are shut, then servers go, then their addresses, then the ledger.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from netpol.kernel.drivers import (
    DeleteMembers,
    IpvsDriver,
    SetDriver,
    SetTransaction,
    VipDriver,
)
from netpol.kernel.kept_sysctls import FILE as SYSCTLS_FILE
from netpol.kernel.kept_sysctls import restore_sysctls
from netpol.kernel.netns import NETNS_DIR
from netpol.lib.errors import KernelMissingError, NetpolError
from netpol.model.ids import SERVICES
from netpol.model.ipvs import DeleteServer, ServerId
from netpol.model.net import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.ledger import Ledger

#: As the agent names it in its run folder.
LEDGER_FILE = "ipvs.ledger"
_IPVS = Path("/proc/thread-self/net/ip_vs")


class Kernel(NamedTuple):
    """What is cleaned; None for what this kernel does not have, or has not loaded."""

    vips: VipDriver
    ipvs: IpvsDriver | None
    sets: SetDriver | None


def clean_proxy(run_dir: Path, left: list[str]) -> dict[str, int]:
    """Remove what the proxy made but rules and sets; how much. What stays is added to `left`."""
    with _kernel() as kernel:
        removed = clean_services(kernel, run_dir / LEDGER_FILE, left)
    removed["sysctls"] = 0
    with _telling(left):
        _clean_pods(run_dir)
    with _telling(left):
        removed["sysctls"] = restore_sysctls(run_dir / SYSCTLS_FILE)
    return removed


def clean_services(kernel: Kernel, ledger_file: Path, left: list[str]) -> dict[str, int]:
    """Remove servers, addresses and the ledger; how much. What stays is added to `left`."""
    removed = {"servers": 0, "links": 0}
    on_link = kernel.vips.dump()
    known = len(left)
    ledger = read_ledger(ledger_file, left)
    if kernel.sets is not None and on_link is not None:
        with _telling(left):
            _shut_ports(kernel.sets)
    if kernel.ipvs is not None:
        with _telling(left):
            removed["servers"] = delete_ours(kernel.ipvs, ledger, on_link or frozenset(), left)
    if on_link is not None:
        with _telling(left):
            kernel.vips.remove_link()
            removed["links"] = 1
    if len(left) == known:
        ledger_file.unlink(missing_ok=True)
    return removed


@contextlib.contextmanager
def _telling(left: list[str]) -> Iterator[None]:
    """What cannot be removed does not keep the rest."""
    try:
        yield
    except NetpolError as e:
        left.append(str(e))


@contextlib.contextmanager
def _kernel() -> Iterator[Kernel]:
    from netpol.kernel.sets import NetlinkSets
    from netpol.kernel.vips import DummyVips

    with contextlib.ExitStack() as stack:
        vips = DummyVips()
        stack.callback(vips.close)
        ipvs: IpvsDriver | None = None
        if _IPVS.exists():
            from netpol.kernel.ipvs_table import NetlinkIpvs

            ipvs = NetlinkIpvs()
            stack.callback(ipvs.close)
        sets: SetDriver | None = None
        with contextlib.suppress(KernelMissingError):  # without ipset there is no set of ours
            sets = NetlinkSets(owner=SERVICES)
            stack.callback(sets.close)
        yield Kernel(vips, ipvs, sets)


def _shut_ports(sets: SetDriver) -> None:
    """Refuse what is dialled at addresses on our link: without a server it would be the node's own."""
    from proxy import names

    shut = [names.PORT[family].name for family in FAMILIES]
    there = sets.dump([name for name in shut if name in sets.headers()])
    ops = tuple(DeleteMembers(d.spec, list(d.members)) for d in there.values() if d.members)
    if ops:
        sets.apply(SetTransaction(ops))


def _clean_pods(run_dir: Path) -> None:
    """Remove the ends of direct server return from pods, and put back what let their answers in."""
    from netpol.kernel.dsr import SYSCTLS_FILE as FILE
    from netpol.kernel.dsr import PodTunnels

    PodTunnels(NETNS_DIR, run_dir / FILE).apply({})


def read_ledger(ledger_file: Path, left: list[str]) -> Ledger:
    """What the agent knew of whose servers are."""
    from proxy.ledger import Ledger, parse

    try:
        return parse(ledger_file.read_bytes())
    except FileNotFoundError:
        return Ledger()
    except (OSError, ValueError) as e:
        left.append(
            f"{ledger_file}: {e}: only servers on our own link were removed; NodePorts, and servers by "
            "mark, may be left (ipvsadm -Sn): remove them and the file by hand"
        )
        return Ledger()


def delete_ours(
    ipvs: IpvsDriver, ledger: Ledger, on_link: frozenset[bytes], left: list[str]
) -> int:
    """Delete the servers that are ours, by the agent's own rule; returns how many went."""
    ours: list[ServerId] = [i for i in ipvs.dump() if ledger.owns(i, on_link)]
    failures = ipvs.apply([DeleteServer(i) for i in ours])
    left += [f"{f.op}: errno {f.code}" for f in failures]
    return len(ours) - len(failures)
