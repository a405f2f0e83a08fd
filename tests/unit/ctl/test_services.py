"""`netpol-ctl services -f`: arguments, exit codes, the document, the text."""

import json
import os
import subprocess
import sys

import pytest

from netpol.ctl.main import main
from tests.spec.proxy.case import OUTSIDE4, broken, going, here, piece, port, ready, service


def other(name, **more):
    made = service(ips=("10.96.0.11",), **more)
    made["metadata"] |= {"name": name, "uid": name}
    return made


@pytest.fixture
def world(tmp_path):
    def write(*objects):
        file = tmp_path / "all.json"
        file.write_text(json.dumps({"kind": "List", "items": list(objects)}))
        return str(file)

    return write


def run(capsys, *words):
    try:
        code = main(["services", *words])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_contract_of_the_document(world, capsys):
    file = world(
        here(),
        service(external=(OUTSIDE4,), sessionAffinity="ClientIP", externalTrafficPolicy="Local"),
        piece(*ready("a"), *ready("b", "there"), *going("c")),
    )
    code, out, err = run(capsys, "-f", file, "--node", "here", "-o", "json")
    backends = [
        {"address": "10.1.0.1", "port": 8080, "weight": 1},
        {"address": "10.1.0.2", "port": 8080, "weight": 1},
        {"address": "10.1.0.3", "port": 8080, "weight": 0},
    ]
    both = {
        "service": "ns/web",
        "portName": "",
        "port": 80,
        "protocol": "TCP",
        "scheduler": "rr",
        "affinitySeconds": 10800,
        "sourceRanges": [],
        "localClientBackends": backends,
        "action": "forward",
    }
    assert json.loads(out) == {
        "services": [
            {**both, "kind": "ClusterIP", "address": "10.96.0.10", "backends": backends},
            {
                **both,
                "kind": "ExternalIP",
                "address": OUTSIDE4,
                "backends": [backends[0], backends[2]],
            },
        ]
    }
    assert (code, err) == (0, "")


def test_services_are_in_order_of_their_names(world, capsys):
    file = world(here(), other("zeta"), other("alpha"), service())
    _, out, _ = run(capsys, "-f", file, "--node", "here", "-o", "json")
    names = [row["service"] for row in json.loads(out)["services"]]
    assert names == ["ns/alpha", "ns/web"]  # zeta lost the ClusterIP to alpha
    _, again, _ = run(capsys, "-f", file, "--node", "here", "-o", "json")
    assert again == out


def test_text_says_first_what_there_is_and_then_why_not(world, capsys):
    file = world(
        here(), service(external=("127.0.0.1",)), piece(*ready("a"), *broken("b"), *going("c"))
    )
    code, out, err = run(capsys, "-f", file, "--node", "here")
    lines = out.splitlines()
    assert lines[0] == "1 address of 1 Service on node here: 1 forward"
    assert lines[1].split() == [
        *("ns/web", "-", "ClusterIP", "10.96.0.10:80/TCP", "forward", "rr"),
        *("10.1.0.1:8080,", "10.1.0.3:8080", "(drains)"),
    ]
    assert "  refused: AddressRefused: external IP 127.0.0.1 is not served: it is loopback" in lines
    assert "  unused: 10.1.0.2: it is not ready" in lines
    assert "  unused: 10.1.0.3: it terminates, and others are ready" in lines
    assert (code, err) == (0, "")


def test_text_shows_what_only_pods_and_the_node_meet(world, capsys):
    file = world(
        here(),
        service(type="NodePort", externalTrafficPolicy="Local"),
        piece(*ready("b", "there")),
    )
    _, out, _ = run(capsys, "-f", file, "--node", "here")
    assert out.splitlines()[0] == "3 addresses of 1 Service on node here: 1 forward, 2 drop"
    assert "from pods and this node" in out


@pytest.mark.parametrize("name", ["web -n ns", "ns/web", "svc/web -n ns", "ns/svc/web"])
def test_one_service_by_name(world, capsys, name):
    file = world(here(), service(), other("alpha"))
    code, out, _ = run(capsys, "-f", file, "--node", "here", "-o", "json", *name.split())
    assert code == 0
    assert {row["service"] for row in json.loads(out)["services"]} == {"ns/web"}


