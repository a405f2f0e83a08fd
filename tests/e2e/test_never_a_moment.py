"""While everything changes, no forbidden packet arrives, no allowed one is lost, and foreign rules stay.

`stream` sends thousands of new flows a second between pairs whose verdict never changes, although policies,
pods, their classes, agents and foreign rules do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netpol.lab import control
from netpol.lab.plan import STATE_ROOT
from tests.e2e import stream
from tests.e2e.labs import Json, Lab, namespace, pod, policy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

#: NETPOL_STREAM_S=600 for a long night.
STREAM_S = float(os.environ.get("NETPOL_STREAM_S", "16"))
NS = "moment"

PODS = {
    "server": ("node1", {"app": "server"}),
    "friend": ("node1", {"app": "friend"}),
    "far": ("node2", {"app": "friend"}),
    "foe": ("node1", {"app": "foe"}),
    "farfoe": ("node2", {"app": "foe"}),
    "farserver": ("node2", {"app": "server"}),
    # These two are never allowed to talk, once for egress' sake and once for ingress'.
    "x": ("node1", {"app": "x", "cross": "1"}),
    "y": ("node1", {"app": "y", "cross": "1"}),
}
ALLOWED = (
    ("friend", "server", 4),
    ("far", "server", 4),
    ("friend", "server", 6),
    ("friend", "farserver", 4),
)
FORBIDDEN = (
    ("foe", "server", 4),
    ("farfoe", "server", 4),
    ("foe", "server", 6),
    ("foe", "farserver", 4),
    ("x", "y", 4),
    ("y", "x", 4),
)


def keep(name: str) -> Json:
    """Servers talk to friends alone."""
    spec = {
        "podSelector": {"matchLabels": {"app": "server"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}],
    }
    return policy(f"{NS}/{name}", spec)


CLOSED = policy(
    f"{NS}/closed",
    {
        "podSelector": {
            "matchExpressions": [{"key": "app", "operator": "In", "values": ["x", "y"]}]
        },
        "policyTypes": ["Ingress"],
    },
)
CROSS = policy(
    f"{NS}/cross",
    {
        "podSelector": {"matchLabels": {"cross": "1"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{}],
    },
)


class Api:
    """The lab's API server without the cost of a kubectl for every change."""

    def __init__(self, kubeconfig: str) -> None:
        config = json.loads(Path(kubeconfig).read_text())
        cluster = config["clusters"][0]["cluster"]
        self._url, self._token = cluster["server"], config["users"][0]["user"]["token"]
        ca = b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=ca)

    def __call__(self, method: str, path: str, body: Json | None = None) -> Json:
        """Make a request; a deletion of what is gone is fine."""
        request = urllib.request.Request(self._url + path, method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self._token}")
        kind = "merge-patch+json" if method == "PATCH" else "json"
        request.add_header("Content-Type", f"application/{kind}")
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, data, context=self._tls, timeout=20) as answer:  # noqa: S310
                found: Json = json.load(answer)
                return found
        except urllib.error.HTTPError as e:
            if method == "DELETE" and e.code == 404:
                return {}
            raise AssertionError(f"{method} {path}: {e.code} {e.read()[:500]!r}") from e

    def policy(self, made: Json) -> None:
        path = f"/apis/networking.k8s.io/v1/namespaces/{NS}/networkpolicies"
        name = made["metadata"]["name"]
        try:
            self("POST", path, made)
        except AssertionError as e:
            if ": 409 " not in str(e):
                raise
            self("PATCH", f"{path}/{name}", {"spec": made["spec"]})

    def no_policy(self, name: str) -> None:
        self("DELETE", f"/apis/networking.k8s.io/v1/namespaces/{NS}/networkpolicies/{name}")

    def label(self, name: str, **labels: str | None) -> None:
        body = {"metadata": {"labels": labels}}
        self("PATCH", f"/api/v1/namespaces/{NS}/pods/{name}", body)

    def pod(self, name: str, node: str, **labels: str) -> None:
        self("POST", f"/api/v1/namespaces/{NS}/pods", pod(f"{NS}/{name}", labels, node=node))

    def no_pod(self, name: str) -> None:
        self("DELETE", f"/api/v1/namespaces/{NS}/pods/{name}?gracePeriodSeconds=0")


