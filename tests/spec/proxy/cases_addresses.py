"""What is dialled: addresses, ports, families, and what nobody may take."""

from __future__ import annotations

from tests.spec.proxy.case import (
    BALANCER4,
    BALANCER6,
    NODE4,
    NODE4_OUTSIDE,
    OUTSIDE4,
    OUTSIDE6,
    VIP4,
    VIP6,
    Case,
    here,
    piece,
    port,
    ready,
    service,
)

ONE = [piece(*ready("a"))]
BOTH = [piece(*ready("a")), piece(*ready("a", family=6), name="web-6", kind="IPv6")]
NOTHING = {"cluster": "-", "node": "-", "external": "-", "balancer": "-"}
DUAL = (VIP4, VIP6)


def balanced(*ingress: dict[str, str], **spec: object) -> dict[str, object]:
    return service(
        type="LoadBalancer",
        ips=DUAL,
        ingress=ingress or ({"ip": BALANCER4}, {"ip": BALANCER6}),
        **spec,  # type: ignore[arg-type]
    )


def refused(claim: str, address: str, words: str, **options: tuple[str, ...]) -> Case:
    """An external address that nobody may take, in the family of the address."""
    return Case(
        claim,
        service(external=(address,), ips=DUAL),
        BOTH,
        outside={"cluster": "a", "external": "-", "external6": "-"},
        refused=(words,),
        options=options,
    )


