"""The agent with --proxy at its start: no second proxy on a node, and a kernel that has what is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netpol.agent.proxy_node import missing_for_proxy
from netpol.kernel.drivers import Variant
from netpol.kernel.netns import in_netns
from netpol.lab.agents import missing_proxy
from netpol.model.net import FAMILIES

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parents[2]
REFUSE = """
import asyncio, http.server, sys, threading
from netpol.agent.proxy_node import refuse_another_proxy
from netpol.lib.errors import NetpolError

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"lastUpdated": "x"}')

if sys.argv[1] == "beside":
    server = http.server.HTTPServer(("127.0.0.1", 10256), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
try:
    asyncio.run(refuse_another_proxy())
except NetpolError as e:
    print(e)
    sys.exit(e.exit_code)
"""


def start(space: str, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ip", "netns", "exec", space, sys.executable, "-c", REFUSE, how],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=dict(os.environ),
    )


def test_beside_another_proxy_it_does_not_start(space: str) -> None:
    done = start(space, "beside")

    assert done.returncode == 3, done.stderr
    assert "--proxy beside a kube-proxy; needed a node without a running kube-proxy" in done.stdout
    assert "port 10256" in done.stdout


def test_rules_that_a_kube_proxy_left_are_only_named(space: str) -> None:
    rules = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"
    subprocess.run(
        ["ip", "netns", "exec", space, "iptables-nft-restore", "--noflush"],
        input=rules,
        text=True,
        check=True,
    )

    done = start(space, "alone")

    assert done.returncode == 0, done.stderr
    assert "a kube-proxy left rules" in done.stdout + done.stderr
    saved = subprocess.run(
        ["ip", "netns", "exec", space, "iptables-nft-save"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-j KUBE-SERVICES" in saved.stdout


@pytest.mark.parametrize("variant", list(Variant))
def test_what_the_kernel_lacks_is_named_and_nothing_stays(space: str, variant: Variant) -> None:
    found = in_netns(space, lambda: missing_for_proxy(variant, mark_mask=0x1FFF))

    if missing_proxy() is None:
        assert found == {}
    else:
        assert list(found) == list(FAMILIES)
        assert all(any("ip_vs" in what for what in lacks) for lacks in found.values())
    listed = ["ip", "netns", "exec", space, "ipset", "list", "-n"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""
