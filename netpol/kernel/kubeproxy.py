"""kube-proxy beside us: whether one runs, and the removal of what one left in the kernel.

It knows the names that kube-proxy gives to things in all its modes. What kubelet makes under the same
prefix is kubelet's and stays.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pyroute2 import IPRoute, IPSet
from pyroute2.netlink.exceptions import NetlinkError

from netpol.kernel import netlink
from netpol.kernel.drivers import TableError, Variant
from netpol.kernel.tables import LOCK_WAIT_S, RUN_TIMEOUT_S, RestoreTables
from netpol.kernel.variant import saved_rules
from netpol.lib.errors import KernelError, KernelMissingError
from netpol.model.ids import Protocol
from netpol.model.net import FAMILIES, Family

#: Defaults of --healthz-bind-address and --metrics-bind-address.
HEALTH_PORT, METRICS_PORT = 10256, 10249
_ASK_TIMEOUT_S = 1.0
_BODY_MAX_BYTES = 4096

TABLES = ("nat", "filter", "mangle")
_PREFIX = "KUBE-"
#: kubelet's, which makes them again: the variant that it uses, and its guard of 127.0.0.0/8.
_KUBELETS = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-FIREWALL"})
_DUMMY_LINK = "kube-ipvs0"
_NFT_TABLE = b"kube-proxy\0"
#: What --proxy-mode can be, which is what /proxyMode answers.
_MODES = frozenset({"iptables", "ipvs", "nftables"})
#: Its IPVS mode's sets of ports that are served on the node's own addresses.
_NODE_PORT_SET = re.compile(r"KUBE-(6-)?NODE-PORT-(?:LOCAL-)?(TCP|UDP|SCTP)\b")

_CHAIN = re.compile(r"^:(\S+)", re.MULTILINE)
_TARGET = re.compile(r" -[jg] (\S+)")
_TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}
#: linux/netfilter.h: NFPROTO_IPV4 and NFPROTO_IPV6.
_NFPROTO = {Family.V4: 2, Family.V6: 10}
#: linux/netfilter/nfnetlink.h and nf_tables.h: batch frames, NFT_MSG_DELTABLE, NFTA_TABLE_NAME.
_BATCH_BEGIN, _BATCH_END, _DELTABLE, _TABLE_NAME = 16, 17, 10 << 8 | 2, 1
_NFNL_SUBSYS_NFTABLES, _NETLINK_NETFILTER = 10, 12
_ENOENT = 2


# -- one that runs ------------------------------------------------------------------------------


def running_kube_proxy(
    *, proc: Path = Path("/proc"), ports: tuple[int, int] = (HEALTH_PORT, METRICS_PORT)
) -> str | None:
    """What shows that a kube-proxy works in this network namespace, in words; None if nothing does.

    Blocking. A process is found only in the own pid namespace; a pod without hostPID has the ports.
    """
    pid = _process(proc)
    if pid is not None:
        return f"process {pid} is a kube-proxy"
    health, metrics = ports
    said = _ask(health, "/healthz")
    if said is not None and "lastUpdated" in said:
        return f"a service proxy answers on port {health} (kube-proxy's /healthz)"
    mode = (_ask(metrics, "/proxyMode") or "").strip()
    if mode in _MODES:
        return f"a kube-proxy in mode {mode} answers on port {metrics} (its metrics)"
    return None


def _process(proc: Path) -> int | None:
    try:
        ours = os.stat(proc / "thread-self/ns/net").st_ino  # noqa: PTH116 - one call, as below
    except OSError:
        return None
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if not _is_kube_proxy(entry):
                continue
            # A zombie has no namespace any more.
            if os.stat(entry / "ns/net").st_ino == ours:  # noqa: PTH116
                return int(entry.name)
        except OSError:
            continue  # it ended meanwhile
    return None


def _is_kube_proxy(entry: Path) -> bool:
    """By its name, or as a subcommand of a binary that holds several (hyperkube)."""
    if (entry / "comm").read_text(errors="replace").strip() == "kube-proxy":
        return True
    words = (entry / "cmdline").read_bytes().split(b"\0")
    names = [w.rpartition(b"/")[2] for w in words[:2]]
    return names[:1] == [b"kube-proxy"] or names == [b"hyperkube", b"kube-proxy"]


def _ask(port: int, path: str) -> str | None:
    """The body of a GET on loopback whatever the status, if it is not 404; None without an answer."""
    for host in ("127.0.0.1", "::1"):
        connection = http.client.HTTPConnection(host, port, timeout=_ASK_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(_BODY_MAX_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
        return None if answer.status == 404 else body
    return None


def leftover_chains() -> int:
    """How many chains of a kube-proxy stand in this namespace's tables; they do no harm. Blocking."""
    found = (
        name
        for lines in saved_rules().values()
        for line in lines
        if (match := _CHAIN.match(line)) and _is_theirs(name := match[1])
    )
    return sum(1 for _ in found)


