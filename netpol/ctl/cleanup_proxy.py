"""The service proxy's part of `netpol-ctl cleanup`: servers of IPVS, the dummy link, kernel settings.

Ours is what the agent's rule says is ours: what stands on our link, and what the ledger names. Where IPVS is
not loaded there is nothing of it, and it is not loaded to look.
"""

from __future__ import annotations

from pathlib import Path

from netpol.kernel.drivers import IpvsDriver
from netpol.kernel.kept_sysctls import FILE as SYSCTLS_FILE
from netpol.kernel.kept_sysctls import restore_sysctls
from netpol.lib.errors import NetpolError
from netpol.model.ipvs import DeleteServer, ServerId

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
        removed["sysctls"] = restore_sysctls(run_dir / SYSCTLS_FILE)
    except NetpolError as e:
        left.append(str(e))
    return removed


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
    named = ledger_servers(ledger_file, left)
    count = 0
    if _IPVS.exists():
        from netpol.kernel.ipvs_table import NetlinkIpvs

        ipvs = NetlinkIpvs()
        try:
            ours = [i for i in ipvs.dump() if i in named or i.address in on_link]
            count = delete_servers(ipvs, ours, left)
        except NetpolError as e:
            left.append(str(e))
        finally:
            ipvs.close()
    if not left:
        ledger_file.unlink(missing_ok=True)
    return count


def ledger_servers(ledger_file: Path, left: list[str]) -> frozenset[ServerId]:
    """The servers that the ledger names as ours."""
    from proxy.ledger import parse

    try:
        return frozenset(parse(ledger_file.read_bytes()).ours)
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as e:
        left.append(f"{ledger_file}: {e}: only servers on our own link were removed")
        return frozenset()


def delete_servers(ipvs: IpvsDriver, servers: list[ServerId], left: list[str]) -> int:
    """Delete virtual servers; returns how many went."""
    failures = ipvs.apply([DeleteServer(i) for i in servers])
    left += [f"{f.op}: errno {f.code}" for f in failures]
    return len(servers) - len(failures)
