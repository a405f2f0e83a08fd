"""Who is asked for the proxy's rules, and what is there: data for the guest and the tests on the host."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import time
from typing import Any

from netpol.config import DEFAULT_SERVICE_MARK_MASK
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import Family, parse_address, parse_prefix
from proxy.rows import Action, Backend, Kind, ServiceRow
from tests.uml.inside import lan, traffic
from tests.uml.inside.steps import POD_DNS, POD_PORT, Ask

Json = dict[str, Any]

MASK = DEFAULT_SERVICE_MARK_MASK
OUTSIDER4, OUTSIDER6 = "172.18.0.9", "fd00:172:18::9"
REMOTE = "remote"
#: The node's address on the link to the other node, which masquerade takes.
TOWARDS_REMOTE = {Family.V4: "172.19.0.2", Family.V6: "fd00:172:19::2"}
NODE_PORTS = {"nodeport": 30080, "nodeport drop": 30081, "nodeport remote": 30082}
#: Where only the node listens, and where only another program's DNAT leads somewhere.
NODE_OWN, HOST_PORT = 9000, 8888


def address(name: str, family: Family) -> str:
    """Who is asked, by a short name."""
    return _ADDRESSES[name][0 if family is Family.V4 else 1]


_ADDRESSES = {
    "web": ("10.96.1.1", "fd00:10:96:1::1"),
    "far": ("10.96.1.2", "fd00:10:96:1::2"),
    "nobody": ("10.96.1.3", "fd00:10:96:1::3"),
    "host": ("10.96.1.4", "fd00:10:96:1::4"),
    "local": ("203.0.113.1", "2001:db8::1"),
    "drop": ("203.0.113.2", "2001:db8::2"),
    "ranges": ("203.0.113.3", "2001:db8::3"),
    "no range": ("203.0.113.4", "2001:db8::4"),
    "any range": ("203.0.113.5", "2001:db8::5"),
    "node": (lan.NODE4, lan.NODE6),
    "backend": (lan.v4(20), lan.v6(20)),
    "remote": ("10.244.2.20", "fd00:10:244:2::20"),
    "outsider": (OUTSIDER4, OUTSIDER6),
}


def _row(
    name: str,
    family: Family,
    port: int,
    *,
    to: str = "",
    locally: str | None = None,
    protocol: Protocol = Protocol.TCP,
    kind: Kind = Kind.CLUSTER_IP,
    ranges: tuple[str, ...] = (),
    action: Action = Action.FORWARD,
) -> ServiceRow:
    at = "node" if kind is Kind.NODE_PORT else name
    target = POD_DNS if protocol is Protocol.UDP else POD_PORT

    def backends(who: str) -> tuple[Backend, ...]:
        return (Backend(parse_address(address(who, family)), target),) if who else ()

    return ServiceRow(
        ObjectKey("a", name.replace(" ", "-")),
        f"{protocol.lower()}-{port}",
        kind,
        parse_address(address(at, family)),
        port,
        protocol,
        source_ranges=tuple(map(parse_prefix, ranges)),
        backends=backends(to),
        local_client_backends=backends(to if locally is None else locally),
        action=action,
    )


def rows(family: Family) -> list[ServiceRow]:
    """Every kind of row; local clients have the remote backend where theirs differ, so that it shows."""
    v4 = family is Family.V4
    udp, sctp = Protocol.UDP, Protocol.SCTP
    drop = Action.DROP
    local: Json = {"kind": Kind.EXTERNAL_IP, "locally": "remote"}
    balancer: Json = {"kind": Kind.LOAD_BALANCER, "to": "backend"}
    port: Json = {"kind": Kind.NODE_PORT}
    everybody = "0.0.0.0/0" if v4 else "::/0"
    some = (
        (f"{OUTSIDER4}/32", f"{lan.v4(10)}/32") if v4 else (f"{OUTSIDER6}/128", f"{lan.v6(10)}/128")
    )
    return [
        _row("web", family, 80, to="backend"),
        _row("web", family, 53, to="backend", protocol=udp),
        _row("web", family, 90, to="backend", protocol=sctp),
        _row("far", family, 80, to="remote"),
        _row("far", family, 53, to="remote", protocol=udp),
        _row("nobody", family, 80, action=Action.REJECT),
        _row("nobody", family, 53, protocol=udp, action=Action.REJECT),
        _row("host", family, 80, to="node"),
        _row("local", family, 80, to="backend", **local),
        _row("local", family, 53, to="backend", protocol=udp, **local),
        _row("drop", family, 80, action=drop, **local),
        _row("drop", family, 53, protocol=udp, action=drop, **local),
        _row("ranges", family, 80, ranges=some, **balancer),
        _row("no range", family, 80, ranges=("192.0.2.0/24" if v4 else "100::/64",), **balancer),
        _row("any range", family, 80, ranges=(everybody,), **balancer),
        _row("nodeport", family, NODE_PORTS["nodeport"], to="backend", **port),
        _row(
            "nodeport drop",
            family,
            NODE_PORTS["nodeport drop"],
            locally="remote",
            action=drop,
            **port,
        ),
        _row("nodeport remote", family, NODE_PORTS["nodeport remote"], to="remote", **port),
    ]


def questions(family: Family) -> dict[str, Ask]:
    """By "WHO to WHAT" and the family's number."""
    out: dict[str, Ask] = {}
    asked = [
        (name, row, protocol)
        for name in ("web", "far", "nobody", "local", "drop")
        for row, protocol in ((80, "tcp"), (53, "udp"))
    ]
    asked += [(name, 80, "tcp") for name in ("host", "ranges", "no range", "any range")]
    asked += [("web", 90, "sctp"), ("web", NODE_OWN, "tcp"), ("web", NODE_OWN, "udp")]
    asked += [("web", HOST_PORT, "tcp"), ("web", 53, "tcp")]
    for who, space in (("client", "client"), ("node", ""), (lan.OUTSIDER, lan.OUTSIDER)):
        for name, port, protocol in asked:
            words = f"{who} to {name} {protocol} {port}, IPv{family}"
            out[words] = Ask(space, address(name, family), port, protocol)
        for name, port in NODE_PORTS.items():
            out[f"{who} to {name}, IPv{family}"] = Ask(space, address("node", family), port)
        own = Ask(space, address("node", family), NODE_OWN)
        out[f"{who} to the node, IPv{family}"] = own
    out[f"backend to itself, IPv{family}"] = Ask("backend", address("web", family), 80)
    out[f"backend to itself udp, IPv{family}"] = Ask("backend", address("web", family), 53, "udp")
    for name, port, protocol in (
        ("ranges", 80, "tcp"),
        ("web", 80, "tcp"),
        ("web", 53, "udp"),
        ("local", 80, "tcp"),
        ("local", 53, "udp"),
    ):
        words = f"other to {name} {protocol} {port}, IPv{family}"
        out[words] = Ask("other", address(name, family), port, protocol)
    out[f"client to backend, IPv{family}"] = Ask("client", address("backend", family), POD_PORT)
    out[f"client to remote, IPv{family}"] = Ask("client", address("remote", family), POD_PORT)
    return out