def _is_theirs(chain: str) -> bool:
    return chain.startswith(_PREFIX) and chain not in _KUBELETS


# -- removal ------------------------------------------------------------------------------------


class IpvsTraces(NamedTuple):
    """What tells virtual servers of its IPVS mode from others'.

    Attributes:
        addresses: those on its dummy link.
        node_ports: what it serves on the node's own addresses, by its sets.
    """

    addresses: frozenset[bytes]
    node_ports: frozenset[tuple[Family, Protocol, int]]


def ipvs_traces() -> IpvsTraces:
    """Read what a kube-proxy left that tells its virtual servers from others'. Blocking."""
    with IPRoute() as route:
        links = route.link_lookup(ifname=_DUMMY_LINK)
        texts = [a.get("IFA_ADDRESS") for index in links for a in route.get_addr(index=index)]
    return IpvsTraces(_addresses(texts), frozenset(_node_ports()))


def _node_ports() -> Iterator[tuple[Family, Protocol, int]]:
    try:
        with IPSet() as sets:
            names = [str(s.get("IPSET_ATTR_SETNAME")) for s in sets.list()]
            for match in filter(None, map(_NODE_PORT_SET.match, names)):
                family = Family.V6 if match[1] else Family.V4
                for part in sets.list(match.string):
                    members = part.get_attr("IPSET_ATTR_ADT")
                    for member in members.get_attrs("IPSET_ATTR_DATA") if members else ():
                        yield (
                            family,
                            Protocol(match[2]),
                            int(member.get_attr("IPSET_ATTR_PORT_FROM")),
                        )
    except (NetlinkError, OSError):
        return  # a kernel without ipset has no set


@dataclass(slots=True)
class Removed:
    """What was removed, and what could not be, in words."""

    chains: int = 0
    jumps: int = 0
    sets: int = 0
    links: int = 0
    tables: int = 0
    left: list[str] = field(default_factory=list)


def remove_leftovers() -> Removed:
    """Remove chains, jumps, sets, the dummy link and nftables' table of a kube-proxy. Blocking.

    Virtual servers of IPVS are the caller's, and come first: sets and link tell which are its.
    """
    done = Removed()
    for variant in Variant:
        driver = RestoreTables(variant)
        for family in FAMILIES:
            for table in TABLES:
                _clean(driver, table, family, done)
    _remove_nft_tables(done)
    _remove_sets(done)  # which rules referred to
    _remove_link(done)
    return done


def removal_text(saved: str, table: str) -> tuple[str, int, int]:
    """The transaction that removes kube-proxy's part of a saved table; how many chains and jumps.

    The text is "" where there is nothing. Jumps from anybody's chains go: what they lead to goes too.
    """
    chains = [name for name in _CHAIN.findall(saved) if _is_theirs(name)]
    if not chains:
        return "", 0, 0
    gone = frozenset(chains)
    jumps = [
        line
        for line in saved.splitlines()
        if line.startswith("-A ")
        and line.split(" ", 2)[1] not in gone
        and any(target in gone for target in _TARGET.findall(line))
    ]
    lines = [
        f"*{table}",
        *(f":{name} - [0:0]" for name in chains),  # empties it
        *(f"-D {line.removeprefix('-A ')}" for line in jumps),
        *(f"-X {name}" for name in chains),
        "COMMIT",
    ]
    return "\n".join(lines) + "\n", len(chains), len(jumps)


