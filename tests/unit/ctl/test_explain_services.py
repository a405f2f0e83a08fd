"""`explain` of a Service: which backend, and whose address ingress policy sees there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netpol.ctl.main import main

WORLD = """
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
status: {phase: Running, podIPs: [{ip: 10.244.1.5}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: TYPE
  clusterIP: 10.96.0.7
  externalTrafficPolicy: POLICY
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
"""


def explain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, kind: str, policy: str, source: str
) -> tuple[list[str], list[str]]:
    """Names of the backends, and the notes."""
    text = WORLD.replace("TYPE", kind).replace("POLICY", policy)
    if kind == "ClusterIP":
        text = text.replace("  externalTrafficPolicy: Cluster\n", "").replace(
            ", nodePort: 30080", ""
        )
    file = tmp_path / "world.yaml"
    file.write_text(text)
    words = ["explain", source, "--to", "shop/svc/web", "--port", "80", "-f", str(file)]
    assert main([*words, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["to"] == "svc/shop/web"
    return [f["to"]["name"] for f in document["findings"]], document["notes"]


@pytest.mark.parametrize(
    ("kind", "policy", "source", "words"),
    [
        ("NodePort", "Cluster", "203.0.113.7", "another node than the backend's (n1)"),
        ("LoadBalancer", "Cluster", "203.0.113.7", "that other node's address"),
        ("NodePort", "Local", "203.0.113.7", "ingress policy sees the client's address"),
        ("NodePort", "Cluster", "shop/web", ""),
        ("ClusterIP", "Cluster", "203.0.113.7", ""),
    ],
)
def test_whose_address_ingress_policy_sees(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    kind: str,
    policy: str,
    source: str,
    words: str,
) -> None:
    backends, notes = explain(tmp_path, capsys, kind=kind, policy=policy, source=source)

    assert backends == ["shop/web"]
    about = [n for n in notes if "externalTrafficPolicy" in n]
    assert len(about) == bool(words)
    assert words in "".join(about)