BOTH = {**questions(Family.V4), **questions(Family.V6)}


def outcomes(asked: dict[str, Ask], *, sport: int = 0) -> dict[str, str]:
    """Ask all at once: "NAME saw ADDRESS", "refused", another error's name, or "" for silence."""
    answers = dict.fromkeys(asked, "")
    selector = selectors.DefaultSelector()
    for name, question in asked.items():
        sock = traffic._socket(question.src, question.address, question.protocol)
        if sport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A reset at the end, so that no socket holds the tuple.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.bind(("", sport))
        try:
            with contextlib.suppress(BlockingIOError):
                sock.connect((question.address, question.port))
            if question.protocol == "udp":
                sock.send(b"who?")
        except OSError as e:
            answers[name] = errno.errorcode[e.errno or 0]
            sock.close()
            continue
        selector.register(sock, selectors.EVENT_READ, name)
    end_s = time.monotonic() + traffic.ANSWER_TIMEOUT_S
    while selector.get_map() and (left_s := end_s - time.monotonic()) > 0:
        for key, _ in selector.select(left_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            try:
                answers[key.data] = sock.recv(256).decode()
            except ConnectionRefusedError:
                answers[key.data] = "refused"
            except OSError as e:
                answers[key.data] = errno.errorcode[e.errno or 0]
            selector.unregister(sock)
            sock.close()
    for key in list(selector.get_map().values()):
        selector.unregister(key.fileobj)
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    return answers
