"""All six kinds against the lab's API server, which real kubectl speaks to as well."""

import asyncio

import pytest

from netpol.k8s.api import Api
from netpol.k8s.decode import KINDS, NETWORK_POLICY, POD
from netpol.k8s.informers import InformerSet, pods_on
from netpol.k8s.watching import WatchOptions
from netpol.lab.apiserver import ApiServer
from netpol.model.ids import ObjectKey
from tests.unit.k8s.badserver import FastClock


def named(kind, name, **more):
    head = {"apiVersion": KINDS[kind].api_version, "kind": kind}
    meta = {"name": name, **({"namespace": "shop"} if KINDS[kind].namespaced else {})}
    return {**head, "metadata": meta, **more}


def web_pod(name, node):
    return named("Pod", name, spec={"nodeName": node, "containers": [{"name": "c", "image": "i"}]})


def fill(server):
    for obj in (
        named("Namespace", "shop"),
        named("Node", "n1", spec={"podCIDR": "10.244.1.0/24"}),
        web_pod("web-1", "n1"),
        web_pod("web-2", "n2"),
        named("Service", "web", spec={"selector": {"app": "web"}, "ports": [{"port": 80}]}),
        named("EndpointSlice", "web-x", addressType="IPv4", endpoints=[], ports=[{"port": 80}]),
        named("NetworkPolicy", "deny", spec={"podSelector": {}, "policyTypes": ["Ingress"]}),
    ):
        server.store.create(obj)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - whatever the condition is about
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("watch_list", [True, False], ids=["watch list", "paged list"])
async def test_every_kind_is_listed_followed_and_survives_compaction(watch_list):
    async with ApiServer() as server, Api.for_server(server.url) as api:
        server.faults.no_watch_list = not watch_list
        fill(server)
        options = WatchOptions(page_size=2)
        async with InformerSet(api, options=options, clock=FastClock()) as watches:
            for kind in KINDS.values():
                watches.start(kind)
            local = watches.start(POD, name="local", selection=pods_on("n1"))
            async with asyncio.timeout(20):
                await watches.wait_synced()
            held = {s.name: s.objects for s in watches.status()}
            assert held["pods"] == 2
            assert held["local"] == 1
            assert all(held.values())
            policies = watches.get(NETWORK_POLICY.plural).store
            key = ObjectKey("shop", "deny")
            assert policies.get(key).spec.policy_types == ("Ingress",)

            server.faults.watch_gone = 2
            server.faults.watch_duplicate = True
            server.compact()
            server.store.create(web_pod("web-3", "n1"))
            await until(lambda: len(local.store) == 2)
            raw = await api.patch(
                NETWORK_POLICY.path(key), {"spec": {"policyTypes": ["Ingress", "Egress"]}}
            )
            assert b"Egress" in raw
            await until(lambda: len(policies.get(key).spec.policy_types) == 2)
            await api.delete(NETWORK_POLICY.path(key))
            await until(lambda: key not in policies)
            assert not any(s.rejected or s.incomplete for s in watches.status())
