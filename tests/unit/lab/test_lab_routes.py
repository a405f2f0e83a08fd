"""A lab that routes by BGP, as values: segments, who routes, what is said where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netpol import config
from netpol.lab import agents, cni, frr, routing
from netpol.lab.plan import LabPlan
from netpol.lib.errors import InputError, NoAnswerError


def bgp(**more: Any) -> LabPlan:
    return LabPlan(name="x", routes="bgp", **more)


class TestPlan:
    def test_nodes_are_spread_over_the_segments(self) -> None:
        plan = bgp(node_count=3, subnets=2)
        assert [node.segment for node in plan.nodes] == [0, 1, 0]
        assert [node.addresses for node in plan.nodes] == [
            ("172.30.0.11", "fd00:172:30::b"),
            ("172.30.1.12", "fd00:172:30:1::c"),
            ("172.30.0.13", "fd00:172:30::d"),
        ]
        assert plan.gateways(1) == ("172.30.1.1", "fd00:172:30:1::1")
        assert plan.segment_cidrs(1) == ("172.30.1.0/24", "fd00:172:30:1::/64")

    def test_a_plan_survives_its_file(self) -> None:
        plan = bgp(node_count=3, subnets=2, router="frr")
        assert LabPlan.from_json(plan.as_json()) == plan

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"routes": "rip"}, "--routes; needed bgp or static"),
            ({"routes": "bgp", "subnets": 3}, "--subnets; needed a number from 1"),
            ({"routes": "bgp", "subnets": 0}, "--subnets; needed a number from 1"),
            ({"routes": "bgp", "router": "cisco"}, "--router; needed frr"),
            ({"subnets": 2}, "--subnets; needed --routes bgp"),
            ({"router": "frr"}, "--router; needed --routes bgp"),
            ({"routes": "bgp", "agent": False}, "--routes bgp; needed agents"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, given: Any, said: str) -> None:
        with pytest.raises(InputError, match=said):
            LabPlan(**given)


class TestChoice:
    def choose(self, asked: str | None = None, **more: Any) -> tuple[str, str]:
        given = {"agent": True, "needed_for": "", "fault": None} | more
        return routing.choose(asked, **given)

    def test_bgp_where_it_can_be(self) -> None:
        assert self.choose() == ("bgp", "")
        assert self.choose("static") == ("static", "")

    def test_without_agents_the_lab_routes(self) -> None:
        assert self.choose(agent=False, fault="no BIRD") == ("static", "")

    def test_without_bird_the_lab_routes_and_says_so(self) -> None:
        routes, note = self.choose(fault="no BIRD")
        assert routes == "static"
        assert note == "no BIRD: the lab routes between its nodes itself (--routes static)"

    @pytest.mark.parametrize(
        ("given", "flag"),
        [({"asked": "bgp"}, "--routes bgp"), ({"needed_for": "--subnets"}, "--subnets")],
    )
    def test_what_needs_bird_is_refused_without_it(self, given: Any, flag: str) -> None:
        with pytest.raises(NoAnswerError, match=f"{flag}: the agents cannot speak BGP") as refused:
            self.choose(**given, fault="no BIRD (Debian package bird2)")
        assert "bird2" in str(refused.value)


class TestAgents:
    def settings(self, plan: LabPlan) -> config.Settings:
        words = agents.command(plan, plan.nodes[0], api_url="http://1.2.3.4:5", path=Path("token"))
        args = config.parser().parse_args(words[words.index("netpol") + 1 :])
        args.token_file = None  # made when the lab is up
        return config.load(args, {}, host_name="n")

    def test_every_node_has_a_bird_of_its_own(self) -> None:
        plan = bgp()
        settings = self.settings(plan)
        assert settings.routes
        assert not settings.proxy
        assert settings.run_dir == str(plan.nodes[0].run_dir)
        assert settings.service_ranges == plan.service_cidrs
        assert not self.settings(LabPlan(name="x")).routes

    def test_the_router_is_a_peer_in_the_nodes_own_segment(self, tmp_path: Path) -> None:
        plan = bgp(node_count=2, subnets=2, router="frr", state_root=tmp_path)
        for node in plan.nodes:
            node.state_dir.mkdir(parents=True)
            node.peers_file.write_text(frr.peers_yaml(plan, node))
        assert json.loads(plan.nodes[1].peers_file.read_text())[0]["address"] == "172.30.1.2"
        settings = self.settings(plan)
        assert settings.bgp_peers_file == str(plan.nodes[0].peers_file)
        assert settings.advertise_cluster_ip
        assert settings.advertise_external_ip
        assert settings.advertise_load_balancer_ip

    def test_pod_ranges_are_left_to_the_agent(self) -> None:
        node = bgp().nodes[0]
        assert "ranges" not in cni.conflist(node, ranges=False)["plugins"][0]["ipam"]
        assert cni.conflist(node)["plugins"][0]["ipam"]["ranges"][0] == [
            {"subnet": "10.244.1.0/24"}
        ]


def test_the_router_listens_in_every_segment_for_both_families() -> None:
    text = frr.config(bgp(node_count=2, subnets=2, router="frr"))
    assert "router bgp 64600" in text
    assert "bgp listen range 172.30.0.0/24 peer-group NODES" in text
    assert "bgp listen range 172.30.1.0/24 peer-group NODES" in text
    assert "address-family ipv6 unicast" in text
    assert "ipv6" not in frr.config(bgp(router="frr", dual_stack=False))


def test_what_a_node_lacks_is_told_by_its_own_answers() -> None:
    row = {"prefix": "10.244.2.0/24", "kernel": "agrees", "reachable": True}
    up = {"peers": [{"peer": "node2", "state": "Established"}]}
    assert routing.lacks("node1", {"missing": [], "routes": [row]}, up) == []
    found = routing.lacks(
        "node1",
        {"missing": ["10.244.3.0/24"], "routes": [row | {"kernel": "missing"}]},
        {"peers": [{"peer": "node3", "state": "Active"}]},
    )
    assert found == [
        "node1 has no route to 10.244.3.0/24, 10.244.2.0/24",
        "node1 has no BGP session with node3",
    ]