def _clean(driver: RestoreTables, table: str, family: Family, done: Removed) -> None:
    where = f"table {table}, IPv{family}, {driver.variant}"
    try:
        text, chains, jumps = removal_text(driver.save_text(table, family), table)
        if text:
            _restore(driver.variant, family, text)
    except (TableError, KernelMissingError) as e:
        done.left.append(f"{where}: {e}")
        return
    done.chains += chains
    done.jumps += jumps


def _restore(variant: Variant, family: Family, text: str) -> None:
    tool = f"{_TOOLS[family]}-{variant}-restore"
    try:
        ended = subprocess.run(
            [tool, "--noflush", "--wait", str(LOCK_WAIT_S)],
            input=text,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
            timeout=RUN_TIMEOUT_S,
        )
    except FileNotFoundError as e:
        raise KernelMissingError(f"running {tool}", needed="the iptables package") from e
    except subprocess.TimeoutExpired as e:
        raise TableError(f"{tool} did not end in time", retryable=True) from e
    if ended.returncode:
        said = " ".join(ended.stderr.split())
        raise TableError(f"{tool} refused", retryable=False, got=said)


def _remove_nft_tables(done: Removed) -> None:
    """By netlink: the nft program is needed for nothing else, and may not be there."""
    for family in FAMILIES:
        try:
            done.tables += _delete_nft_table(family)
        except OSError as e:
            done.left.append(f"nftables table kube-proxy, IPv{family}: {e.strerror or e}")


def _delete_nft_table(family: Family) -> int:
    """Whether there was one."""
    request, ack = netlink.NLM_F_REQUEST, netlink.NLM_F_ACK
    # nfgenmsg.res_id of a batch's frames is the subsystem, in network order, at their last two bytes.
    begin, end = (
        netlink.message(kind, request, seq, b"")[:-2] + _NFNL_SUBSYS_NFTABLES.to_bytes(2, "big")
        for kind, seq in ((_BATCH_BEGIN, 1), (_BATCH_END, 3))
    )
    name = netlink.nla(_TABLE_NAME, _NFT_TABLE)
    delete = netlink.message(_DELTABLE, request | ack, 2, name, family=_NFPROTO[family])
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_ASK_TIMEOUT_S)
        sock.send(begin + delete + end)
        for message in netlink.messages(sock.recv(1 << 16)):
            if message.type != netlink.NLMSG_ERROR:
                continue
            code = netlink.error_code(message.payload)
            if code == _ENOENT:
                return 0
            if code:
                raise OSError(code, os.strerror(code))
    return 1


def _remove_sets(done: Removed) -> None:
    """The sets of its IPVS mode."""
    try:
        with IPSet() as sets:
            names = [str(s.get("IPSET_ATTR_SETNAME")) for s in sets.list()]
            for name in sorted(n for n in names if n.startswith(_PREFIX)):
                try:
                    sets.destroy(name)
                    done.sets += 1
                except NetlinkError as e:
                    done.left.append(f"set {name}: {os.strerror(e.code)}")
    except (NetlinkError, OSError):
        return  # a kernel without ipset has no set


def _remove_link(done: Removed) -> None:
    try:
        with IPRoute() as route:
            for index in route.link_lookup(ifname=_DUMMY_LINK):
                route.link("del", index=index)
                done.links += 1
    except NetlinkError as e:
        raise KernelError(f"link {_DUMMY_LINK}", got=os.strerror(e.code)) from e


def _addresses(texts: Iterable[str | None]) -> frozenset[bytes]:
    from netpol.model.net import parse_address

    return frozenset(parse_address(t) for t in texts if t and not t.startswith("fe80:"))