class Churn:
    """Everything that happens to a cluster, at random; none of it changes a verdict of a pair."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.random = random.Random(seed)
        self.api = Api(lab.kubeconfig)
        self.state = STATE_ROOT / lab.name
        self.lab, self.log = lab, []
        self.kept, self.crossed, self.guests = "keep-0", False, 0
        self.kills = 0

    def once(self) -> None:
        """Do one thing."""
        work = self.random.choice(
            (
                self._rename_policy,
                self._cross,
                self._cross,
                self._edit_policy,
                self._more_policy,
                self._less_policy,
                self._change_class,
                self._guest,
                self._guest,
                self._kill,
                self._foreign,
            )
        )
        self.log.append((time.time(), work.__name__))
        work()

    def _rename_policy(self) -> None:
        """The new one first: what both allow must never be lost."""
        old, self.kept = self.kept, f"keep-{self.random.randrange(1000)}"
        self.api.policy(keep(self.kept))
        if old != self.kept:
            self.api.no_policy(old)

    def _cross(self) -> None:
        self.crossed = not self.crossed
        if self.crossed:
            self.api.policy(CROSS)
        else:
            self.api.no_policy("cross")

    def _edit_policy(self) -> None:
        block = {"cidr": "192.0.2.0/24", "except": [f"192.0.2.{self.random.randrange(250)}/32"]}
        peers = [{"podSelector": {"matchLabels": {"app": f"guest{self.random.randrange(3)}"}}}]
        spec = {
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"ipBlock": block}, *peers]}],
        }
        self.api.policy(policy(f"{NS}/edited", spec))

    def _more_policy(self) -> None:
        others = {"matchExpressions": [{"key": "cross", "operator": "DoesNotExist"}]}
        spec = {
            "podSelector": self.random.choice((others, {"matchLabels": {"app": "server"}})),
            "policyTypes": ["Egress"],
            "egress": [{}],
        }
        self.api.policy(policy(f"{NS}/more{self.random.randrange(3)}", spec))

    def _less_policy(self) -> None:
        self.api.no_policy(self.random.choice(("more0", "more1", "more2", "edited")))

    def _change_class(self) -> None:
        """A server's class and a foe's class, with labels that no peer asks for."""
        tier = self.random.choice(("a", "b", None))
        self.api.label(self.random.choice(("server", "foe", "farserver")), tier=tier)
        spec = {
            "podSelector": {"matchLabels": {"tier": "a"}},
            "policyTypes": ["Egress"],
            "egress": [{}],
        }
        self.api.policy(policy(f"{NS}/tier", spec))

    def _guest(self) -> None:
        """Pods come and go, some as friends, and take each other's addresses."""
        self.guests += 1
        app = self.random.choice(("friend", "foe", "guest0", "server"))
        self.api.pod(f"guest{self.guests}", self.random.choice(("node1", "node2")), app=app)
        if self.guests > 3:
            self.api.no_pod(f"guest{self.guests - 3}")

    def _kill(self) -> None:
        node = self.random.choice(("node1", "node1", "node2"))
        for found in control.ask(self.state / "lab.sock", "status")["agents"]:
            if found["node"] == node and found["pid"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found["pid"], signal.SIGKILL)
                    self.kills += 1
        # Now and not after the lab's pause, so that the next one hits a start, too.
        time.sleep(self.random.random() * 0.4)
        control.ask(self.state / "lab.sock", "agent", node=node, action="start")

    def _foreign(self) -> None:
        """What kube-proxy, Docker and a person at a shell do: whole tables, rules before ours."""
        tool = self.lab.iptables_tool(self.random.choice((4, 6)))
        first = f"{tool} -w -t mangle -I FORWARD 1 -m mark --mark 0x77 -j RETURN"
        proxy = r"*filter\n:KUBE-FORWARD - [0:0]\n-A KUBE-FORWARD -j RETURN\nCOMMIT\n"
        text = self.random.choice(
            (
                first + " && " + first.replace("-I FORWARD 1", "-D FORWARD"),
                f"{tool} -w -t nat -F; {tool} -w -t nat -N KUBE-X; {tool} -w -t nat -X KUBE-X",
                f"printf '{proxy}' | {tool}-restore --noflush -w",
                "ipset create foreign hash:ip; ipset add foreign 192.0.2.1; ipset destroy foreign",
            )
        )
        node = self.random.choice(("node1", "node2"))
        subprocess.run(
            ["ip", "netns", "exec", f"knp-{self.lab.name}-{node}", "sh", "-c", text],
            env={**os.environ, "XTABLES_LOCKFILE": str(self.state / node / "xtables.lock")},
            capture_output=True,
            check=True,
        )


