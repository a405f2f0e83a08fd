"""Labs for tests: one command away, with names of their own, and what a person would type in them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
Json = dict[str, Any]


class Lab:
    """A running lab of its own name."""

    def __init__(self, tag: str) -> None:
        self.name = f"{tag}{os.getpid() % 10000}"
        self.kubeconfig = ""
        self.env: dict[str, str] = {}  # beside what the tests were started with

    def up(self, *args: str, manifests: list[Json] | None = None, tmp: Path | None = None) -> None:
        words = ["lab", "up", "--name", self.name, *args]
        if manifests is not None and tmp is not None:
            path = tmp / "world.yaml"
            path.write_text(documents(manifests))
            words += ["-f", str(path)]
        done = self.ctl(*words)
        assert done.returncode == 0, done.stderr
        self.kubeconfig = self.ctl("lab", "kubeconfig", "--name", self.name).stdout.strip()

    def down(self) -> None:
        done = self.ctl("lab", "down", "--name", self.name)
        assert done.returncode == 0, done.stderr

    def ctl(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "netpol-ctl"), *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **self.env, "KUBECONFIG": self.kubeconfig},
        )

    def kubectl(self, *args: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [str(BIN / "kubectl"), *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "KUBECONFIG": self.kubeconfig},
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def apply(self, manifests: list[Json]) -> None:
        if manifests:
            self.kubectl("apply", "-f", "-", stdin=documents(manifests))

    def node(self, node: str, *command: str) -> str:
        done = self.ctl("lab", "exec", "--name", self.name, node, "--", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def probe(self, *ports: str, family: int = 4) -> Json:
        return self._matrix("lab", "probe", "--name", self.name, ports=ports, family=family)

    def matrix(self, *ports: str, family: int = 4) -> Json:
        return self._matrix("matrix", "--kubeconfig", self.kubeconfig, ports=ports, family=family)

    def _matrix(self, *words: str, ports: tuple[str, ...], family: int) -> Json:
        flags = [w for p in ports for w in ("--port", p)]
        done = self.ctl(*words, *flags, "--ip-family", str(family), "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def documents(objects: list[Json]) -> str:
    """As JSON, which YAML 1.1 readers take without making a boolean of a namespace named y."""
    return "\n---\n".join(map(json.dumps, objects))


def pod(ref: str, labels: dict[str, str], *ports: Json, node: str = "", **spec: Any) -> Json:
    namespace, name = ref.split("/")
    # A container each: names of ports are unique in a container only.
    containers = [{"name": f"c{i}", "image": "x", "ports": [p]} for i, p in enumerate(ports)]
    body: Json = {"containers": containers or [{"name": "c", "image": "x"}], **spec}
    if node:
        body["nodeName"] = node
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": body,
    }


def policy(ref: str, spec: Json) -> Json:
    namespace, name = ref.split("/")
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def namespace(name: str, **labels: str) -> Json:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


NAMESPACES = ("x", "y", "z")


def nine_pods() -> list[Json]:
    """Three namespaces of three pods on two nodes, names of ports at different numbers."""
    out = [namespace(n, team="red" if n == "x" else "blue") for n in NAMESPACES]
    for i, ns in enumerate(NAMESPACES):
        for j, name in enumerate("abc"):
            web = 80 if j < 2 else 81
            out.append(
                pod(
                    f"{ns}/{name}",
                    {"pod": name, "tier": "fe" if (i + j) % 2 else "be"},
                    {"containerPort": web, "name": "web"},
                    {"containerPort": 80 + 81 - web, "name": "alt"},
                    {"containerPort": 80, "protocol": "UDP", "name": "udp"},
                    {"containerPort": 81, "protocol": "UDP"},
                    {"containerPort": 80, "protocol": "SCTP", "name": "web" if j else "sctp"},
                    node=f"node{(i + j) % 2 + 1}",
                )
            )
    return out


PROBED = ("80/TCP", "81/TCP", "80/UDP", "81/UDP", "80/SCTP", "81/SCTP")


class Dice:
    """Random policies in which subjects, peers, excepts and ports overlap."""

    def __init__(self, seed: int, addresses: list[str]) -> None:
        self.random, self.addresses = random.Random(seed), addresses

    def policies(self, count: int) -> list[Json]:
        return [self._policy(i) for i in range(count)]

    def _policy(self, number: int) -> Json:
        r = self.random
        spec: Json = {"podSelector": self._selector()}
        spec["policyTypes"] = r.choice((["Ingress"], ["Egress"], ["Ingress", "Egress"]))
        spec["ingress"] = [self._rule("from") for _ in range(r.randrange(3))]
        spec["egress"] = [self._rule("to") for _ in range(r.randrange(3))]
        return policy(f"{r.choice(NAMESPACES)}/p{number}", spec)

    def _rule(self, key: str) -> Json:
        r, out = self.random, {}
        if r.random() < 0.85:
            out[key] = [self._peer() for _ in range(r.randrange(1, 4))]
        if r.random() < 0.7:
            out["ports"] = [self._port() for _ in range(r.randrange(1, 4))]
        return out

    def _port(self) -> Json:
        r = self.random
        return r.choice(
            (
                {"port": r.choice((80, 81)), "protocol": r.choice(("TCP", "UDP", "SCTP"))},
                {"port": r.choice(("web", "alt"))},
                {"port": "udp", "protocol": "UDP"},
                {"port": "web", "protocol": "SCTP"},
                {"port": 79, "endPort": r.choice((80, 81)), "protocol": r.choice(("TCP", "UDP"))},
                {"protocol": r.choice(("TCP", "UDP", "SCTP"))},
            )
        )

    def _peer(self) -> Json:
        r = self.random
        if r.random() < 0.35:
            return {"ipBlock": self._block()}
        out: Json = {}
        if r.random() < 0.5:
            out["namespaceSelector"] = r.choice(
                (
                    {},
                    {"matchLabels": {"team": r.choice(("red", "blue"))}},
                    {
                        "matchExpressions": [
                            {
                                "key": "kubernetes.io/metadata.name",
                                "operator": r.choice(("In", "NotIn")),
                                "values": r.sample(NAMESPACES, r.randrange(1, 3)),
                            }
                        ]
                    },
                )
            )
        if not out or r.random() < 0.7:
            out["podSelector"] = self._selector()
        return out

    def _selector(self) -> Json:
        r = self.random
        return r.choice(
            (
                {},
                {"matchLabels": {"pod": r.choice("abc")}},
                {"matchLabels": {"tier": r.choice(("fe", "be"))}},
                {"matchExpressions": [{"key": "pod", "operator": "NotIn", "values": ["a"]}]},
                {"matchExpressions": [{"key": "missing", "operator": "DoesNotExist"}]},
                {"matchLabels": {"pod": "none"}},
            )
        )

    def _block(self) -> Json:
        import ipaddress

        r = self.random
        address = ipaddress.ip_address(r.choice(self.addresses))
        top = address.max_prefixlen
        length = r.choice((0, top - 16, top - 8, top - 2, top - 1, top))
        net = ipaddress.ip_network(f"{address}/{length}", strict=False)
        inside = [a for a in map(ipaddress.ip_address, self.addresses) if a in net]
        excepts = []
        for _ in range(r.randrange(3)):
            if length < top:
                hole = r.randrange(max(length + 1, top - 3), top + 1)
                excepts.append(
                    str(ipaddress.ip_network(f"{r.choice(inside)}/{hole}", strict=False))
                )
        return {"cidr": str(net), **({"except": excepts} if excepts else {})}
