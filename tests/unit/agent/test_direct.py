"""The agent's part in direct server return: order, faults, and that it goes on after them."""

from __future__ import annotations

import asyncio
import contextlib

from netpol.agent.direct import DirectReturn
from netpol.kernel.dsr import Made, PodLink
from netpol.model.ids import ObjectKey, Protocol
from netpol.model.net import parse_address
from netpol.model.ruleset import AddressPort
from proxy.rows import Backend, Kind, ServicePlan, ServiceRow

KEY = ObjectKey("shop", "web")
POD, VIP = parse_address("10.244.1.5"), parse_address("203.0.113.7")
HERE = AddressPort(VIP, Protocol.TCP, 80)
LINK = PodLink("veth1", port=True)


class FakeTunnels:
    """Makes the ends of the pods that it knows."""

    def __init__(self) -> None:
        self.pods: dict[bytes, PodLink] = {}
        self.has: dict[bytes, frozenset[bytes]] = {}
        self.broken = False
        self.log: list[str] = []

    def apply(self, wanted):
        """See PodTunnels."""
        self.log.append(f"ends {len(wanted)}")
        if self.broken:
            raise OSError("broken")
        self.has = {p: v for p, v in wanted.items() if p in self.pods}
        faults = dict.fromkeys(wanted.keys() - self.pods.keys(), "not here")
        return Made({p: self.pods[p] for p in self.has}, faults)


def plan() -> ServicePlan:
    row = ServiceRow(KEY, "http", Kind.EXTERNAL_IP, VIP, 80, Protocol.TCP)
    backends = (Backend(POD, 80),)
    return ServicePlan(
        KEY,
        rows=(
            ServiceRow(**{**_fields(row), "backends": backends, "tunnel": True, "ends": (POD,)}),
        ),
    )


def _fields(row: ServiceRow) -> dict[str, object]:
    return {name: getattr(row, name) for name in ServiceRow.__slots__}


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the agent has no event for a test
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(direct: DirectReturn):
    task = asyncio.create_task(direct.run_forever())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_answers_are_let_in_after_an_end_is_there_and_not_any_more_before_it_goes():
    tunnels, told = FakeTunnels(), []
    tunnels.pods[POD] = LINK

    def answers(ports, links):
        told.append((set(ports), set(links)))
        tunnels.log.append(f"answers {len(told[-1][1])}")

    direct = DirectReturn(tunnels, answers=answers)
    async with running(direct):
        await until(lambda: tunnels.log)
        direct.changed({KEY: plan()})
        await until(lambda: tunnels.has)
        await until(lambda: told[-1] == ({HERE}, {(VIP, LINK)}))
        direct.changed({KEY: None})
        await until(lambda: not tunnels.has)
    steps = [step for at, step in enumerate(tunnels.log) if step not in tunnels.log[at - 1 : at]]
    assert (
        steps
        == [
            "answers 0",
            "ends 0",
            "answers 0",
            "ends 1",
            "answers 1",
            "answers 0",
            "ends 0",
            "answers 0",
        ][: len(steps)]
    )
    assert told[-1] == (set(), set())


async def test_what_fails_is_the_services_error_and_is_tried_again():
    tunnels, told = FakeTunnels(), []
    direct = DirectReturn(tunnels, told=lambda: told.append(1))
    direct.changed({KEY: plan()})
    async with running(direct):
        await until(lambda: direct.faults)
        assert direct.faults == {KEY: ["direct server return to 10.244.1.5: not here"]}
        assert told
        tunnels.pods[POD] = LINK
        await until(lambda: tunnels.has)
        await until(lambda: not direct.faults)


async def test_it_goes_on_after_an_error():
    tunnels = FakeTunnels()
    tunnels.pods[POD], tunnels.broken = LINK, True
    direct = DirectReturn(tunnels)
    direct.changed({KEY: plan()})
    async with running(direct):
        await until(lambda: direct.error)
        assert direct.error == "direct server return: broken"
        tunnels.broken = False
        await until(lambda: tunnels.has)
        await until(lambda: not direct.error)