class Moment(Lab):
    """A lab with foreign rules on its nodes."""

    def __init__(self, variant: str) -> None:
        super().__init__(f"mom{variant[0]}")
        self.variant = variant

    def iptables_tool(self, family: int) -> str:
        return f"ip{'6' if family == 6 else ''}tables-{self.variant}"

    def inside(self, node: str, command: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", f"knp-{self.name}-{node}", "sh", "-ec", command],
            env={
                **os.environ,
                "XTABLES_LOCKFILE": str(STATE_ROOT / self.name / node / "xtables.lock"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def foreigners(self, node: str) -> None:
        lines = ["ipset create foreign-stays hash:ip", "ipset add foreign-stays 192.0.2.9"]
        for family in (4, 6):
            tool = self.iptables_tool(family)
            lines += [
                f"{tool} -w -t mangle -N KUBE-KUBELET-CANARY",
                f"{tool} -w -t mangle -A FORWARD -p tcp --dport 22 -j MARK --set-xmark 0x4000/0x4000",
                f"{tool} -w -N DOCKER-USER",
                f"{tool} -w -A FORWARD -j DOCKER-USER",
                f"{tool} -w -A DOCKER-USER -j ACCEPT",
            ]
        self.inside(node, "\n".join(lines))

    def foreign(self, node: str) -> str:
        out = []
        for family in (4, 6):
            for table in ("mangle", "filter"):
                text = self.inside(node, f"{self.iptables_tool(family)}-save -t {table}")
                out += [
                    re.sub(r"\[\d+:\d+\]", "", line)
                    for line in text.splitlines()
                    if not line.startswith("#")
                    and "KNP-" not in line
                    and "KUBE-FORWARD" not in line
                ]
        saved = self.inside(node, "ipset save").splitlines()
        return "\n".join([*out, *(s for s in saved if "KNP-" not in s)])

    def pods(self) -> dict[str, Json]:
        return {
            p["name"]: p for p in control.ask(STATE_ROOT / self.name / "lab.sock", "pods")["pods"]
        }


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Moment]:
    lab = Moment(request.param)
    pods = [pod(f"{NS}/{n}", labels, node=node) for n, (node, labels) in PODS.items()]
    try:
        lab.up(
            "--iptables",
            request.param,
            manifests=[namespace(NS), *pods, keep("keep-0"), CLOSED],
            tmp=tmp_path_factory.mktemp("moment"),
        )
        for node in ("node1", "node2"):
            lab.foreigners(node)
        yield lab
    finally:
        lab.down()


@contextlib.contextmanager
def streaming(lab: Moment) -> Iterator[dict[str, Any]]:
    """Stream while the body runs; what was found is in the dictionary afterwards."""
    where = lab.pods()

    def end(name: str, family: int) -> str:
        return str(where[name]["addresses"][0 if family == 4 else 1])

    pairs = [
        {
            "name": f"{src}-{dst}-{family}",
            "netns": where[src]["netns"],
            "src": end(src, family),
            "dst": end(dst, family),
        }
        for src, dst, family in (*ALLOWED, *FORBIDDEN)
    ]
    homes = {end(dst, f): where[dst]["netns"] for _, dst, f in (*ALLOWED, *FORBIDDEN)}
    root = Path(stream.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.stream"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found: dict[str, Any] = {}
        process.stdin.write(json.dumps({"pairs": pairs, "homes": homes}) + "\n")
        process.stdin.flush()
        try:
            assert process.stdout.readline() == "ready\n"
            yield found
        finally:
            out, _ = process.communicate(timeout=30)
        found.update(json.loads(out))


def near(log: list[tuple[float, str]], times: list[float]) -> str:
    """What happened before the first few of these moments."""
    out = []
    for at in times[:5]:
        before = [f"{name} {at - when:.3f} s before" for when, name in log if when <= at][-3:]
        out.append(f"{at:.3f}: {', '.join(before)}")
    return "\n".join(out)


def test_no_forbidden_packet_passes_and_no_allowed_one_is_lost(lab: Moment) -> None:
    foreign = {node: lab.foreign(node) for node in ("node1", "node2")}
    churn = Churn(lab, seed=int(os.environ.get("NETPOL_SEED", "1")))
    with streaming(lab) as found:
        until = time.monotonic() + STREAM_S
        while time.monotonic() < until:
            churn.once()
            time.sleep(churn.random.random() * 0.15)
    flows = sum(r["udp_sent"] + r["tcp_connected"] for r in found.values())
    print(f"{flows} flows, {len(churn.log)} changes, {churn.kills} kills")
    for src, dst, family in FORBIDDEN:
        seen = found[f"{src}-{dst}-{family}"]
        passed = seen["udp_got"] + seen["tcp_accepted"]
        assert not passed, f"{len(passed)} {src}-{dst}-{family}\n{near(churn.log, sorted(passed))}"
        assert seen["udp_sent"] > 50 * STREAM_S
    for src, dst, family in ALLOWED:
        seen = found[f"{src}-{dst}-{family}"]
        lost = seen["udp_lost"] + seen["tcp_lost"]
        assert not lost, f"{len(lost)} {src}-{dst}-{family}\n{near(churn.log, sorted(lost))}"
        assert seen["udp_sent"] > 50 * STREAM_S
        assert seen["tcp_connected"] > 15 * STREAM_S
    assert churn.kills > STREAM_S / 10
    assert {node: lab.foreign(node) for node in foreign} == foreign
