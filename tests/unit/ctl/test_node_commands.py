"""Commands about this node: status, the kernel part of explain, cleanup; against a real socket."""

import json

import pytest

from netpol.ctl import cleanup
from netpol.ctl.main import main
from netpol.kernel.drivers import HookState, TableTransaction
from netpol.kernel.testing import FakeTables
from netpol.lib.errors import NoAnswerError
from netpol.model.ids import ChainName
from netpol.model.net import Family
from netpol.model.ruleset import Drop, Hook, Rule
from tests.unit.ctl.agents import agent_socket

STATUS = {
    "node": "n1",
    "version": "0.1.0",
    "ready": True,
    "generation": 7,
    "applied_generation": 7,
    "in_sync": True,
    "applied_age_s": 4.25,
    "watches": [{"kind": "pods", "resource_version": "12", "synced": True, "errors": 0}],
    "rooms": {"policy": {"sets": 3, "chains": 9, "errors": ["set KNP-X: full"]}},
    "errors": [],
}
LIVE = {
    "chains": [
        {
            "name": "KNP-CI-x",
            "family": 4,
            "direction": "ingress",
            "rules": [{"text": "-j DROP", "packets": 41, "bytes": 2460}],
        }
    ],
    "sets": [{"name": "KNP-A4-y", "size": 30, "members": [f"10.0.0.{i}" for i in range(30)]}],
}


@pytest.fixture
def agent(tmp_path):
    """An agent's socket."""

    def explain(args):
        if args["pod"] != "default/web":
            raise NoAnswerError(f"pod {args['pod']} is not on this node")
        return LIVE

    with agent_socket(tmp_path, {"status": lambda _: STATUS, "explain": explain}) as path:
        yield path


@pytest.fixture
def world(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: away}\n"
    )
    return str(path)


def test_status_for_people_and_for_programs(agent, capsys):
    assert main(["status", "--socket", agent]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "n1: in sync"
    assert "generation 7, applied 7 (4.2 s ago), netpol 0.1.0" in out
    assert "error: set KNP-X: full" in out
    assert main(["status", "--socket", agent, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_explain_shows_the_kernel_when_the_agent_answers(agent, world, capsys):
    assert main(["explain", "pod/web", "-f", world, "--socket", agent]) == 0
    out = capsys.readouterr().out
    assert "KNP-CI-x ingress (IPv4)" in out
    assert "[41 packets, 2460 bytes] -j DROP" in out
    assert "set KNP-A4-y: 30 members" in out
    assert "and 10 more" in out
    assert main(["explain", "pod/web", "-f", world, "--socket", agent, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel"] == LIVE


def test_explain_says_where_policy_cannot_hold(tmp_path, world, capsys):
    told = {**LIVE, "unpoliced": "macvlan"}
    with agent_socket(tmp_path, {"explain": lambda _: told}) as path:
        assert main(["explain", "pod/web", "-f", world, "--socket", path]) == 0
    assert (
        "come by macvlan and pass no rule of this node: policy cannot hold"
        in capsys.readouterr().out
    )


def test_a_socket_that_was_asked_for_must_answer(agent, world, capsys):
    assert main(["explain", "pod/away", "-f", world, "--socket", agent]) == 3
    assert "not on this node" in capsys.readouterr().err
    assert main(["explain", "pod/web", "-f", world, "--socket", agent + "x"]) == 3
    assert f"no agent answers at {agent}x" in capsys.readouterr().err


def test_cleanup_is_refused_while_an_agent_runs(agent, monkeypatch, capsys):
    monkeypatch.setattr(cleanup.os, "geteuid", lambda: 0)
    assert main(["cleanup", "--socket", agent]) == 3
    assert "an agent runs" in capsys.readouterr().err


def test_cleanup_needs_root(monkeypatch, capsys):
    monkeypatch.setattr(cleanup.os, "geteuid", lambda: 1000)
    assert main(["cleanup"]) == 3
    assert "needed root" in capsys.readouterr().err


def test_cleanup_takes_all_that_is_ours_and_nothing_else():
    tables = FakeTables()
    ours, other = ChainName("KNP-ONE"), ChainName("KNP-TWO")
    tables.apply(
        TableTransaction(
            "mangle",
            Family.V4,
            replace={ours: (Rule(Drop()),), other: ()},
            hooks={Hook.FORWARD: ours, Hook.INPUT: other},
        )
    )
    assert cleanup.clean_table(tables, "mangle", Family.V4, []) == (2, 2)
    dump = tables.dump("mangle", Family.V4)
    assert not dump.chains
    assert not any(s.jumps for s in dump.hooks.values())
    assert cleanup.clean_table(tables, "mangle", Family.V4, []) == (0, 0)
    assert cleanup.clean_table(tables, "filter", Family.V6, []) == (0, 0)
    assert HookState() == HookState(())