def test_refusals_are_remarks_beside_a_document(world, capsys):
    file = world(here(), service(external=("127.0.0.1",)))
    code, out, err = run(capsys, "-f", file, "--node", "here", "-o", "json")
    assert json.loads(out)["services"][0]["action"] == "reject"
    assert err.startswith("Service ns/web: AddressRefused: external IP 127.0.0.1")
    assert code == 0


def test_a_service_without_an_address_is_named(world, capsys):
    code, out, err = run(
        capsys, "-f", world(here(), service(ips=())), "--node", "here", "-o", "json"
    )
    assert json.loads(out) == {"services": []}
    assert "ns/web has no clusterIP" in err
    assert code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--node nowhere", 3, "no node nowhere; got nodes: here"),
        ("", 2, "needed --node NODE"),
        ("--node here ns/nobody", 3, "no service ns/nobody"),
        ("--node here web", 3, "no service default/web; got there is one in ns"),
        ("--node here ns/web -n other", 2, "needed a Service of -n other"),
        ("--node here --external-ip-cidr 10.0.0.0/33", 2, "--external-ip-cidr; needed a CIDR"),
        ("--node here --nodeport-addresses primary", 2, "--nodeport-addresses; needed a CIDR"),
        ("--node here -o xml", 2, "invalid choice"),
    ],
)
def test_what_has_no_answer(world, capsys, words, code, says):
    found, out, err = run(capsys, "-f", world(here(), service()), *words.split())
    assert (found, out) == (code, "")
    assert says in err


def test_a_folder_that_is_not_there(capsys, tmp_path):
    code, _, err = run(capsys, "-f", str(tmp_path / "none"), "--node", "here")
    assert code == 2
    assert "no such file" in err


def test_a_node_without_an_object_has_no_node_ports(world, capsys):
    file = world(service(type="NodePort"), piece(*ready("a")))
    code, out, err = run(capsys, "-f", file, "--node", "here", "-o", "json")
    assert [row["kind"] for row in json.loads(out)["services"]] == ["ClusterIP"]
    assert "no Node object here: planned for a node without addresses and zone" in err
    assert code == 0


def test_a_node_that_only_a_pod_names_is_known(world, capsys):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"nodeName": "only-named", "containers": []},
    }
    code, _, err = run(capsys, "-f", world(here(), pod, service()), "--node", "only-named")
    assert code == 0
    assert "no Node object only-named" in err


def test_pods_addresses_are_nobody_elses(world, capsys):
    """Also where no podCIDR is known."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": []},
        "status": {"phase": "Running", "podIP": OUTSIDE4},
    }
    file = world(here(), pod, service(external=(OUTSIDE4,)))
    _, out, err = run(capsys, "-f", file, "--node", "here", "-o", "json")
    assert [row["kind"] for row in json.loads(out)["services"]] == ["ClusterIP"]
    assert f"{OUTSIDE4} is not served: it is a pod's address" in err


def test_endpoints_come_from_pods_where_there_are_no_slices(world, capsys):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "web"}},
        "spec": {
            "nodeName": "here",
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8443}]}],
        },
        "status": {"phase": "Running", "podIP": "10.1.0.9"},
    }
    made = service(port(443, target="http"), selector={"app": "web"})
    _, out, _ = run(capsys, "-f", world(here(), pod, made), "--node", "here", "-o", "json")
    (row,) = json.loads(out)["services"]
    assert row["backends"] == [{"address": "10.1.0.9", "port": 8443, "weight": 1}]


def test_nothing_of_this_machine_is_read(world, tmp_path):
    """As nobody, with no way to the network tools, from an empty folder: the answer is the same."""
    file = world(here(), service(), piece(*ready("a")))
    script = (
        "import socket, subprocess, sys, builtins\n"
        "def no(*a, **k): raise AssertionError('the machine was asked')\n"
        "socket.socket = no; subprocess.Popen = no\n"
        "real = builtins.open\n"
        "def opened(f, *a, **k):\n"
        "    assert not str(f).startswith(('/proc', '/sys', '/run', '/etc/cni')), f\n"
        "    return real(f, *a, **k)\n"
        "builtins.open = opened\n"
        "from netpol.ctl.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "services", "-f", file, "--node", "here", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.getcwd(),  # noqa: PTH109 - where the packages are
        env={"PATH": "", "HOME": str(tmp_path)},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert json.loads(done.stdout)["services"][0]["action"] == "forward"
