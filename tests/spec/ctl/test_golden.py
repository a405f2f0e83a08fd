"""What netpol-ctl prints, whole: stdout, stderr and exit code, in files that people can read."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from netpol.ctl.main import main

HERE = Path(__file__).parent
SHOP, CORNERS, BAD = "-f worlds/shop.yaml", "-f worlds/corners.yaml", "-f worlds/bad-policies.yaml"
SERVICES = "-f worlds/services.yaml"

CASES = {
    "pod-two-directions": f"explain pod/api -n shop {SHOP}",
    "pod-open": f"explain monitoring/scraper {SHOP}",
    "pod-json": f"explain shop/pod/db -o json {SHOP}",
    "pod-host-network": f"explain x/hosted {CORNERS}",
    "pod-invalid-policy": f"explain x/p {BAD}",
    "allow": f"explain shop/web --to shop/api --port 8000/tcp {SHOP}",
    "deny-both": f"explain shop/web --to shop/db --port 5432 {SHOP}",
    "deny-json": f"explain --from shop/web --to shop/db --port postgres -o json {SHOP}",
    "deny-yaml": f"explain --from monitoring/scraper --to shop/db --port 5432 -o yaml {SHOP}",
    "declared-ports": f"explain monitoring/scraper --to pod/api -n shop {SHOP}",
    "loopback": f"explain shop/db --to shop/db --port 1 {SHOP}",
    "fix": f"explain shop/web --to shop/db --port 5432 --fix {SHOP}",
    "fix-json": f"explain shop/web --to shop/db --port 5432 --fix -o json {SHOP}",
    "fix-nothing": f"explain shop/web --to shop/api --port 8000 --fix {SHOP}",
    "fix-block": f"explain --from 203.0.113.0/24 --to x/server-1 --port 8080 --fix {CORNERS}",
    "fix-service": f"explain x/client --to svc/web -n x --fix {CORNERS}",
    "service": f"explain x/client --to x/svc/web --port 80 {CORNERS}",
    "service-by-address": f"explain x/client --to 10.96.7.7 --port 80/tcp {CORNERS}",
    "service-external-address": f"explain x/client --to 198.51.100.7 --port web {CORNERS}",
    "service-hairpin": f"explain x/server-1 --to x/svc/web --port 80 {CORNERS}",
    "service-wrong-port": f"explain x/client --to x/svc/web --port 81 {CORNERS}",
    "service-without-backends": f"explain x/client --to x/svc/nobody --port 80 {CORNERS}",
    "block-partly": f"explain --from 203.0.113.0/24 --to x/server-1 --port web {CORNERS}",
    "range-partly": f"explain x/client --to x/server-1 --port 8000-8100 {CORNERS}",
    "several-ports": f"explain x/client --to x/server-1 --port web --port 9/sctp {CORNERS}",
    "node-to-its-pod": f"explain --from node/node-a --to x/server-1 --port 1/udp {CORNERS}",
    "other-node-to-pod": f"explain --from node/node-b --to x/server-1 --port 1/udp {CORNERS}",
    "pod-to-its-node": f"explain x/server-1 --to node/node-a --port 10250 {CORNERS}",
    "host-network-peer": f"explain x/hosted --to x/server-1 --port 8082 {CORNERS}",
    "family-6": f"explain x/client --to x/server-1 --port 80 --ip-family 6 {CORNERS}",
    "family-missing": f"explain x/client --to x/server-2 --port 80 --ip-family 6 {CORNERS}",
    "ended-pod": f"explain x/done --to x/server-1 --port 80 {CORNERS}",
    "services": f"services --node node-a {SERVICES}",
    "services-other-node": f"services --node node-b {SERVICES}",
    "services-json": f"services --node node-a -o json {SERVICES}",
    "services-named": f"services --node node-b -o yaml shop/near {SERVICES}",
    "services-no-such-node": f"services --node nowhere {SERVICES}",
    "matrix": f"matrix {SHOP}",
    "matrix-json": f"matrix -n shop --port 5432 --port metrics/tcp -o json {SHOP}",
    "matrix-external": f"matrix --port 8080 --external 203.0.113.7 --external fd00::9 {CORNERS}",
    "matrix-family-6": f"matrix --port 8080/TCP --ip-family 6 -o json {CORNERS}",
    "matrix-named": f"matrix --port web -o yaml {CORNERS}",
    "invalid-policy-strict": f"matrix --strict {BAD}",
    "not-a-policy": "matrix -f worlds/not-a-policy.yaml",
    "no-such-file": "matrix -f worlds/nothing.yaml",
    "no-such-pod": f"explain pod/nobody --to shop/api --port 1 {SHOP}",
    "no-such-node": f"render --node nowhere {SHOP}",
    "no-such-name": f"explain shop/web --to shop/db --port smtp {SHOP}",
    "bad-port": f"explain shop/web --to shop/db --port 0 {SHOP}",
    "bad-reference": f"explain web --to shop/db --port 1 {SHOP}",
    "no-port": f"explain shop/web --to 8.8.8.8 {SHOP}",
    "no-agent": "status --socket worlds/no.sock",
    "unknown-flag": "matrix --bogus",
    "unknown-command": "frobnicate",
}


@pytest.mark.parametrize("name", CASES)
def test_output_is_the_golden_file(name, request, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr("sys.argv", ["netpol-ctl"])
    try:
        code = main(shlex.split(CASES[name]))
    except SystemExit as e:  # argparse
        code = e.code
    out, err = capsys.readouterr()
    shown = f"$ netpol-ctl {CASES[name]}\n{out}"
    if err:
        shown += f"--- stderr\n{err}"
    shown += f"--- exit {code}\n"
    golden = HERE / "golden" / f"{name}.txt"
    if request.config.getoption("--update-golden", default=False):
        golden.write_text(shown, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == shown
    if "-o json" in CASES[name] and code in (0, 1):
        json.loads(out)
    if "-o yaml" in CASES[name] or "--fix" in CASES[name]:
        list(yaml.safe_load_all(out))


def test_no_golden_file_is_left_over():
    assert {p.stem for p in (HERE / "golden").glob("*.txt")} == set(CASES)
