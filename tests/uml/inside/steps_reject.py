"""Services by IPVS with `--deny-with=reject`: what a denied client is told, and how soon."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from netpol.kernel.sysctl import BRIDGE_NF_KEYS, keep_sysctl
from netpol.render.options import DenyWith, RenderOptions
from tests.uml.inside import lan, policy, traffic
from tests.uml.inside.steps import (
    FROM_CLIENT,
    NODEPORT,
    POD_DNS,
    POD_PORT,
    QUESTIONS,
    SERVICES,
    SHUT_CLIENT,
    Ask,
    Service,
)

#: Longer than the first repetition of a SYN (1 s).
PATIENCE_S = 1.6
#: Denied by the egress of the client, at OUTPUT: the backend is known there only.
BY_EGRESS = {
    name: QUESTIONS[name] for name in ("direct", "vip", "vip udp", "direct6", "vip6", "vip6 udp")
}
#: Denied by the ingress of the backend.
BY_INGRESS = {
    name: QUESTIONS[name] for name in ("other to vip", "other to vip6", "outsider to nodeport")
} | {"outsider to nodeport6": Ask(lan.OUTSIDER, lan.NODE6, NODEPORT)}
NODEPORT6 = Service(lan.NODE6, NODEPORT, lan.v6(20), POD_PORT)


class Node(policy.Node):
    """A node that tells the sender."""

    def options(self) -> RenderOptions:
        return replace(super().options(), deny_with=DenyWith.REJECT)


def told(question: Ask) -> tuple[str, float]:
    """The client's error ("" for an answer, "silence" for none), and after how long it came."""
    sock = traffic._socket(question.src, question.address, question.protocol)
    begin_s = time.monotonic()
    with sock:
        sock.settimeout(PATIENCE_S)
        try:
            sock.connect((question.address, question.port))
            if question.protocol == "udp":
                sock.send(b"who?")
            word = "" if sock.recv(256) else "closed"
        except TimeoutError:
            word = "silence"
        except OSError as e:
            word = errno.errorcode.get(e.errno or 0, str(e))
    return word, round(time.monotonic() - begin_s, 2)


def run(say: Callable[[str, Any], None]) -> None:
    """The network, its servers, and all steps."""
    policy.modprobe("br_netfilter", "ip_vs", "ip_vs_rr")
    lan.build()
    for key in BRIDGE_NF_KEYS:
        keep_sysctl(key, "1")
    servers = traffic.Servers()
    for name in ("client", "backend", "other"):
        servers.listen(name, name, POD_PORT)
        servers.listen(name, name, POD_DNS, "udp")
    servers.start()
    node = Node()
    for service in (*SERVICES, NODEPORT6):
        policy.ipvs("add", service)
    subprocess.run(f"ip -n {lan.OUTSIDER} -6 route add default via {lan.NODE6}".split(), check=True)
    node.watch.look()
    for name, policies, questions in (
        ("nobody denies", [], {**BY_EGRESS, **BY_INGRESS}),
        ("egress denies", [SHUT_CLIENT], BY_EGRESS),
        ("ingress denies", [FROM_CLIENT], BY_INGRESS),
    ):
        node.apply(policies)
        say(name, {n: told(q) for n, q in questions.items()})
