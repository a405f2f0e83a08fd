"""What the proxy part asks of the machine: drivers, other proxies, the way to the API server."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from errno import ENOENT
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from pyroute2 import IPRoute

from netpol.config import Settings, service_address_fault
from netpol.kernel.conntrack import NetlinkFlows
from netpol.kernel.drivers import CreateSet, SetTransaction, TableTransaction, Variant
from netpol.kernel.dsr import SYSCTLS_FILE as DIRECT_SYSCTLS_FILE
from netpol.kernel.dsr import PodTunnels, lacking
from netpol.kernel.ipvs import CONNTRACK_KEY
from netpol.kernel.ipvs_table import NetlinkIpvs
from netpol.kernel.kubeproxy import leftover_chains, running_kube_proxy
from netpol.kernel.netns import in_new_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.sysctl import read_sysctl
from netpol.kernel.tables import RestoreTables
from netpol.kernel.vips import DummyVips
from netpol.lib.errors import InputError, KernelMissingError, NetpolError, NoAnswerError
from netpol.model.ids import SERVICES, ChainName, Protocol
from netpol.model.ipvs import AddServer, ServerId, VirtualServer
from netpol.model.net import FAMILIES, Family, parse_address
from netpol.model.ruleset import InPort, Return, Rule
from proxy import names, rules
from proxy.apply import Drivers

_log = structlog.get_logger("netpol")

#: How often default routes are looked up; a gateway changes with the network.
GATEWAYS_EVERY_S = 30.0


def kernel_drivers(variant: Variant, *, mark_mask: int) -> Drivers:
    """Drivers of this network namespace that see what is the proxy's alone.

    Tables are always written by iptables-restore: the rules do not change with Services, and the library for
    legacy tables may be used by one thread only, which is policy's.

    Raises:
        KernelMissingError: the kernel has no IPVS.
    """
    return Drivers(
        ipvs=NetlinkIpvs(),
        vips=DummyVips(),
        sets=NetlinkSets(mark_mask=mark_mask, owner=SERVICES),
        tables=RestoreTables(variant, owner=SERVICES),
        flows=NetlinkFlows(),
        eyes=NetlinkIpvs(),
    )


def missing_for_proxy(
    variant: Variant, *, mark_mask: int, scheduler: str = "rr"
) -> dict[Family, list[str]]:
    """What this machine lacks of what the proxy needs, in words; all of it is tried for real.

    In a network namespace of its own, which has no traffic and is gone afterwards. Blocking. A scheduler that
    a Service names is tried with that Service, whose error it is.

    Args:
        variant: of iptables.
        mark_mask: the field of packet marks.
        scheduler: of all Services that name none.
    """

    def probe() -> dict[Family, list[str]]:
        both = list(_lacking(mark_mask))
        lacking = {
            # Rules name sets.
            f: both or [*_lacking_servers(f, scheduler), *_lacking_rules(variant, f, mark_mask)]
            for f in FAMILIES
        }
        return {family: found for family, found in lacking.items() if found}

    return in_new_netns(probe)


def _lacking(mark_mask: int) -> Iterator[str]:
    try:
        NetlinkIpvs().close()
    except NetpolError as e:
        yield str(e)
    else:
        if read_sysctl(CONNTRACK_KEY) is None:
            yield str(KernelMissingError("IPVS", needed="CONFIG_IP_VS_NFCT", got="none"))
    vips = DummyVips()
    try:
        vips.apply(add=[b"\xc0\x00\x02\x01"], remove=[])
    except NetpolError as e:
        yield str(e)
    finally:
        vips.close()
    sets = NetlinkSets(mark_mask=mark_mask, owner=SERVICES)
    try:
        sets.apply(SetTransaction(tuple(CreateSet(spec) for spec in names.SPECS.values())))
    except NetpolError as e:
        yield str(e)
    finally:
        sets.close()


def _lacking_servers(family: Family, scheduler: str) -> Iterator[str]:
    address = parse_address("192.0.2.1" if family is Family.V4 else "2001:db8::1")
    server = VirtualServer(ServerId(family, Protocol.TCP, address, 80), scheduler)
    ipvs = NetlinkIpvs()
    try:
        for _, code in ipvs.apply([AddServer(server)]):
            got = f"no module ip_vs_{scheduler}" if code == ENOENT else os.strerror(code)
            yield f"IPVS: needed IPv{family.value} and the scheduler {scheduler}; got {got}"
    finally:
        ipvs.close()


def _lacking_rules(variant: Variant, family: Family, mark_mask: int) -> Iterator[str]:
    tables = RestoreTables(variant, owner=SERVICES)
    for (table, of), ruleset in rules.rulesets(rules.RuleOptions(mark_mask)).items():
        if of is not family:
            continue
        try:
            tables.apply(
                TableTransaction(table, family, replace=ruleset.chains, hooks=ruleset.hooks)
            )
        except NetpolError as e:
            yield str(e)


def pod_tunnels(settings: Settings) -> PodTunnels:
    """What makes ends of tunnels in this node's pods."""
    return PodTunnels(Path(settings.netns_dir), Path(settings.run_dir) / DIRECT_SYSCTLS_FILE)


