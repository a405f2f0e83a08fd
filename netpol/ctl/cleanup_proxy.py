"""The service proxy's part of `netpol-ctl cleanup`: servers of IPVS, the dummy link, kernel settings.

Ours is what the agent's rule says is ours (`proxy.ledger`): what the ledger names, and what stands on our
link and is not somebody else's. Where IPVS is not loaded nothing of it is there; it is not loaded to look.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from netpol.kernel.drivers import IpvsDriver
from netpol.kernel.kept_sysctls import FILE as SYSCTLS_FILE
from netpol.kernel.kept_sysctls import restore_sysctls
from netpol.kernel.netns import NETNS_DIR
from netpol.lib.errors import NetpolError
from netpol.model.ipvs import DeleteServer, ServerId

if TYPE_CHECKING:
    from proxy.ledger import Ledger

#: As the agent names it in its run folder.
LEDGER_FILE = "ipvs.ledger"
_IPVS = Path("/proc/thread-self/net/ip_vs")


def clean_proxy(run_dir: Path, left: list[str]) -> dict[str, int]:
    """Remove what the proxy made but rules and sets; how much. What stays is added to `left`."""
    removed = {"servers": 0, "links": 0, "sysctls": 0}
    on_link = _addresses()
    removed["servers"] = _clean_servers(run_dir / LEDGER_FILE, on_link or frozenset(), left)
    if on_link is not None:
        removed["links"] = _clean_link(left)
    try:
        _clean_pods(run_dir)
        removed["sysctls"] = restore_sysctls(run_dir / SYSCTLS_FILE)
    except NetpolError as e:
        left.append(str(e))
    return removed


def _clean_pods(run_dir: Path) -> None:
    """Remove the ends of direct server return from pods, and put back what let their answers in."""
    from netpol.kernel.dsr import SYSCTLS_FILE as FILE
    from netpol.kernel.dsr import PodTunnels

    PodTunnels(NETNS_DIR, run_dir / FILE).apply({})


def _addresses() -> frozenset[bytes] | None:
    from netpol.kernel.vips import DummyVips

    vips = DummyVips()
    try:
        return vips.dump()
    finally:
        vips.close()


def _clean_link(left: list[str]) -> int:
    from netpol.kernel.vips import DummyVips

    vips = DummyVips()
    try:
        vips.remove_link()
    except NetpolError as e:
        left.append(str(e))
        return 0
    finally:
        vips.close()
    return 1


def _clean_servers(ledger_file: Path, on_link: frozenset[bytes], left: list[str]) -> int:
    ledger = read_ledger(ledger_file, left)
    count = 0
    if _IPVS.exists():
        from netpol.kernel.ipvs_table import NetlinkIpvs

        ipvs = NetlinkIpvs()
        try:
            count = delete_ours(ipvs, ledger, on_link, left)
        except NetpolError as e:
            left.append(str(e))
        finally:
            ipvs.close()
    if not left:
        ledger_file.unlink(missing_ok=True)
    return count


def read_ledger(ledger_file: Path, left: list[str]) -> Ledger:
    """What the agent knew of whose servers are."""
    from proxy.ledger import Ledger, parse

    try:
        return parse(ledger_file.read_bytes())
    except FileNotFoundError:
        return Ledger()
    except (OSError, ValueError) as e:
        left.append(f"{ledger_file}: {e}: only servers on our own link were removed")
        return Ledger()


def delete_ours(
    ipvs: IpvsDriver, ledger: Ledger, on_link: frozenset[bytes], left: list[str]
) -> int:
    """Delete the servers that are ours, by the agent's own rule; returns how many went."""
    return delete_servers(ipvs, [i for i in ipvs.dump() if ledger.owns(i, on_link)], left)


def delete_servers(ipvs: IpvsDriver, servers: list[ServerId], left: list[str]) -> int:
    """Delete virtual servers; returns how many went."""
    failures = ipvs.apply([DeleteServer(i) for i in servers])
    left += [f"{f.op}: errno {f.code}" for f in failures]
    return len(servers) - len(failures)
