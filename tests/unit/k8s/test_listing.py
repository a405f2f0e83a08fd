import pytest

from netpol.k8s.api import Api
from netpol.k8s.decode import POD
from netpol.k8s.errors import ApiError, DecodeError
from netpol.k8s.informers import pods_on
from netpol.k8s.listing import list_all
from tests.unit.k8s.badserver import BadServer, pod


@pytest.fixture
async def server():
    async with BadServer() as made:
        for i in range(5):
            made.put(pod(f"p{i}", node=f"n{i % 2}"))
        bad = pod("bad")
        bad["spec"]["containers"] = 5
        made.put(bad)
        yield made


async def test_all_pages_are_one_list(server):
    async with Api.for_server(server.url) as api:
        got = await list_all(api, POD, page_size=2)
    assert [i.key.name for i in got.items] == ["p0", "p1", "p2", "p3", "p4"]
    assert [e.key.name for e in got.errors] == ["bad"]
    assert got.resource_version == str(server.rv)
    assert len(server.lists) == 3


async def test_a_selection(server):
    async with Api.for_server(server.url) as api:
        got = await list_all(api, POD, selection=pods_on("n0"))
    assert [i.key.name for i in got.items] == ["p0", "p2", "p4"]


async def test_pages_that_expire_are_asked_in_one_piece(server):
    server.expire_continue = 1
    async with Api.for_server(server.url) as api:
        got = await list_all(api, POD, page_size=2)
    assert len(got.items) == 5
    assert ["limit" in q for q in server.lists] == [True, True, False]


async def test_failures_are_raised(server):
    server.list_faults.extend(("403", "garbage"))
    async with Api.for_server(server.url) as api:
        with pytest.raises(ApiError, match="403"):
            await list_all(api, POD)
        with pytest.raises(DecodeError, match="Pod"):
            await list_all(api, POD)