def missing_for_direct_return(variant: Variant, *, judged: bool) -> str:
    """What this machine lacks of what direct server return needs, in words, or "". Blocking.

    Args:
        variant: of iptables.
        judged: whether policy looks at answers, by a match of its own.
    """

    def probe() -> str:
        if judged:
            chain = {ChainName("KNP-PROBE"): (Rule(Return(), (InPort("probe"),)),)}
            try:
                RestoreTables(variant).apply(TableTransaction("mangle", Family.V4, replace=chain))
            except NetpolError as e:
                return str(e)
        return lacking()

    return in_new_netns(probe)


async def refuse_another_proxy() -> None:
    """Two service proxies on one node undo each other.

    Raises:
        NoAnswerError: a kube-proxy runs.
    """
    found = await asyncio.to_thread(running_kube_proxy)
    if found is not None:
        raise NoAnswerError(
            "--proxy beside a kube-proxy", needed="a node without a running kube-proxy", got=found
        )
    left = await asyncio.to_thread(leftover_chains)
    if left:
        _log.warning(
            "a kube-proxy left rules, which do no harm", chains=left, remove="cleanup --kube-proxy"
        )


async def server_addresses(settings: Settings, url: str) -> tuple[bytes, ...]:
    """The addresses behind the API server's URL.

    Raises:
        InputError: one of them is a Service's, which works only once the proxy does.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, parts.port or 443, type=socket.SOCK_STREAM
        )
    except OSError as e:
        # A name server may be away for a while; the connection is tried again and again as well.
        _log.warning("the API server's name is not known", host=host, error=str(e))
        return ()
    addresses = tuple(sorted({parse_address(str(info[4][0]).partition("%")[0]) for info in found}))
    fault = service_address_fault(settings, url, addresses)
    if fault is not None:
        raise InputError(fault)
    return addresses


async def watch_gateways(found: Callable[[Iterable[bytes]], None]) -> None:
    """Tell the next hops of default routes, now and then, until cancelled."""
    with ThreadPoolExecutor(1, thread_name_prefix="gateways") as pool:
        while True:
            gateways = await asyncio.get_running_loop().run_in_executor(pool, default_gateways)
            found(gateways)
            await asyncio.sleep(GATEWAYS_EVERY_S)


def default_gateways() -> set[bytes]:
    """The next hops of this namespace's default routes. Blocking; not in a thread with an event loop."""
    out: set[bytes] = set()
    with IPRoute() as route:
        for family in (socket.AF_INET, socket.AF_INET6):
            for each in route.get_default_routes(family=family):
                hops = [each, *(each.get("RTA_MULTIPATH") or ())]
                texts = (hop.get("RTA_GATEWAY") for hop in hops)
                out |= {parse_address(text) for text in texts if text}
    return out
