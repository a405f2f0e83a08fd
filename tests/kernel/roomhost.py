"""A node in a namespace, with a policy room on its kernel and others who write there too."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any

from netpol.enforce.kernel_state import dump_kernel
from netpol.enforce.worker import PolicyRoom
from netpol.k8s.decode import NETWORK_POLICY, decode
from netpol.kernel.drivers import TableDriver, Variant
from netpol.kernel.netns import in_netns
from netpol.kernel.sets import NetlinkSets
from netpol.kernel.tables import RestoreTables
from netpol.model.ids import Direction, ObjectKey, SetName
from netpol.model.net import FAMILIES, Family, parse_address
from netpol.model.objects import Endpoint
from netpol.model.ruleset import Member
from netpol.policy.compile import compile_policy
from netpol.policy.graph import Graph
from netpol.render import names
from tests import builders as make
from tests.prop import churn

#: Looks come 50 ms after a write, then at doubling distances: what is undone at once is seen at once.
REPAIR_S = 5.0
TABLES = ("raw", "mangle", "nat", "filter")

#: What kube-proxy and Docker have on a node, in the tables and hooks that we write and in others.
FOREIGN_RULES = """
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
:DOCKER - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m udp --dport 53 -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SVC-TCOU7JCQXEZGVUNU -p udp -j DNAT --to-destination 10.0.1.2:53
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KNOT - [0:0]
-A FORWARD -m set --match-set knot src -j KNOT
-A FORWARD -o eth0 -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A OUTPUT -j KNOT
-A KNOT -p tcp -m tcp --dport 22 -j DSCP --set-dscp 0x04
COMMIT
"""
FOREIGN_SETS = """
create knot hash:ip family inet
add knot 192.0.2.7
create KUBE-CLUSTER-IP hash:ip,port family inet
add KUBE-CLUSTER-IP 10.96.0.10,udp:53
create knp-lower hash:net family inet6
add knp-lower 2001:db8::/32
"""


class Host:
    """A node in a namespace: its room, and the hands of others."""

    def __init__(
        self,
        space: str,
        variant: Variant,
        field_mask: int = churn.WIDE,
        tables: TableDriver | None = None,
    ) -> None:
        self.space, self.variant = space, variant
        self.tables = RestoreTables(variant, netns=space) if tables is None else tables
        self.field_mask = field_mask
        self.graph = Graph(churn.NODE)
        self.rooms = 0

    def run(self, *command: str, stdin: str = "") -> str:
        def work() -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)

        done = in_netns(self.space, work)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def tool(self, family: Family, tail: str = "") -> str:
        return f"ip{'' if family is Family.V4 else '6'}tables-{self.variant}{tail}"

    def iptables(self, *words: str, family: Family = Family.V4) -> None:
        self.run(self.tool(family), "-w", *words)

    def foreigners(self) -> None:
        """Have what others put on a node."""
        self.run("ipset", "restore", stdin=FOREIGN_SETS)
        self.run(self.tool(Family.V4, "-restore"), "--noflush", stdin=FOREIGN_RULES)
        only = "*mangle\n:KNOT - [0:0]\n-A FORWARD -j KNOT\n-A KNOT -j RETURN\nCOMMIT\n"
        self.run(self.tool(Family.V6, "-restore"), "--noflush", stdin=only)

    def foreign(self) -> str:
        """Everything that is not ours, as the tools print it."""
        out = []
        for family in FAMILIES:
            for table in TABLES:
                text = self.run(self.tool(family, "-save"), "-t", table)
                text = re.sub(r"\[\d+:\d+\]", "", text)
                out += [
                    line
                    for line in text.splitlines()
                    if not line.startswith(("#", ":KNP-", "-A KNP-")) and "-j KNP-" not in line
                ]
        saved = self.run("ipset", "save").splitlines()
        return "\n".join([*out, *(s for s in saved if not s.split()[1].startswith("KNP-"))])

    def tell(self, *events: churn.Event) -> None:
        for event in events:
            event.tell(self.graph)

    @contextlib.asynccontextmanager
    async def room(self) -> AsyncIterator[PolicyRoom]:
        """A room that has started; it ends as an agent does, and leaves the rules."""
        sets = in_netns(self.space, lambda: NetlinkSets(mark_mask=self.field_mask))
        room = PolicyRoom(
            self.graph,
            sets=sets,
            tables=self.tables,
            options=churn.options_of(self.field_mask),
        )
        task = asyncio.create_task(room.run_forever())
        room.start()
        try:
            yield room
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            room.close()

    def maps(self) -> dict[SetName, dict[Member, int | None]]:
        """The class maps of both families, whatever other sets there are."""
        sets = in_netns(self.space, lambda: NetlinkSets(mark_mask=self.field_mask))
        try:
            wanted = [names.class_map(d, f) for d in Direction for f in FAMILIES]
            return {n: dict(d.members) for n, d in sets.dump(wanted).items()}
        finally:
            sets.close()

    def state(self) -> tuple[Any, ...]:
        """Our part of the kernel."""
        sets = in_netns(self.space, lambda: NetlinkSets(mark_mask=self.field_mask))
        try:
            dump = dump_kernel(sets, self.tables)
        finally:
            sets.close()
        return (
            {n: (d.spec, d.members) for n, d in dump.sets.items()},
            {f: (dict(t.chains), dict(t.hooks)) for f, t in dump.tables.items()},
        )


async def until(what: Callable[[], bool], timeout_s: float = REPAIR_S) -> bool:
    """Wait for something; whether it came."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while loop.time() < deadline:
        if await asyncio.to_thread(what):
            return True
        await asyncio.sleep(0.02)
    return False


def pod(name: str, last: int, **labels: str) -> churn.Event:
    made = Endpoint(
        key=ObjectKey("a", name),
        uid=name,
        labels=tuple(sorted(labels.items())),
        node=churn.NODE,
        addresses=(parse_address(f"10.0.1.{last}"), parse_address(f"fd00:0:1::{last}")),
    )
    return churn.Event("pods", made.key, made)


def policy(name: str, subject: str, *peers: make.Json) -> churn.Event:
    """Only `peers` may reach the pods of role `subject`."""
    text = make.policy(f"a/{name}", make.selector(role=subject), ingress=[make.ingress(*peers)])
    made = compile_policy(decode(NETWORK_POLICY, text).value)
    return churn.Event("policies", made.key, made)
