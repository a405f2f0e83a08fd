"""A small world and packets in it, for the audit tests."""

import struct

from netpol.kernel.nflog import NflogMessage
from netpol.model.flow import Flow
from netpol.model.ids import Direction, ObjectKey, Protocol
from netpol.model.labels import EVERYTHING, Operator, Requirement, labels, selector
from netpol.model.net import parse_address, parse_prefix
from netpol.model.objects import ContainerPort, Endpoint, Namespace, Node
from netpol.model.policy import BlockPeer, CompiledPolicy, PodPeer, PolicyRule, PortRange
from netpol.policy.evaluate import evaluate
from netpol.policy.world import World
from netpol.render.logprefix import DropReason, LogPrefix, encode

INGRESS = encode(LogPrefix(DropReason.DENIED, Direction.INGRESS, "abcdefghij"))
EGRESS = encode(LogPrefix(DropReason.DENIED, Direction.EGRESS, "klmnopqrst"))
HELD = encode(LogPrefix(DropReason.HELD, Direction.INGRESS))
SPOOFED = encode(LogPrefix(DropReason.SPOOFED))

WEB, API, DB = "10.244.0.10", "10.244.1.11", "10.244.1.12"


def pod(name, address, **have):
    return Endpoint(
        key=ObjectKey("shop", name),
        uid=f"uid-{name}",
        labels=labels({"app": name, **have}),
        node="node1",
        addresses=(parse_address(address),),
        ports=(ContainerPort("", Protocol.TCP, 5432),),
    )


def app(name):
    return selector([Requirement("app", Operator.IN, (name,))])


def policy(name, subject, *rules, direction=Direction.INGRESS):
    mine = direction is Direction.INGRESS
    return CompiledPolicy(
        key=ObjectKey("shop", name),
        uid=f"uid-{name}",
        subject=subject,
        isolates=frozenset({direction}),
        ingress=rules if mine else (),
        egress=() if mine else rules,
    )


def block(cidr):
    return BlockPeer(parse_prefix(cidr), (), (parse_prefix(cidr),))


TCP_5432 = (PortRange(Protocol.TCP, 5432, 5432),)
DB_POLICY = policy(
    "db",
    app("db"),
    PolicyRule((block("192.168.0.0/16"),), (PortRange(Protocol.TCP, 22, 22),)),
    PolicyRule((PodPeer("shop", app("api")),), TCP_5432),
)
DENY_ALL = policy("deny-all", EVERYTHING)


def world(*policies):
    return World.build(
        namespaces=[Namespace(name="shop")],
        pods=[pod("web", WEB), pod("api", API), pod("db", DB)],
        policies=policies,
        nodes=[Node(name="node1", addresses=(parse_address("192.168.5.1"),))],
    )


class Judge:
    """The world as the agent would hand it to the audit: replaceable, with a generation."""

    def __init__(self, *policies):
        self.world, self.generation, self.asked = world(*policies), 1, 0

    def replace(self, *policies):
        self.world, self.generation = world(*policies), self.generation + 1

    def party(self, address):
        return self.world.party(address)

    def resolve(self, flow: Flow):
        self.asked += 1
        return evaluate(self.world, flow)


def payload(src, dst, *, protocol=6, sport=40000, dport=5432, rest=None):
    a, b = parse_address(src), parse_address(dst)
    body = struct.pack("!HH", sport, dport) if rest is None else rest
    if len(a) == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, protocol, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, 64)
    return head + a + b + body + bytes(16)


def message(src, dst, *, prefix=INGRESS, timestamp_us=1_700_000_000_000_001, indev=2, **how):
    return NflogMessage(
        family=2,
        hw_protocol=0x0800,
        hook=2,
        prefix=prefix,
        payload=payload(src, dst, **how),
        timestamp_us=timestamp_us,
        indev=indev,
        outdev=3,
        seq=0,
    )
