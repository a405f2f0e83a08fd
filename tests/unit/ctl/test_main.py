"""The program as a whole: start-up, exit codes, broken pipes, faults of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netpol.ctl import main as program
from netpol.ctl.output import MESSAGE_MAX_CHARS, clip

REPOSITORY = Path(__file__).parents[3]
SHOP = str(REPOSITORY / "tests" / "spec" / "ctl" / "worlds" / "shop.yaml")
HEAVY = (
    "kubernetes",
    "aiohttp",
    "pyroute2",
    "iptc",
    "yaml",
    "msgspec",
    "asyncio",
    "prometheus_client",
)


def ctl(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "netpol.ctl.main", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        **options,
    )


@pytest.mark.parametrize("words", [["--help"], ["explain", "--help"], ["matrix", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom netpol.ctl.main import main\n"
        f"try: main({words})\nexcept SystemExit as e: assert e.code == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "usage: " in done.stdout
    assert done.stderr.strip() == "[]"


def test_help_comes_at_once():
    def once():
        started = time.perf_counter()
        assert ctl("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.15


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["explain", "shop/web", "-f", SHOP], 0),
        (["explain", "shop/web", "--to", "shop/api", "--port", "8000", "-f", SHOP], 0),
        (["explain", "shop/web", "--to", "shop/db", "--port", "5432", "-f", SHOP], 1),
        (["matrix", "-f", SHOP], 0),
        ([], 2),
        (["nonsense"], 2),
        (["matrix", "--nonsense"], 2),
        (["matrix", "-o", "xml"], 2),
        (["matrix", "-f", "nowhere"], 2),
        (["matrix", "--ip-family", "5", "-f", SHOP], 2),
        (["explain"], 2),
        (["explain", "--from", "shop/web", "-f", SHOP], 2),
        (["explain", "shop/web", "--from", "shop/web", "--to", "shop/api", "-f", SHOP], 2),
        (["explain", "shop/web", "--port", "80", "-f", SHOP], 2),
        (["explain", "svc/db", "-n", "shop", "-f", SHOP], 2),
        (["explain", "--from", "shop/web", "--to", "shop/api", "--port", "x/y/z", "-f", SHOP], 2),
        (["matrix", "--external", "nonsense", "-f", SHOP], 2),
        (["render", "-f", SHOP], 2),
        (["render", "--node", "nowhere", "-f", SHOP], 3),
        (["explain", "shop/nobody", "-f", SHOP], 3),
        (["explain", "shop/web", "--to", "svc/nobody", "--port", "1", "-f", SHOP], 3),
        (["explain", "shop/web", "--to", "node/nowhere", "--port", "1", "-f", SHOP], 3),
        (["status", "--socket", "/nonexistent/agent.sock"], 3),
        (["--version"], 0),
        (["version"], 0),
    ],
)
def test_exit_codes_and_short_messages(words, code):
    done = ctl(*words, env={**os.environ, "KUBECONFIG": "/nonexistent"})
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code >= 2:
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        assert len(done.stderr) <= MESSAGE_MAX_CHARS


def test_without_a_cluster_it_says_what_is_needed(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = ctl("matrix", env=env)
    assert done.returncode == 3
    assert "-f MANIFESTS, an agent on this node, --kubeconfig FILE or KUBECONFIG" in done.stderr


def test_kubectl_finds_the_plugin_and_it_knows_its_name(tmp_path):
    plugin = tmp_path / "kubectl-netpol"
    plugin.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/kubectl-netpol.py "$@"\n')
    plugin.chmod(0o755)
    (tmp_path / "kubectl-netpol.py").write_text(
        "import sys\nfrom netpol.ctl.main import main\nsys.exit(main())\n"
    )
    done = subprocess.run(
        [str(plugin), "matrix", "--nonsense"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stderr.startswith("kubectl netpol: unrecognized arguments: --nonsense")


def test_a_reader_that_goes_away_is_no_fault_and_keeps_the_answer(tmp_path):
    command = (
        f"'{sys.executable}' -m netpol.ctl.main explain shop/web --to shop/db --port 5432 -f {SHOP}"
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.strip() == "1"
    assert done.stderr == ""


def test_a_fault_of_ours_is_one_line_with_a_hint(monkeypatch, capsys):
    def broken():
        raise RuntimeError("a\nb")

    monkeypatch.setattr(program, "parser", broken)
    monkeypatch.delenv("NETPOL_DEBUG", raising=False)
    assert program.main(["matrix"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("netpol-ctl: internal error: RuntimeError: a b (NETPOL_DEBUG=1")
    monkeypatch.setenv("NETPOL_DEBUG", "1")
    with pytest.raises(RuntimeError):
        program.main(["matrix"])


def test_messages_are_bounded_and_printable():
    assert clip("a\x1b[31m\n" + "b" * 5000).isprintable()
    assert len(clip("b" * 5000)) <= MESSAGE_MAX_CHARS


def test_json_stands_alone_on_stdout(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"
        "spec: {podSelector: {}, ingress: [{ports: [{port: 0}]}]}\n---\nkind: ConfigMap\n"
    )
    done = ctl("matrix", "-f", SHOP, "-f", str(bad), "-o", "json")
    assert json.loads(done.stdout)["pods"]
    assert "spec.ingress[0].ports[0].port" in done.stderr
    assert "skipped kinds: ConfigMap (1)" in done.stderr


def test_manifests_come_from_standard_input():
    done = ctl("matrix", "-f", "-", "--port", "1/udp", input=Path(SHOP).read_text(encoding="utf-8"))
    assert done.returncode == 0
    assert done.stdout.startswith("1/UDP: ")


def test_a_signal_from_the_keyboard_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-m", "netpol.ctl.main", "matrix", "-f", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
        # A shell's background job ignores the keyboard, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as child:
        wait_until_it_reads(child.pid)
        child.send_signal(signal.SIGINT)
        code = child.wait(30)
        assert (code, child.stderr.read()) == (130, "")


def wait_until_it_reads(pid):
    """Until it waits in a system call whose first argument is standard input."""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/syscall").read_text(encoding="ascii").split()[1:2] != ["0x0"]:
        assert time.monotonic() < deadline, "it never asked for its input"
        time.sleep(0.02)