ADDRESSES = (
    Case("a ClusterIP leads to the endpoints", service(), ONE, {"cluster": "a"}),
    Case(
        "a ClusterIP service has no other address",
        service(),
        ONE,
        {**NOTHING, "cluster": "a"},
        rows={"cluster": {"port": 80, "protocol": "TCP", "scheduler": "rr", "affinitySeconds": 0}},
    ),
    Case(
        "the backend's port is the slice's, not the Service's targetPort",
        service(port(80, target=9)),
        [piece(*ready("a"), ports=[{"name": "", "port": 8443, "protocol": "TCP"}])],
        rows={"cluster": {"backends": [{"address": "10.1.0.1", "port": 8443, "weight": 1}]}},
    ),
    Case(
        "a NodePort answers on every address of the node's status",
        service(type="NodePort"),
        ONE,
        {"cluster": "a", "node": "a", "node outside": "a"},
        rows={"node": {"port": 30080}, "node outside": {"port": 30080}},
    ),
    Case(
        "a NodePort service without a ClusterIP in a family has no NodePort there",
        service(type="NodePort"),
        BOTH,
        {"node": "a", "node6": "-"},
    ),
    Case(
        "a dual-stack NodePort answers in both families",
        service(type="NodePort", ips=DUAL),
        BOTH,
        {"cluster": "a", "cluster6": "a", "node": "a", "node6": "a"},
    ),
    Case(
        "NodePort addresses can be narrowed",
        service(type="NodePort", ips=DUAL),
        BOTH,
        {"node": "a", "node outside": "-", "node6": "-"},
        options={"nodeport_cidrs": (f"{NODE4}/24",)},
    ),
    Case(
        "a node without addresses has no NodePort row",
        service(type="NodePort"),
        ONE,
        {"cluster": "a", "node": "-", "node outside": "-"},
        node={**here(), "status": {}},
    ),
    Case(
        "an address that the node's status names twice is one row",
        service(type="NodePort"),
        ONE,
        {"node": "a", "node outside": "-"},
        node=here(NODE4, NODE4),
    ),
    Case(
        "a port without nodePort has none",
        service(port(80, name="web", node=30080), port(81, name="admin"), type="NodePort"),
        [piece(*ready("a"), ports=[{"name": n, "port": 8080} for n in ("web", "admin")])],
        {"cluster": "a", "node": "-"},
        port="admin",
    ),
    Case(
        "an external IP is a row of its own",
        service(external=(OUTSIDE4,)),
        ONE,
        {"cluster": "a", "external": "a"},
        rows={"external": {"port": 80}},
    ),
    Case(
        "an external IP of a family without ClusterIP is not served",
        service(external=(OUTSIDE4, OUTSIDE6)),
        BOTH,
        {"external": "a", "external6": "-"},
    ),
    Case(
        "a load balancer's address is served",
        balanced(),
        BOTH,
        {"balancer": "a", "balancer6": "a"},
    ),
    Case(
        "ipMode VIP is the default",
        balanced({"ip": BALANCER4, "ipMode": "VIP"}),
        BOTH,
        {"balancer": "a", "balancer6": "-"},
    ),
    Case(
        "an address with ipMode Proxy is left to the load balancer",
        balanced({"ip": BALANCER4, "ipMode": "Proxy"}, {"ip": BALANCER6}),
        BOTH,
        {"balancer": "-", "balancer6": "a"},
    ),
    Case(
        "an ingress with a host name alone makes no row",
        balanced({"hostname": "lb.example.com"}),
        BOTH,
        {"cluster": "a", "balancer": "-", "balancer6": "-"},
    ),
    Case(
        "one address as external IP and as load balancer's is one row, the narrower one",
        balanced({"ip": OUTSIDE4}, externalIPs=[OUTSIDE4], loadBalancerSourceRanges=["10.0.0.0/8"]),
        BOTH,
        {"external": "-", "balancer": "-"},
        plan={"refused": ()},
    ),
    Case(
        "source ranges stand on load balancer rows alone, each family with its own",
        balanced(
            loadBalancerSourceRanges=["10.0.0.0/8", " 2001:db8::/32 "], externalIPs=[OUTSIDE4]
        ),
        BOTH,
        rows={
            "balancer": {"sourceRanges": ["10.0.0.0/8"]},
            "balancer6": {"sourceRanges": ["2001:db8::/32"]},
            "external": {"sourceRanges": []},
            "node": {"sourceRanges": []},
            "cluster": {"sourceRanges": []},
        },
    ),
    Case(
        "source ranges of one family do not narrow the other",
        balanced(loadBalancerSourceRanges=["10.0.0.0/8"]),
        BOTH,
        rows={"balancer": {"sourceRanges": ["10.0.0.0/8"]}, "balancer6": {"sourceRanges": []}},
    ),
    Case(
        "an empty source range is none",
        balanced(loadBalancerSourceRanges=[" ", "10.0.0.0/8"]),
        BOTH,
        {"balancer": "a", "balancer6": "a"},
        rows={"balancer": {"sourceRanges": ["10.0.0.0/8"]}, "balancer6": {"sourceRanges": []}},
        plan={"refused": ()},
    ),
    Case(
        "source ranges that cannot be read open nothing",
        balanced(loadBalancerSourceRanges=["everybody"]),
        BOTH,
        {"cluster": "a", "node": "a", "balancer": "-", "balancer6": "-"},
        refused=("cannot be read", "cannot be read"),
    ),
    Case(
        "affinity has the API's default timeout",
        service(sessionAffinity="ClientIP"),
        ONE,
        rows={"cluster": {"affinitySeconds": 10800}},
    ),
    Case(
        "affinity with a timeout",
        service(
            sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 30}}
        ),
        ONE,
        rows={"cluster": {"affinitySeconds": 30}},
    ),
    Case(
        "affinity None with a leftover timeout is none",
        service(sessionAffinity="None", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 30}}),
        ONE,
        rows={"cluster": {"affinitySeconds": 0}},
    ),
    Case("a headless Service has no row", service(ips=("None",)), ONE, NOTHING),
    Case("a Service without a ClusterIP has no row", service(ips=()), ONE, NOTHING),
    Case(
        "an ExternalName has no row, whatever addresses it kept",
        service(type="ExternalName", externalName="db.example.com", external=(OUTSIDE4,)),
        ONE,
        NOTHING,
    ),
    Case(
        "a Service of another proxy has no row",
        service(labels={"service.kubernetes.io/service-proxy-name": "other"}),
        ONE,
        NOTHING,
    ),
    Case(
        "an empty service-proxy-name is another proxy's too",
        service(labels={"service.kubernetes.io/service-proxy-name": ""}),
        ONE,
        NOTHING,
    ),
    Case(
        "clusterIPs count before clusterIP, each family's first",
        service(ips=(VIP6, VIP4)),
        BOTH,
        {"cluster": "a", "cluster6": "a"},
    ),
    Case(
        "UDP and TCP on one port are two rows",
        service(port(53, name="dns", protocol="UDP"), port(53, name="dns-tcp")),
        [
            piece(
                *ready("a"),
                ports=[
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 5353, "protocol": "TCP"},
                ],
            )
        ],
        {"cluster": "a"},
        rows={"cluster": {"protocol": "UDP", "port": 53}},
        port="dns",
    ),
    Case(
        "SCTP is served",
        service(port(3868, protocol="SCTP")),
        [piece(*ready("a"), ports=[{"name": "", "port": 3868, "protocol": "SCTP"}])],
        {"cluster": "a"},
        rows={"cluster": {"protocol": "SCTP"}},
    ),
    refused("an address of this node is refused", NODE4_OUTSIDE, "it is an address of node here"),
    refused("an IPv6 address of this node is refused", "2001:db8::1", "an address of node here"),
    refused(
        "an address of this machine beyond its status is refused",
        "198.18.0.1",
        "it is an address of this node",
        node_addresses=("198.18.0.1",),
    ),
    refused("an address in a pod range is refused", "10.1.0.77", "the pod range of node here"),
    refused(
        "an address in a Service range is refused",
        "10.97.0.1",
        "a Service range",
        service_ranges=("10.96.0.0/12",),
    ),
    refused("the Service's own ClusterIP is refused", VIP4, "a ClusterIP of the Service itself"),
    refused(
        "the API server's address is refused",
        "198.18.0.2",
        "the API server's address",
        api_servers=("198.18.0.2",),
    ),
    refused(
        "a gateway's address is refused", "192.0.2.254", "a gateway's", gateways=("192.0.2.254",)
    ),
    refused(
        "a BGP peer's address is refused", "192.0.2.9", "a BGP peer's", bgp_peers=("192.0.2.9",)
    ),
    refused("loopback is refused", "127.1.2.3", "it is loopback"),
    refused("IPv6 loopback is refused", "::1", "it is loopback"),
    refused("link-local is refused", "169.254.169.254", "it is link-local"),
    refused("IPv6 link-local is refused", "fe80::1", "it is link-local"),
    refused("multicast is refused", "224.0.0.251", "it is multicast"),
    refused("IPv6 multicast is refused", "ff02::1", "it is multicast"),
    refused("the unspecified address is refused", "0.0.0.0", "it is unspecified"),
    refused("the IPv6 unspecified address is refused", "::", "it is unspecified"),
    refused("broadcast is refused", "255.255.255.255", "it is broadcast"),
    refused("IPv4 written as IPv6 is the IPv4 address", "::ffff:127.0.0.1", "it is loopback"),
    Case(
        "a load balancer's address is refused like an external one",
        balanced({"ip": NODE4}),
        BOTH,
        {"cluster": "a", "balancer": "-"},
        refused=("load balancer address 192.0.2.1 is not served: it is an address of node here",),
    ),
    Case(
        "external addresses can be narrowed",
        service(external=(OUTSIDE4, "203.0.113.200")),
        ONE,
        {"external": "a"},
        refused=("203.0.113.200 is not served: it lies outside",),
        options={"external_cidrs": (f"{OUTSIDE4}/32",)},
    ),
    Case(
        "addresses from the load balancer's pools are served all the same",
        balanced({"ip": BALANCER4}, externalIPs=[OUTSIDE4]),
        BOTH,
        {"balancer": "a", "external": "-"},
        refused=(f"external IP {OUTSIDE4} is not served: it lies outside",),
        options={"external_cidrs": ("192.0.2.0/24",), "balancer_pools": (f"{BALANCER4}/32",)},
    ),
    Case(
        "a refused address leaves the Service's other addresses alone",
        service(external=("127.0.0.1", OUTSIDE4), type="NodePort"),
        ONE,
        {"cluster": "a", "node": "a", "external": "a"},
        refused=("127.0.0.1",),
    ),
)
