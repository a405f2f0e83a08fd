"""IPVS as bytes of generic netlink, both ways, and as the text of /proc. No sockets.

Numbers are those of linux/ip_vs.h. pyroute2's message classes take 2.8 ms for a message here, and read
the forwarding method, the persistence and the flags back as constants; these take microseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton
from typing import assert_never

from netpol.kernel.netlink import NLA_F_NESTED, NLM_F_DUMP, Message, attributes, nla
from netpol.kernel.netlink_batch import Request
from netpol.model.ids import PORT_PROTOCOLS, PROTOCOL_NUMBERS
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    ForwardMethod,
    IpvsOp,
    RealConfig,
    RealServer,
    RealState,
    ServerId,
    SetReal,
    SetServer,
    VirtualServer,
)
from netpol.model.net import Family

FAMILY_NAME = "IPVS"
_VERSION = 1

# Commands.
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_SET_CONFIG, _GET_CONFIG = 12, 13
# Attributes of a message.
_SERVICE, _DEST, _TIMEOUT_TCP, _TIMEOUT_TCP_FIN, _TIMEOUT_UDP = 1, 2, 4, 5, 6
# Attributes of a service.
_AF, _PROTOCOL, _ADDR, _PORT, _FWMARK, _SCHED_NAME, _FLAGS, _TIMEOUT, _NETMASK, _PE_NAME = (
    *(1, 2, 3, 4, 5),
    *(6, 7, 8, 9, 11),
)
# Attributes of a real server.
_D_ADDR, _D_PORT, _D_FWD, _D_WEIGHT, _D_UPPER, _D_LOWER = 1, 2, 3, 4, 5, 6
_D_ACTIVE, _D_INACTIVE, _D_PERSISTENT, _D_AF = 7, 8, 9, 11

_FWD_MASK = 0x7
_F_PERSISTENT, _F_HASHED = 0x1, 0x2
#: A flag that no server of ours has: read where a server has settings that we never make (a part of an
#: address for persistence, a persistence engine), so that it equals no wanted one and is set again.
FLAG_FOREIGN = 1 << 31

_GENL = struct.Struct("=BBH")
_AF_OF: dict[Family, int] = {Family.V4: AF_INET, Family.V6: AF_INET6}
_FAMILY_OF: dict[int, Family] = {AF_INET: Family.V4, AF_INET6: Family.V6}
_PROTOCOL_OF = {PROTOCOL_NUMBERS[p]: p for p in PORT_PROTOCOLS}
_PROTOCOL_NAMED = {p.value: p for p in PORT_PROTOCOLS}
_FORWARD_NAMED = {
    "Masq": ForwardMethod.NAT,
    "Local": ForwardMethod.LOCAL,
    "Tunnel": ForwardMethod.TUNNEL,
    "Route": ForwardMethod.ROUTE,
    "Bypass": ForwardMethod.BYPASS,
}

#: SERVICE with AF, PROTOCOL, ADDR (always 16 bytes) and PORT; or with AF and FWMARK.
_BY_ADDRESS = struct.Struct("=HH HHHxx HHHxx HH16s HH2sxx")
_BY_MARK = struct.Struct("=HH HHHxx HHI")
#: All of a real server: ADDR, PORT, FWD, WEIGHT, both thresholds, family. The kernel wants all of it.
_WHOLE_DEST = struct.Struct("=HH HH16s HH2sxx HHI HHI HHI HHI HHHxx")
_NAMED_DEST = struct.Struct("=HH HH16s HH2sxx HHHxx")


def genl(command: int, attributes_: bytes = b"") -> bytes:
    """Pack the generic header of a command, and what follows it."""
    return _GENL.pack(command, _VERSION, 0) + attributes_


# -- requests -----------------------------------------------------------------------------------


def request_of(op: IpvsOp, kind: int) -> Request:
    """The request of an operation; `kind` is the number that this kernel gives to IPVS."""
    match op:
        case AddServer(server):
            return Request(kind, 0, _whole_service(_NEW_SERVICE, server))
        case SetServer(server):
            return Request(kind, 0, _whole_service(_SET_SERVICE, server))
        case DeleteServer(id_):
            return Request(kind, 0, genl(_DEL_SERVICE, _service(id_)))
        case AddReal(id_, real, config):
            return Request(kind, 0, genl(_NEW_DEST, _service(id_) + _whole_dest(real, config)))
        case SetReal(id_, real, config):
            return Request(kind, 0, genl(_SET_DEST, _service(id_) + _whole_dest(real, config)))
        case DeleteReal(id_, real):
            address = real.address
            dest = _NAMED_DEST.pack(
                *(_NAMED_DEST.size, _DEST | NLA_F_NESTED, 20, _D_ADDR, address),
                *(6, _D_PORT, real.port.to_bytes(2, "big")),
                *(6, _D_AF, AF_INET if len(address) == 4 else AF_INET6),
            )
            return Request(kind, 0, genl(_DEL_DEST, _service(id_) + dest))
        case _:
            assert_never(op)


def list_servers(kind: int) -> Request:
    """Ask for all virtual servers, without their real servers."""
    return Request(kind, NLM_F_DUMP, genl(_GET_SERVICE))


def get_server(kind: int, server: ServerId) -> Request:
    """Ask for one virtual server; ESRCH where there is none."""
    return Request(kind, 0, genl(_GET_SERVICE, _service(server)))


def list_reals(kind: int, server: ServerId) -> Request:
    """Ask for the real servers of a virtual server; none where there is no such server."""
    return Request(kind, NLM_F_DUMP, genl(_GET_DEST, _service(server)))


def set_timeouts(kind: int, timeouts_s: tuple[int, int, int]) -> Request:
    """Set the timeouts (TCP, TCP after FIN, UDP) that are not 0."""
    kinds = (_TIMEOUT_TCP, _TIMEOUT_TCP_FIN, _TIMEOUT_UDP)
    wanted = [nla(k, struct.pack("=I", t)) for k, t in zip(kinds, timeouts_s, strict=True) if t]
    return Request(kind, 0, genl(_SET_CONFIG, b"".join(wanted)))


def get_timeouts(kind: int) -> Request:
    """Ask for the timeouts."""
    return Request(kind, 0, genl(_GET_CONFIG))


@lru_cache(maxsize=1024)
def _service(server: ServerId) -> bytes:
    """A virtual server by its name alone: operations on its real servers stand together."""
    af = _AF_OF[server.family]
    if server.protocol is None:
        return _BY_MARK.pack(
            _BY_MARK.size, _SERVICE | NLA_F_NESTED, 6, _AF, af, 8, _FWMARK, server.fwmark
        )
    return _BY_ADDRESS.pack(
        *(_BY_ADDRESS.size, _SERVICE | NLA_F_NESTED, 6, _AF, af),
        *(6, _PROTOCOL, PROTOCOL_NUMBERS[server.protocol]),
        *(20, _ADDR, server.address, 6, _PORT, server.port.to_bytes(2, "big")),
    )


def _whole_service(command: int, server: VirtualServer) -> bytes:
    flags = server.flags & ~FLAG_FOREIGN
    if server.persistence_s:
        flags |= _F_PERSISTENT
    # All of the client's address counts for persistence. IPv4 takes a mask, IPv6 a length.
    netmask = b"\xff\xff\xff\xff" if server.id.family is Family.V4 else struct.pack("=I", 128)
    attributes_ = b"".join(
        (
            _service(server.id)[4:],
            nla(_SCHED_NAME, server.scheduler.encode() + b"\0"),
            # The mask says which flags are meant: all, so that those go that are not wanted.
            nla(_FLAGS, struct.pack("=II", flags, 0xFFFFFFFF)),
            nla(_TIMEOUT, struct.pack("=I", server.persistence_s)),
            nla(_NETMASK, netmask),
        )
    )
    return genl(command, nla(_SERVICE | NLA_F_NESTED, attributes_))


def _whole_dest(real: RealServer, config: RealConfig) -> bytes:
    address = real.address
    return _WHOLE_DEST.pack(
        *(_WHOLE_DEST.size, _DEST | NLA_F_NESTED, 20, _D_ADDR, address),
        *(6, _D_PORT, real.port.to_bytes(2, "big"), 8, _D_FWD, config.forward),
        *(8, _D_WEIGHT, config.weight & 0xFFFFFFFF, 8, _D_UPPER, 0, 8, _D_LOWER, 0),
        *(6, _D_AF, AF_INET if len(address) == 4 else AF_INET6),
    )


# -- answers ------------------------------------------------------------------------------------


def server_of(message: Message) -> VirtualServer | None:
    """The virtual server that a message tells; None for a protocol that no Service has (AH, ESP)."""
    found = _attributes(message, _SERVICE)
    family = _FAMILY_OF.get(_u16(found[_AF]))
    if family is None:
        return None
    if _FWMARK in found and _u32(found[_FWMARK]):
        id_ = ServerId.by_mark(family, _u32(found[_FWMARK]))
    else:
        protocol = _PROTOCOL_OF.get(_u16(found[_PROTOCOL]))
        if protocol is None:
            return None
        address = bytes(found[_ADDR][: family.bits // 8])
        id_ = ServerId(family, protocol, address, int.from_bytes(found[_PORT][:2], "big"))
    flags = _u32(found[_FLAGS])
    persistence_s = _u32(found[_TIMEOUT]) if flags & _F_PERSISTENT else 0
    own = flags & ~(_F_PERSISTENT | _F_HASHED)
    whole = 0xFFFFFFFF if family is Family.V4 else 128
    if _PE_NAME in found or (persistence_s and _u32(found[_NETMASK]) != whole):
        own |= FLAG_FOREIGN
    scheduler = bytes(found[_SCHED_NAME]).rstrip(b"\0").decode(errors="replace")
    return VirtualServer(id_, scheduler, own, persistence_s)


def real_of(message: Message) -> tuple[RealServer, RealState]:
    """The real server that a message tells."""
    found = _attributes(message, _DEST)
    # Kernels before 3.18 do not tell the family: it is the virtual server's, whose address is 16 bytes too.
    size = 4 if _D_AF in found and _u16(found[_D_AF]) == AF_INET else 16
    real = RealServer(bytes(found[_D_ADDR][:size]), int.from_bytes(found[_D_PORT][:2], "big"))
    weight = struct.unpack_from("=i", found[_D_WEIGHT])[0]
    config = RealConfig(weight, ForwardMethod(_u32(found[_D_FWD]) & _FWD_MASK))
    counts = (_u32(found[kind]) for kind in (_D_ACTIVE, _D_INACTIVE, _D_PERSISTENT))
    return real, RealState(config, *counts)


def timeouts_of(message: Message) -> tuple[int, int, int]:
    """The timeouts that a message tells: TCP, TCP after FIN, UDP."""
    found = dict(attributes(message.payload[_GENL.size :]))
    return _u32(found[_TIMEOUT_TCP]), _u32(found[_TIMEOUT_TCP_FIN]), _u32(found[_TIMEOUT_UDP])


def _attributes(message: Message, outer: int) -> dict[int, memoryview]:
    for kind, value in attributes(message.payload[_GENL.size :]):
        if kind == outer:
            return dict(attributes(value))
    return {}


def _u16(value: memoryview) -> int:
    number: int = struct.unpack_from("=H", value)[0]
    return number


def _u32(value: memoryview) -> int:
    number: int = struct.unpack_from("=I", value)[0]
    return number


# -- the text of /proc/net/ip_vs ----------------------------------------------------------------


def reals_by_server(
    lines: Iterable[bytes],
) -> Iterator[tuple[ServerId, dict[RealServer, RealState]]]:
    """The real servers of each virtual server by address; those by mark say too little of themselves.

    Netlink lists real servers of one virtual server alone, at three system calls each; the file has them
    all. It does not tell connections of persistence (those count as 0 here), and no flags. What cannot be
    read is left out: the caller asks netlink for what is not here.
    """
    server: ServerId | None = None
    reals: dict[RealServer, RealState] = {}
    for line in lines:
        if line.startswith(b"  -> "):
            if server is not None:
                try:
                    _, endpoint, forward, weight, active, inactive = line.split()
                    config = _config(forward, weight)
                    reals[_real(endpoint)] = RealState(config, int(active), int(inactive))
                except (ValueError, KeyError):
                    server = None
            continue
        if server is not None:
            yield server, reals
        server, reals = _server_line(line), {}
    if server is not None:
        yield server, reals


def _server_line(line: bytes) -> ServerId | None:
    protocol, _, rest = line.decode("ascii", "replace").partition(" ")
    if protocol not in _PROTOCOL_NAMED:
        return None
    try:
        address, port = _real(rest.split()[0].encode())
    except (ValueError, IndexError):
        return None
    family = Family.V4 if len(address) == 4 else Family.V6
    return ServerId(family, _PROTOCOL_NAMED[protocol], address, port)


@lru_cache(maxsize=256)
def _config(forward: bytes, weight: bytes) -> RealConfig:
    return RealConfig(int(weight), _FORWARD_NAMED[forward.decode()])


def _real(endpoint: bytes) -> RealServer:
    """Read `0A600001:0050` or `[fd00:...]:0050`."""
    address, _, port = endpoint.decode().rpartition(":")
    if address.startswith("["):
        return RealServer(_v6(address[1:-1]), int(port, 16))
    packed = bytes.fromhex(address)
    if len(packed) != 4:
        raise ValueError(address)
    return RealServer(packed, int(port, 16))


def _v6(text: str) -> bytes:
    # The file writes all eight groups (NIP6 with %pI6); inet_pton reads any form, and fast.
    return inet_pton(AF_INET6, text)
