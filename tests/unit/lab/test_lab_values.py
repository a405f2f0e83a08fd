"""The lab's pure parts: names, slices, hosts files, ports, readiness, the scheduler's choice."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from netpol.lab import cni, endpointslices, matrix, names, operations, processes, scheduler
from netpol.lab.plan import LabPlan
from netpol.lib.errors import InputError
from netpol.model.ids import Protocol

Obj = dict[str, Any]


def pod(name: str, *, ip: str, labels: dict[str, str], port: int | None = None, **meta: Any) -> Obj:
    ports = [{"name": "http", "containerPort": port, "protocol": "TCP"}] if port else []
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": labels} | meta,
        "spec": {"nodeName": "node1", "containers": [{"name": "c", "ports": ports}]},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def service(**spec: Any) -> Obj:
    return {
        "metadata": {"name": "web", "namespace": "shop", "uid": "s"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]} | spec,
    }


WEB = {"app": "web"}


class TestPlan:
    def test_podcidrs_and_addresses_follow_from_the_index(self) -> None:
        node = LabPlan(node_count=12).nodes[11]
        assert node.name == "node12"
        assert node.netns == "knp-lab-node12"
        assert node.addresses == ("172.30.0.22", "fd00:172:30::16")
        assert node.pod_cidrs == ("10.244.12.0/24", "fd00:10:244:c::/64")

    def test_one_family_has_no_second_of_anything(self) -> None:
        plan = LabPlan(dual_stack=False)
        assert plan.switch_addresses == ("172.30.0.1",)
        assert plan.nodes[0].pod_cidrs == ("10.244.1.0/24",)
        assert plan.service_cidrs == ("10.96.0.0/16",)

    def test_a_plan_survives_its_file(self) -> None:
        plan = LabPlan(name="x1", node_count=3, iptables="legacy", agent=False)
        assert LabPlan.from_json(plan.as_json()) == plan

    @pytest.mark.parametrize("name", ["", "a-b", "A", "1a", "a" * 21, "a/b"])
    def test_a_name_that_could_reach_into_another_lab_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match="lab name"):
            LabPlan(name=name)

    def test_pods_of_one_name_but_two_lives_get_two_namespaces(self) -> None:
        plan = LabPlan()
        first = plan.pod_netns(namespace="a", name="b", uid="1")
        assert first != plan.pod_netns(namespace="a", name="b", uid="2")
        assert first.startswith("knp-lab-pod-")


class TestSlices:
    def test_a_named_port_that_differs_between_pods_makes_two_slices(self) -> None:
        pods = [
            pod("a", ip="10.0.0.1", labels=WEB, port=8080),
            pod("b", ip="10.0.0.2", labels=WEB, port=9090),
            pod("c", ip="10.0.0.3", labels={"app": "db"}, port=8080),
        ]
        found = endpointslices.slices_for(service(), pods)
        ports = {s["ports"][0]["port"]: s["endpoints"][0]["addresses"] for s in found}
        assert ports == {8080: ["10.0.0.1"], 9090: ["10.0.0.2"]}
        assert len({s["metadata"]["name"] for s in found}) == 2

    def test_each_family_has_its_slice_even_without_endpoints(self) -> None:
        pods = [pod("a", ip="10.0.0.1", labels=WEB, port=80)]
        found = endpointslices.slices_for(service(ipFamilies=["IPv4", "IPv6"]), pods)
        assert {s["addressType"]: len(s["endpoints"]) for s in found} == {"IPv4": 1, "IPv6": 0}

    def test_a_pod_that_is_going_is_serving_but_not_ready(self) -> None:
        going = pod("a", ip="10.0.0.1", labels=WEB, port=80, deletionTimestamp="now")
        (found,) = endpointslices.slices_for(service(), [going])
        expected = {"ready": False, "serving": True, "terminating": True}
        assert found["endpoints"][0]["conditions"] == expected

    def test_a_service_without_selector_is_left_alone(self) -> None:
        assert endpointslices.slices_for(service(selector={}), []) == []

    def test_a_name_that_a_pod_does_not_declare_leaves_it_without_that_port(self) -> None:
        (found,) = endpointslices.slices_for(service(), [pod("a", ip="10.0.0.1", labels=WEB)])
        assert found["ports"] == []
        assert found["endpoints"][0]["addresses"] == ["10.0.0.1"]


class TestNames:
    def hosts(self, *entries: names.Named) -> dict[str, list[str]]:
        own = names.Named("shop", "me", ("10.0.0.9",), service=False)
        table: dict[str, list[str]] = {}
        for line in names.hosts_text(namespace="shop", own=own, entries=entries).splitlines():
            address, *found = line.split()
            for name in found:
                table.setdefault(name, []).append(address)
        return table

    def test_own_namespace_needs_no_suffix_and_others_do(self) -> None:
        here = names.Named("shop", "db", ("10.0.0.1",), service=False)
        there = names.Named("blog", "db", ("10.0.0.2",), service=False)
        found = self.hosts(here, there)
        assert found["db"] == ["10.0.0.1"]
        assert found["db.blog"] == ["10.0.0.2"]

    def test_a_service_hides_a_pod_of_the_same_name(self) -> None:
        a_pod = names.Named("shop", "web", ("10.0.0.1",), service=False)
        a_service = names.Named("shop", "web", ("10.96.0.1",), service=True)
        found = self.hosts(a_pod, a_service)
        assert found["web"] == ["10.96.0.1"]
        assert found["web.shop.svc.cluster.local"] == ["10.96.0.1"]

    def test_a_headless_service_resolves_to_its_ready_endpoints_and_their_hostnames(self) -> None:
        entry = {
            "metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": [
                {"addresses": ["10.0.0.1"], "hostname": "web-0"},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": False}},
            ],
        }
        found = names.named_services([service(clusterIPs=["None"])], [entry])
        assert [(n.name, n.addresses) for n in found] == [
            ("web", ("10.0.0.1",)),
            ("web-0.web", ("10.0.0.1",)),
        ]

    def test_a_bound_file_is_changed_in_place(self, tmp_path: Path) -> None:
        file = tmp_path / "x/hosts"
        names.write_in_place(file, "a")
        inode = file.stat().st_ino
        names.write_in_place(file, "b")
        assert (file.read_text(), file.stat().st_ino) == ("b", inode)


class TestPorts:
    PODS = (
        {"ports": [["http", "TCP", 8080], ["", "UDP", 53]]},
        {"ports": [["http", "TCP", 9090]]},
    )

    def resolve(self, *texts: str) -> list[tuple[Protocol, int]]:
        wanted = [matrix.parse_port(text) for text in texts]
        return matrix.resolve_ports(wanted, list(self.PODS))

    def test_without_a_wish_the_declared_ports_are_probed(self) -> None:
        found = {(Protocol.TCP, 8080), (Protocol.TCP, 9090), (Protocol.UDP, 53)}
        assert set(self.resolve()) == found

    def test_numbers_ranges_and_names(self) -> None:
        assert self.resolve("80") == [(Protocol.TCP, 80)]
        assert self.resolve("7-8/Udp") == [(Protocol.UDP, 7), (Protocol.UDP, 8)]
        assert self.resolve("http") == [(Protocol.TCP, 8080), (Protocol.TCP, 9090)]

    @pytest.mark.parametrize("text", ["0", "65536", "9-8", "80/icmp", "", "/tcp", "a_b"])
    def test_what_is_no_port_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="--port"):
            matrix.parse_port(text)

    def test_a_name_that_no_pod_declares_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(InputError, match="known: http"):
            self.resolve("grpc")


class TestSettled:
    STATUS: ClassVar[Obj] = {
        "ready": True,
        "in_sync": True,
        "generation": 4,
        "applied_generation": 4,
        "watches": [{"kind": "pods", "resource_version": "7", "synced": True}],
    }

    def test_an_agent_at_the_version_lacks_nothing(self) -> None:
        assert operations.behind(self.STATUS, lambda _: 7) == []

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"ready": False}, "not ready"),
            ({"in_sync": False, "applied_generation": 3}, "generation 4, applied 3"),
            (
                {"watches": [{"kind": "pods", "resource_version": "6", "synced": True}]},
                "pods is at 6",
            ),
            (
                {"watches": [{"kind": "pods", "resource_version": "9", "synced": False}]},
                "pods is at 9",
            ),
        ],
    )
    def test_an_agent_that_is_behind_says_where(self, change: Obj, says: str) -> None:
        (text,) = operations.behind(self.STATUS | change, lambda _: 7)
        assert says in text


class TestScheduler:
    NODES = (
        {"metadata": {"name": "node1", "labels": {"disk": "ssd"}}},
        {"metadata": {"name": "node2"}},
    )

    def choose(self, spec: Obj, load: dict[str, int]) -> str | None:
        return scheduler.choose({"spec": spec}, list(self.NODES), Counter(load))

    def test_the_least_loaded_node_is_taken_and_of_equals_the_first(self) -> None:
        assert self.choose({}, {"node1": 2, "node2": 1}) == "node2"
        assert self.choose({}, {}) == "node1"

    def test_a_node_selector_is_respected(self) -> None:
        assert self.choose({"nodeSelector": {"disk": "ssd"}}, {"node1": 9}) == "node1"
        assert self.choose({"nodeSelector": {"disk": "hdd"}}, {}) is None


class TestProcesses:
    def test_a_record_names_a_process_by_pid_and_start(self, tmp_path: Path) -> None:
        file = tmp_path / "p"
        processes.record(file, os.getpid())
        found = processes.recorded(file)
        assert found is not None
        assert found.alive

    def test_another_process_with_the_same_pid_is_not_it(self) -> None:
        me = processes.identify(os.getpid())
        assert me is not None
        assert not me._replace(start_ticks=me.start_ticks - 1).alive

    @pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"pid": "x", "start_ticks": 1}'])
    def test_a_broken_record_is_no_process(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "p"
        file.write_text(text)
        assert processes.recorded(file) is None


def test_an_error_of_a_plugin_is_one_line() -> None:
    out = b'{"cniVersion": "1.0.0", "code": 7, "msg": "bad\\nthing", "details": "x"}'
    assert cni.error_line(out, b"") == "bad thing; x"
    assert cni.error_line(b"", b"panic:\n  gone\n") == "panic: gone"
    assert cni.error_line(b"", b"") == "no message"
