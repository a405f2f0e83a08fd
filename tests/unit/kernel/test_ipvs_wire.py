"""IPVS as bytes and text: what is written is what is read, and what cannot be read is nobody's."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netpol.kernel import ipvs_wire as wire
from netpol.kernel.netlink import Message, attributes, messages, nla
from netpol.model.ids import PORT_PROTOCOLS, Protocol
from netpol.model.ipvs import (
    AddReal,
    AddServer,
    ForwardMethod,
    RealConfig,
    RealServer,
    ServerId,
    VirtualServer,
)
from netpol.model.net import FAMILIES, Family, parse_address

PORTS = st.integers(0, 65535)


@st.composite
def ids(draw: st.DrawFn) -> ServerId:
    family = draw(st.sampled_from(FAMILIES))
    if draw(st.booleans()):
        return ServerId.by_mark(family, draw(st.integers(1, 0xFFFFFFFF)))
    size = family.bits // 8
    address = draw(st.binary(min_size=size, max_size=size))
    return ServerId(family, draw(st.sampled_from(PORT_PROTOCOLS)), address, draw(PORTS))


def as_message(body: bytes) -> Message:
    return Message(0, 0, 0, memoryview(body))


@given(
    id_=ids(),
    scheduler=st.sampled_from(("rr", "wlc", "lblcr")),
    flags=st.sampled_from((0, 0x8, 0x18, 0x38)),
    persistence_s=st.sampled_from((0, 1, 10800)),
)
def test_a_server_is_read_as_it_was_written(
    id_: ServerId, scheduler: str, flags: int, persistence_s: int
) -> None:
    server = VirtualServer(id_, scheduler, flags, persistence_s)
    assert wire.server_of(as_message(wire.request_of(AddServer(server), 30).body)) == server


@given(
    id_=ids(),
    address=st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16),
    port=PORTS,
    weight=st.integers(0, 0x7FFFFFFF),
    forward=st.sampled_from(ForwardMethod),
)
def test_a_real_server_is_written_whole(
    id_: ServerId, address: bytes, port: int, weight: int, forward: ForwardMethod
) -> None:
    op = AddReal(id_, RealServer(address, port), RealConfig(weight, forward))
    body = wire.request_of(op, 30).body
    dest = next(value for kind, value in attributes(memoryview(body)[4:]) if kind == 2)
    # What only the kernel says: connections, active, inactive and of persistence.
    said = b"".join(nla(kind, struct.pack("=I", kind)) for kind in (7, 8, 9))
    answer = struct.pack("=BBH", 5, 1, 0) + nla(2, bytes(dest) + said)
    real, state = wire.real_of(as_message(answer))
    assert (real, state.config) == (op.real, op.config)
    assert (state.active, state.inactive, state.persistent) == (7, 8, 9)


def told(*attributes_: bytes, family: int = 2) -> VirtualServer | None:
    """A server as the kernel tells it, with some attributes changed."""
    service = b"".join(
        (
            nla(1, struct.pack("=H", family)),
            nla(2, struct.pack("=H", 6)),
            nla(3, bytes([10, 96, 0, 1]).ljust(16, b"\0")),
            nla(4, b"\0\x50"),
            nla(6, b"rr\0"),
            nla(7, struct.pack("=II", 0x2, 0xFFFFFFFF)),
            nla(8, struct.pack("=I", 0)),
            nla(9, b"\xff\xff\xff\xff"),
            *attributes_,
        )
    )
    return wire.server_of(as_message(wire.genl(1, nla(1, service))))


def test_a_plain_server() -> None:
    id_ = ServerId(Family.V4, Protocol.TCP, bytes([10, 96, 0, 1]), 80)
    assert told() == VirtualServer(id_)


@pytest.mark.parametrize(
    "changed",
    [
        (nla(11, b"sip\0"),),
        (
            nla(7, struct.pack("=II", 0x3, 0xFFFFFFFF)),
            nla(8, struct.pack("=I", 60)),
            nla(9, b"\xff\xff\xff\0"),
        ),
        (nla(7, struct.pack("=II", 0x6, 0xFFFFFFFF)),),
    ],
    ids=["persistence engine", "persistence of a network", "one packet"],
)
def test_settings_that_are_never_ours_equal_none_of_ours(changed: tuple[bytes, ...]) -> None:
    found = told(*changed)
    assert found is not None
    assert found not in (
        VirtualServer(found.id, "rr", 0, persistence_s) for persistence_s in (0, 60)
    )


def test_a_server_that_nobody_can_name_is_left_out() -> None:
    assert told(nla(2, struct.pack("=H", 50))) is None  # ESP
    assert told(family=16) is None


TEXT = b"""\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
FWM  00000100 rr
  -> 0AF40114:1F90      Masq    1      0          0
TCP  0A600001:0050 rr persistent 10800 FFFFFFFF
  -> 0AF40115:1F90      Tunnel  0      2          3
  -> 0AF40114:1F90      Masq    1      0          0
UDP  [fd00:0010:0096:0000:0000:0000:0000:0001]:0035 wlc
  -> [fd00:0010:0244:0001:0000:0000:0000:0014]:14E9      Masq    7      0          1
SCTP 0A600002:0050 rr
TCP  0A600003:0050 rr
  -> 0AF40115:1F90      Novel   0      2          3
TCP  nonsense rr
  -> 0AF40115:1F90      Masq    0      2          3
TCP  0A600004:0050 rr
"""


def test_the_file_tells_real_servers() -> None:
    found = dict(wire.reals_by_server(TEXT.splitlines()))
    web = ServerId(Family.V4, Protocol.TCP, bytes([10, 96, 0, 1]), 80)
    dns = ServerId(Family.V6, Protocol.UDP, parse_address("fd00:10:96::1"), 53)
    empty = ServerId(Family.V4, Protocol.SCTP, bytes([10, 96, 0, 2]), 80)
    last = ServerId(Family.V4, Protocol.TCP, bytes([10, 96, 0, 4]), 80)
    # Left out: one by mark, one with a word that is new, one that cannot be read.
    assert found.keys() == {web, dns, empty, last}
    assert [(r.address[-1], s.config, s.active, s.inactive) for r, s in found[web].items()] == [
        (0x15, RealConfig(0, ForwardMethod.TUNNEL), 2, 3),
        (0x14, RealConfig(1), 0, 0),
    ]
    ((real, state),) = found[dns].items()
    assert real == (parse_address("fd00:10:244:1::14"), 5353)
    assert (state.config, state.inactive) == (RealConfig(7), 1)
    assert found[empty] == found[last] == {}


def test_requests_are_whole_messages() -> None:
    """Lengths add up for every kind, or the kernel would read one into the other."""
    id_ = ServerId(Family.V6, Protocol.SCTP, bytes(16), 1)
    for op in (
        AddServer(VirtualServer(id_, "mh")),
        AddReal(id_, RealServer(bytes(4), 1), RealConfig()),
    ):
        request = wire.request_of(op, 30)
        frame = struct.pack("=IHHII", 16 + len(request.body), 30, 1, 7, 0) + request.body
        assert len(frame) % 4 == 0
        ((kind, _flags, seq, payload),) = messages(frame)
        assert (kind, seq, len(payload)) == (30, 7, len(request.body))
        assert sum((len(v) + 7) & ~3 for _, v in attributes(payload[4:])) == len(payload) - 4
