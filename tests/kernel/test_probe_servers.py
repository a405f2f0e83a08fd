"""The pods' servers, asked by the tools that people use."""

import asyncio
import re
import socket
from datetime import UTC, datetime

import pytest

from netpol.kernel.netns import open_socket
from netpol.lab import sctp
from netpol.lab.podserver import PodServers
from netpol.lib.errors import InputError, KernelError, NoAnswerError
from netpol.model.ids import ObjectKey, Protocol
from tests.kernel.probespaces import Bridge

pytestmark = pytest.mark.kernel

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
WEB = ObjectKey("shop", "web")
PORTS = [(TCP, 80), (UDP, 53), (SCTP, 9000), (TCP, 80)]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with Bridge("serve", 3, tmp_path=tmp_path_factory.mktemp("lock")) as it:
        yield it


@pytest.fixture
async def servers():
    it = PodServers(now=lambda: datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC))
    yield it
    await it.close()


@pytest.fixture
async def web(bridge, servers):
    await servers.add(WEB, bridge.pods[0], PORTS)
    return servers


async def tool(netns, *args, stdin=None):
    """Run a command in a namespace while the loop serves; returns exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", netns, *args),
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 10)
    return process.returncode, out.decode(), err.decode()


async def test_every_server_answers_the_self_check(web):
    assert await web.check(WEB) == []
    assert web.log(WEB) == []


async def test_the_self_check_names_what_does_not_answer(bridge, servers):
    await servers.add(WEB, bridge.pods[0], [(TCP, 80), (UDP, 53)])
    servers._pods[WEB].servers[0].close()
    faults = await servers.check(WEB)
    assert faults == [
        "80/TCP on 127.0.0.1: Connection refused",
        "80/TCP on ::1: Connection refused",
    ]


@pytest.mark.parametrize("family", [0, 1])
async def test_nc_and_curl_get_the_name(bridge, web, family):
    address = bridge.texts(0)[family]
    code, _, err = await tool(bridge.pods[1], "nc", "-vz", "-w", "2", address, "80")
    assert code == 0, err
    code, out, _ = await tool(bridge.pods[1], "nc", "-w", "2", address, "80")
    assert (code, out) == (0, "web\n")
    code, out, _ = await tool(
        bridge.pods[1], "nc", "-N", "-w", "2", address, "80", stdin=b"hello\n"
    )
    assert (code, out) == (0, "web\n")
    url = f"http://[{address}]/x" if ":" in address else f"http://{address}/x"
    code, out, err = await tool(bridge.pods[1], "curl", "-sSv", "-m", "3", "--data", "a=b", url)
    assert (code, out) == (0, "web\n"), err
    assert "HTTP/1.1 200 OK" in err
    code, out, _ = await tool(bridge.pods[1], "curl", "-sSI", "-m", "3", url)
    assert code == 0
    assert "Content-Length: 4" in out
    code, out, _ = await tool(bridge.pods[1], "wget", "-qO-", "-T", "3", url)
    assert (code, out) == (0, "web\n")
    assert web.log(WEB)[0].startswith("2026-01-02T03:04:05.000006Z TCP 80 from ")
    source = bridge.texts(1)[family]
    assert sum(source in line for line in web.log(WEB)) == 6


async def test_udp_answers_from_the_address_it_was_asked_at(bridge, web):
    await tool(bridge.pods[0], "ip", "addr", "add", "10.9.7.7/16", "dev", "eth0")
    await tool(bridge.pods[0], "ip", "addr", "add", "fd09::7:7/64", "dev", "eth0", "nodad")
    loop = asyncio.get_running_loop()
    for family, address in ((socket.AF_INET, "10.9.7.7"), (socket.AF_INET6, "fd09::7:7")):
        with open_socket(bridge.pods[1], family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            await loop.sock_sendto(sock, b"who", (address, 53))
            data, peer = await asyncio.wait_for(loop.sock_recvfrom(sock, 100), 3)
            assert (data, peer[:2]) == (b"web\n", (address, 53))
    assert re.search(r"UDP 53 from 10\.9\.1\.2:\d+ answered$", web.log(WEB)[0])
    assert re.search(r"UDP 53 from \[fd09::1:2\]:\d+ answered$", web.log(WEB)[1])


async def test_two_udp_servers_do_not_talk_forever(bridge, web):
    await web.add(ObjectKey("shop", "b"), bridge.pods[1], [(UDP, 53)])
    loop = asyncio.get_running_loop()
    with open_socket(bridge.pods[2], socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_sendto(sock, b"b\n", (bridge.texts(0)[0], 53))
        await loop.sock_sendto(sock, b"other\n", (bridge.texts(0)[0], 53))
        assert await asyncio.wait_for(loop.sock_recv(sock, 100), 3) == b"web\n"
    assert len(web.log(WEB)) == 1


@pytest.mark.parametrize(("port", "chunk"), [(9000, sctp.ChunkType.INIT_ACK), (9001, 6)])
@pytest.mark.parametrize("family", [0, 1])
async def test_sctp_ports_answer_inits(bridge, web, port, chunk, family):
    loop = asyncio.get_running_loop()
    kind = (socket.AF_INET, socket.AF_INET6)[family]
    with open_socket(bridge.pods[1], kind, socket.SOCK_RAW, socket.IPPROTO_SCTP) as sock:
        sock.setblocking(False)
        init = sctp.build_init(sport=4000, dport=port, initiate_tag=99)
        await loop.sock_sendto(sock, init, (bridge.texts(0)[family], 0))
        data = await asyncio.wait_for(loop.sock_recv(sock, 1000), 3)
    packet = sctp.parse(data if family else sctp.strip_ipv4(data)[2])
    assert (packet.tag, packet.chunk, packet.sport, packet.dport) == (99, chunk, port, 4000)
    assert len(web.log(WEB)) == (port == 9000)


async def test_undeclared_ports_are_closed(bridge, web):
    code, _, err = await tool(bridge.pods[1], "nc", "-vz", "-w", "2", bridge.texts(0)[0], "81")
    assert code == 1
    assert "refused" in err


async def test_a_removed_pod_is_closed_and_its_port_free_again(bridge, web):
    code, _, _ = await tool(bridge.pods[1], "nc", "-w", "2", bridge.texts(0)[0], "80")
    assert code == 0
    await web.remove(WEB)
    await web.remove(WEB)
    assert WEB not in web
    with pytest.raises(NoAnswerError, match="shop/web"):
        web.log(WEB)
    await web.add(WEB, bridge.pods[0], PORTS, "v2")
    code, out, _ = await tool(bridge.pods[1], "nc", "-w", "2", bridge.texts(0)[0], "80")
    assert out == "v2\n"


async def test_a_pod_that_is_added_again_is_replaced_and_keeps_its_log(bridge, web):
    await tool(bridge.pods[1], "nc", "-w", "2", bridge.texts(0)[0], "80")
    await web.add(WEB, bridge.pods[0], [(TCP, 8080)])
    assert len(web.log(WEB)) == 1
    code, _, _ = await tool(bridge.pods[1], "nc", "-z", "-w", "2", bridge.texts(0)[0], "80")
    assert code == 1
    code, _, _ = await tool(bridge.pods[1], "nc", "-z", "-w", "2", bridge.texts(0)[0], "8080")
    assert code == 0


async def test_a_taken_port_is_an_error_by_name_and_serves_nothing(bridge, web):
    with pytest.raises(KernelError, match=r"80/TCP \(Address already in use\)"):
        await web.add(ObjectKey("shop", "host"), bridge.pods[0], [(TCP, 8080), (TCP, 80)])
    assert ObjectKey("shop", "host") not in web
    code, _, _ = await tool(bridge.pods[1], "nc", "-z", "-w", "2", bridge.texts(0)[0], "8080")
    assert code == 1
    assert await web.check(WEB) == []


async def test_pods_of_one_namespace_share_the_sctp_answers(bridge, web):
    other = ObjectKey("shop", "other")
    await web.add(other, bridge.pods[0], [(SCTP, 9001)])
    assert await web.check(WEB) == []
    assert await web.check(other) == []
    await web.remove(other)
    assert await web.check(WEB) == []


async def test_bad_input_is_refused_by_name(servers):
    with pytest.raises(InputError, match="needed TCP, UDP or SCTP"):
        await servers.add(WEB, "knpt-none", [(Protocol.ICMP, 1)])
    with pytest.raises(KernelError, match="knpt-none"):
        await servers.add(WEB, "knpt-none", [(TCP, 1)])


async def test_a_follower_sees_old_and_new_lines_and_ends_with_the_pod(bridge, web):
    await tool(bridge.pods[1], "nc", "-w", "2", bridge.texts(0)[0], "80")
    seen = []

    async def follow():
        seen.extend([line async for line in web.follow(WEB)])

    task = asyncio.create_task(follow(), name="follow")
    await asyncio.sleep(0)
    await tool(bridge.pods[2], "nc", "-w", "2", bridge.texts(0)[0], "80")
    await web.remove(WEB)
    await asyncio.wait_for(task, 3)
    assert [re.search(r"from (\S+):", line)[1] for line in seen] == ["10.9.1.2", "10.9.1.3"]
