"""What the kernel's IPVS serves now, whoever told it to: read from /proc/net/ip_vs, changed by nobody here.

IPVS tells nobody when its table changes, so that this is read again and again; the text of the file is
the cheapest form that the kernel has (a netlink dump of services and their real servers takes a request
for each service). Decides nothing: what policy makes of a service is `netpol.enforce.served`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from netpol.lib.errors import KernelError, NoAnswerError
from netpol.model.ids import Protocol
from netpol.model.ruleset import AddressPort

#: Of the calling thread's network namespace.
PROC_FILE = Path("/proc/thread-self/net/ip_vs")
#: Whether packets that IPVS sends on stay in conntrack; exists only where IPVS does (CONFIG_IP_VS_NFCT).
CONNTRACK_KEY = "net/ipv4/vs/conntrack"

#: Lines that could not be read are kept for a message; more than these say nothing new.
_STRANGE_MAX = 5
_PROTOCOLS = {str(p): p for p in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)}


class Forward(StrEnum):
    """How IPVS sends a packet on, in the file's words (ip_vs_fwd_name)."""

    NAT = "Masq"
    ROUTE = "Route"
    TUNNEL = "Tunnel"
    LOCAL = "Local"
    BYPASS = "Bypass"


class RealServer(NamedTuple):
    """Where a service's packets go; the port does not matter to anybody here."""

    address: bytes
    forward: Forward


@dataclass(slots=True)
class IpvsTable:
    """The services of one network namespace, both families.

    Attributes:
        services: each with its distinct real servers, which may be none.
        fwmarks: services that are known by a packet mark, which no address tells.
        strange: lines that could not be read; what they speak of is not in `services`.
    """

    services: dict[AddressPort, frozenset[RealServer]] = field(default_factory=dict)
    fwmarks: int = 0
    strange: tuple[str, ...] = ()


def read_ipvs(path: Path = PROC_FILE) -> IpvsTable | None:
    """Read the table; None where the kernel has no IPVS (or not yet: it is a module).

    Raises:
        KernelError: there is one and it cannot be read.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    except PermissionError as e:
        raise NoAnswerError(f"reading {path}", needed="root") from e
    except OSError as e:
        raise KernelError(f"reading {path}", got=e.strerror or str(e)) from e
    return parse_ipvs(text.splitlines())


def parse_ipvs(lines: Iterable[str]) -> IpvsTable:
    """Read the file's lines; what is not understood is put aside, and nothing is guessed from it."""
    table = IpvsTable()
    strange: list[str] = []
    service: AddressPort | None = None
    real: set[RealServer] = set()

    def finish() -> None:
        if service is not None:
            # The kernel walks its table while it changes: a service may be shown twice.
            table.services[service] = table.services.get(service, frozenset()) | real

    for line in lines:
        words = line.split()
        if not words or words[0] in ("IP", "Prot") or words[1:2] == ["RemoteAddress:Port"]:
            continue
        try:
            if words[0] == "->":
                real.add(_real_server(words[1], words[2]))
                continue
            finish()
            service, real = None, set()
            if words[0] == "FWM":
                table.fwmarks += 1
                continue
            address, port = _endpoint(words[1])
            service = AddressPort(address, _PROTOCOLS[words[0]], port)
        except (ValueError, IndexError, KeyError):
            strange.append(line.strip())
            if words[0] == "->":
                service = None  # a service of which not everything is known is not known
    finish()
    table.strange = tuple(strange[:_STRANGE_MAX])
    return table


@lru_cache(maxsize=16384)
def _real_server(endpoint: str, forward: str) -> RealServer:
    return RealServer(_endpoint(endpoint)[0], Forward(forward))


def _endpoint(text: str) -> tuple[bytes, int]:
    """Read `0A600001:0050` or `[fd00:...]:0050`; the port is hexadecimal in both."""
    address, colon, port = text.rpartition(":")
    if not colon or len(port) != 4:
        raise ValueError(text)
    if address.startswith("[") and address.endswith("]"):
        return ipaddress.IPv6Address(address[1:-1]).packed, int(port, 16)
    if len(address) != 8:
        raise ValueError(text)
    return bytes.fromhex(address), int(port, 16)
