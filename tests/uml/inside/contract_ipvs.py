"""What every IpvsDriver does, as checks of an empty table; run on the fake, and on the guest's kernel."""

from __future__ import annotations

import errno
from collections.abc import Callable

from netpol.kernel.drivers import IpvsDriver
from netpol.model.ids import PORT_PROTOCOLS, Protocol
from netpol.model.ipvs import (
    SCHED_FLAG_1,
    SCHED_FLAG_2,
    AddReal,
    AddServer,
    DeleteReal,
    DeleteServer,
    ForwardMethod,
    IpvsFailure,
    RealConfig,
    RealServer,
    RealState,
    ServerId,
    ServerState,
    SetReal,
    SetServer,
    VirtualServer,
)
from netpol.model.net import FAMILIES, Family, parse_address

Check = Callable[[IpvsDriver], None]

V4, V6 = parse_address("10.96.0.1"), parse_address("fd00:10:96::1")
BACKEND4, BACKEND6 = parse_address("10.244.1.20"), parse_address("fd00:10:244:1::20")
WEB = ServerId(Family.V4, Protocol.TCP, V4, 80)
WEB6 = ServerId(Family.V6, Protocol.TCP, V6, 80)
REAL, OTHER = RealServer(BACKEND4, 8080), RealServer(BACKEND4, 8081)


def real_of(family: Family, host: int = 0, port: int = 8080) -> RealServer:
    base = BACKEND4 if family is Family.V4 else BACKEND6
    return RealServer(base[:-1] + bytes([base[-1] + host]), port)


def check_empty(ipvs: IpvsDriver) -> None:
    assert ipvs.dump() == {}
    assert ipvs.read([WEB]) == {}
    assert ipvs.apply([]) == ()


def check_all_kinds_come_back(ipvs: IpvsDriver) -> None:
    """Protocols, families, marks, ports of two bytes."""
    ids = [
        ServerId(family, protocol, address, port)
        for family, address in ((Family.V4, V4), (Family.V6, V6))
        for protocol in PORT_PROTOCOLS
        for port in (1, 0x1234, 65535)
    ]
    ids += [ServerId.by_mark(family, mark) for family in FAMILIES for mark in (0x100, 0xFFF00)]
    wanted = {
        id_: ServerState(
            VirtualServer(id_, "rr"),
            {real_of(id_.family, n, 0x1234 + n): RealState(RealConfig(n)) for n in range(3)},
        )
        for id_ in ids
    }
    ops = [
        op
        for id_, state in wanted.items()
        for op in (
            AddServer(state.server),
            *(AddReal(id_, real, held.config) for real, held in state.reals.items()),
        )
    ]
    assert ipvs.apply(ops) == ()
    assert ipvs.dump() == wanted
    assert ipvs.read(ids) == wanted
    assert ipvs.read(ids[3:5]) == {id_: wanted[id_] for id_ in ids[3:5]}
    assert ipvs.apply([DeleteServer(id_) for id_ in ids]) == ()
    assert ipvs.dump() == {}


def check_settings_of_servers(ipvs: IpvsDriver) -> None:
    """Schedulers, their flags, persistence; each is set, set to something else, and unset."""
    for id_ in (WEB, WEB6, ServerId.by_mark(Family.V6, 0x200)):
        for n, (scheduler, flags, persistence_s) in enumerate(
            (
                ("rr", 0, 0),
                ("sh", SCHED_FLAG_1 | SCHED_FLAG_2, 0),
                ("mh", SCHED_FLAG_2, 10800),
                ("wrr", 0, 1),
                ("nq", 0, 86400),
                ("lc", 0, 0),
            )
        ):
            server = VirtualServer(id_, scheduler, flags, persistence_s)
            assert ipvs.apply([SetServer(server) if n else AddServer(server)]) == ()
            assert ipvs.read([id_]) == {id_: ServerState(server, {})}
            assert ipvs.dump()[id_].server == server


def check_every_scheduler(ipvs: IpvsDriver) -> None:
    names = ("rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh")
    servers = [
        VirtualServer(ServerId(Family.V4, Protocol.UDP, V4, n), name)
        for n, name in enumerate(names, 1)
    ]
    assert ipvs.apply([AddServer(server) for server in servers]) == ()
    assert {state.server for state in ipvs.dump().values()} == set(servers)


def check_a_change_of_the_server_keeps_its_reals(ipvs: IpvsDriver) -> None:
    ipvs.apply([AddServer(VirtualServer(WEB)), AddReal(WEB, REAL, RealConfig(3))])
    changed = VirtualServer(WEB, "wrr", persistence_s=60)
    assert ipvs.apply([SetServer(changed)]) == ()
    assert ipvs.dump() == {WEB: ServerState(changed, {REAL: RealState(RealConfig(3))})}


def check_settings_of_reals(ipvs: IpvsDriver) -> None:
    for id_ in (WEB, WEB6):
        real = real_of(id_.family)
        ipvs.apply([AddServer(VirtualServer(id_))])
        for n, config in enumerate(
            (
                RealConfig(1),
                RealConfig(0),
                RealConfig(65535),
                RealConfig(7, ForwardMethod.TUNNEL),
                RealConfig(7, ForwardMethod.NAT),
            )
        ):
            assert ipvs.apply([(SetReal if n else AddReal)(id_, real, config)]) == ()
            assert ipvs.read([id_])[id_].reals == {real: RealState(config)}
            assert ipvs.dump()[id_].reals == {real: RealState(config)}
        assert ipvs.apply([DeleteReal(id_, real)]) == ()
        assert ipvs.dump()[id_].reals == {}


