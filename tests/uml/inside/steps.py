"""What is asked inside the guest, under which policies: data for the guest and for the tests on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests import builders as make
from tests.uml.inside import lan

Json = dict[str, Any]

POD_PORT, POD_DNS, NODEPORT, NODE_OWN, NODE_WEB = 8080, 5353, 30080, 9000, 9090


class Ask(NamedTuple):
    """One question: from a namespace ("" is the node) to an address and port."""

    src: str
    address: str
    port: int
    protocol: str = "tcp"


class Service(NamedTuple):
    """A service of IPVS with one backend, by NAT."""

    address: str
    port: int
    to: str
    to_port: int
    protocol: str = "tcp"


SERVICES = (
    Service(lan.VIP4, 80, lan.v4(20), POD_PORT),
    Service(lan.VIP4, 53, lan.v4(20), POD_DNS, "udp"),
    Service(lan.VIP4, 90, lan.v4(20), POD_PORT, "sctp"),
    Service(lan.VIP6, 80, lan.v6(20), POD_PORT),
    Service(lan.VIP6, 53, lan.v6(20), POD_DNS, "udp"),
    Service(lan.VIP4_OTHER, 80, lan.v4(30), POD_PORT),
    Service(lan.VIP4_NODE, 80, lan.NODE4, NODE_WEB),
    Service(lan.NODE4, NODEPORT, lan.v4(20), POD_PORT),
)
#: Comes and goes while the rest stays; the node itself listens on the port as well.
LATE = Service(lan.VIP4_LATE, 80, lan.v4(20), POD_PORT)

#: From the client, unless the name says otherwise. On "other port" only the node listens.
QUESTIONS = {
    "direct": Ask("client", lan.v4(20), POD_PORT),
    "vip": Ask("client", lan.VIP4, 80),
    "vip udp": Ask("client", lan.VIP4, 53, "udp"),
    "vip sctp": Ask("client", lan.VIP4, 90, "sctp"),
    "vip of other": Ask("client", lan.VIP4_OTHER, 80),
    "vip of the node": Ask("client", lan.VIP4_NODE, 80),
    "vip, other port": Ask("client", lan.VIP4, NODE_OWN),
    "nodeport": Ask("client", lan.NODE4, NODEPORT),
    "the node": Ask("client", lan.NODE4, NODE_OWN),
    "direct6": Ask("client", lan.v6(20), POD_PORT),
    "vip6": Ask("client", lan.VIP6, 80),
    "vip6 udp": Ask("client", lan.VIP6, 53, "udp"),
    "vip6, other port": Ask("client", lan.VIP6, NODE_OWN),
    "other to vip": Ask("other", lan.VIP4, 80),
    "other to vip6": Ask("other", lan.VIP6, 80),
    "backend to itself": Ask("backend", lan.VIP4, 80),
    "unknown pod to vip": Ask("newcomer", lan.VIP4, 80),
    "node to vip": Ask("", lan.VIP4, 80),
    "outsider to nodeport": Ask(lan.OUTSIDER, lan.NODE4, NODEPORT),
}
LATE_QUESTIONS = {"late": Ask("client", LATE.address, 80), "vip": QUESTIONS["vip"]}

CLIENT, BACKEND = make.selector(app="client"), make.selector(app="backend")
TO_BACKEND = make.policy(
    "a/to-backend", CLIENT, egress=[make.egress(make.pods(app="backend"), ports=["8080"])]
)
TO_BACKEND_ANY = make.policy(
    "a/to-backend-any",
    CLIENT,
    egress=[make.egress(make.pods(app="backend"), ports=["8080", "5353/UDP", "8080/SCTP"])],
)
TO_VIP = make.policy("a/to-vip", CLIENT, egress=[make.egress(make.block(f"{lan.VIP4}/32"))])
FROM_CLIENT = make.policy(
    "a/from-client", BACKEND, ingress=[make.ingress(make.pods(app="client"), ports=["8080"])]
)
CLOSED = make.policy("a/closed", CLIENT, ingress=[])
SHUT = make.policy("a/shut", BACKEND, types=["Ingress", "Egress"])
SHUT_CLIENT = make.policy("a/shut-client", CLIENT, types=["Egress"])

#: Name of a step to its policies; all questions are asked in each.
STEPS: dict[str, list[Json]] = {
    "no policy": [],
    "egress names the backend": [TO_BACKEND],
    "egress names the vip": [TO_VIP],
    "ingress names the client": [FROM_CLIENT],
    "both name each other": [TO_BACKEND, FROM_CLIENT, CLOSED],
    "backend shut": [SHUT],
}