def check_refusals(ipvs: IpvsDriver) -> None:
    """What is there twice, what is not there, what cannot be; each with its number."""
    web, config = VirtualServer(WEB), RealConfig(1)
    elsewhere = ServerId(Family.V4, Protocol.TCP, V4, 81)
    ops = [
        AddServer(web),
        AddReal(WEB, REAL, config),
        AddServer(web),
        AddReal(WEB, REAL, config),
        AddServer(VirtualServer(elsewhere, "nonesuch")),
        SetServer(VirtualServer(WEB, "nonesuch")),
        SetServer(VirtualServer(elsewhere)),
        DeleteServer(elsewhere),
        AddReal(elsewhere, REAL, config),
        SetReal(elsewhere, REAL, config),
        DeleteReal(elsewhere, REAL),
        SetReal(WEB, OTHER, config),
        DeleteReal(WEB, OTHER),
        AddReal(WEB, OTHER, RealConfig(-1)),
        AddReal(WEB, real_of(Family.V6), config),
        DeleteServer(ServerId.by_mark(Family.V4, 9)),
    ]
    codes = [
        *(0, 0, errno.EEXIST, errno.EEXIST, errno.ENOENT, errno.ENOENT),
        *[errno.ESRCH] * 5,
        *(errno.ENOENT, errno.ENOENT, errno.ERANGE, errno.EINVAL, errno.ESRCH),
    ]
    wanted = tuple(IpvsFailure(op, code) for op, code in zip(ops, codes, strict=True) if code)
    assert ipvs.apply(ops) == wanted
    assert ipvs.dump() == {WEB: ServerState(web, {REAL: RealState(config)})}


def check_a_refusal_stops_nothing(ipvs: IpvsDriver) -> None:
    """More operations than one batch holds, some refused in each; the order is kept."""
    ids = [ServerId(Family.V4, Protocol.TCP, V4, port) for port in range(1, 301)]
    ops = []
    for n, id_ in enumerate(ids):
        ops.append(AddServer(VirtualServer(id_, "nonesuch" if n % 50 == 7 else "rr")))
        # First to what is not there in every fiftieth, which must be refused and nothing else.
        ops.append(AddReal(id_, REAL, RealConfig(n)))
    failures = ipvs.apply(ops)
    bad = ids[7::50]
    assert [(f.op, f.code) for f in failures] == [
        pair
        for op in ops
        if (op.server.id if isinstance(op, AddServer) else op.id) in bad
        for pair in [(op, errno.ENOENT if isinstance(op, AddServer) else errno.ESRCH)]
    ]
    assert set(ipvs.dump()) == set(ids) - set(bad)


def check_everything_refused(ipvs: IpvsDriver) -> None:
    """More refusals than a small receive buffer would hold."""
    ops = [DeleteServer(ServerId(Family.V6, Protocol.TCP, V6, port)) for port in range(1, 1001)]
    assert ipvs.apply(ops) == tuple(IpvsFailure(op, errno.ESRCH) for op in ops)


def check_order(ipvs: IpvsDriver) -> None:
    """The same server again and again in one call."""
    server, config = VirtualServer(WEB), RealConfig(1)
    ops = [
        AddServer(server),
        AddReal(WEB, REAL, config),
        SetReal(WEB, REAL, RealConfig(5)),
        DeleteReal(WEB, REAL),
        AddReal(WEB, OTHER, config),
        DeleteServer(WEB),
        AddServer(VirtualServer(WEB, "lc")),
        AddReal(WEB, REAL, RealConfig(2)),
    ]
    assert ipvs.apply(ops) == ()
    wanted = ServerState(VirtualServer(WEB, "lc"), {REAL: RealState(RealConfig(2))})
    assert ipvs.dump() == {WEB: wanted}


def check_many_are_read(ipvs: IpvsDriver) -> None:
    """More than one batch of questions, most of them about what is not there."""
    ids = [ServerId(Family.V4, Protocol.UDP, V4, port) for port in range(1, 301)]
    there = ids[5::7]
    ipvs.apply(
        [
            op
            for id_ in there
            for op in (AddServer(VirtualServer(id_)), AddReal(id_, REAL, RealConfig(id_.port)))
        ]
    )
    found = ipvs.read(ids)
    assert list(found) == there
    for id_, state in found.items():
        assert state == ServerState(VirtualServer(id_), {REAL: RealState(RealConfig(id_.port))})


def check_many_reals(ipvs: IpvsDriver) -> None:
    """Real servers that no single datagram of an answer holds."""
    for id_ in (WEB, WEB6, ServerId.by_mark(Family.V4, 0x300)):
        reals = [real_of(id_.family, port=port) for port in range(1, 501)]
        ops = [AddServer(VirtualServer(id_)), *(AddReal(id_, r, RealConfig(1)) for r in reals)]
        assert ipvs.apply(ops) == ()
        assert set(ipvs.read([id_])[id_].reals) == set(reals)
        assert set(ipvs.dump()[id_].reals) == set(reals)


def check_timeouts(ipvs: IpvsDriver) -> None:
    before = ipvs.timeouts()
    ipvs.set_timeouts(tcp_s=7200, tcp_fin_s=0, udp_s=30)
    assert ipvs.timeouts() == (7200, before.tcp_fin_s, 30)
    ipvs.set_timeouts(tcp_s=0, tcp_fin_s=77, udp_s=0)
    assert ipvs.timeouts() == (7200, 77, 30)


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
