"""The packet matrix: who reaches whom, found out with real packets from and to every pod.

Owns the question and the form of the answer, the same as `netpol-ctl matrix -o json`; `probeengine` sends
the packets. Judged is policy, not listening: whatever the destination's own stack answers (a connection,
a reset, an ICMP error, an SCTP ABORT) proves that the packet passed, and only silence or a refusal
on the way is a deny. A reset counts as the destination's own if the packet was seen to arrive there, so
agents that reject and ports where nobody listens are told apart.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from netpol.lab.probeengine import End, Engine, Outcome, SourcePorts
from netpol.lib.errors import InputError
from netpol.model.flow import Verdict
from netpol.model.ids import PORT_MAX, PORT_MIN, PORT_PROTOCOLS, Protocol
from netpol.model.net import Family, family_of

T = TypeVar("T")

#: How long silence must last to end a round when not one answer has told how fast this machine is.
TIMEOUT_S = 0.2

#: Source ports of this process: no two runs share one until the range is used up.
_SOURCE_PORTS = SourcePorts()


class ProbeEnd(NamedTuple):
    """One row and column.

    Attributes:
        name: "ns/name" of a pod, or the address of an external.
        netns: name or path of the network namespace; None makes it a destination only.
        addresses: packed, the primary one first.
    """

    name: str
    netns: str | None
    addresses: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The answer.

    Attributes:
        pods: names of rows and columns in the order given, pods before externals.
        verdicts: port label ("80/TCP") to source to destination to "allow" or "deny".
        probes: judged cells without the loopback ones.
        packets: packets sent, repeats included.
        duration_s: wall time, setting up included.
        faults: cells that no packet could be sent for, in words; they are "deny" in `verdicts`.
    """

    pods: tuple[str, ...]
    verdicts: dict[str, dict[str, dict[str, str]]]
    probes: int
    packets: int
    duration_s: float
    faults: tuple[str, ...] = ()

    def document(self) -> dict[str, object]:
        """The JSON document of `lab probe -o json`."""
        return {"pods": list(self.pods), "verdicts": self.verdicts}


def port_label(protocol: Protocol, number: int) -> str:
    """How a port is written as a key: "80/TCP"."""
    return f"{number}/{protocol}"


def run_probe(
    *,
    pods: Sequence[ProbeEnd],
    ports: Sequence[tuple[Protocol, int]],
    externals: Sequence[ProbeEnd] = (),
    family: Family | None = None,
    timeout_s: float = TIMEOUT_S,
    ports_file: Path | None = None,
) -> ProbeResult:
    """Send packets for every cell and wait for what comes back; blocks the calling thread.

    Args:
        pods: rows and columns.
        ports: protocols (TCP, UDP, SCTP) and destination ports.
        externals: further rows (those with a namespace) and columns.
        family: judge by this family; by default that of the destination's first address.
        timeout_s: silence that ends a round as long as nothing at all has answered.
        ports_file: where the next source port is kept between runs of several processes.

    Raises:
        InputError: nothing to probe, a name twice, or a port that cannot be probed.
        KernelError: a namespace cannot be entered, or the process is not root.
    """
    ends = _checked(pods, externals, ports)
    source_ports = SourcePorts(ports_file) if ports_file is not None else _SOURCE_PORTS
    return _on_own_thread(
        lambda: _run(
            ends=ends,
            ports=ports,
            family=family,
            timeout_s=timeout_s,
            source_ports=source_ports,
        )
    )


async def probe(
    *,
    pods: Sequence[ProbeEnd],
    ports: Sequence[tuple[Protocol, int]],
    externals: Sequence[ProbeEnd] = (),
    family: Family | None = None,
    timeout_s: float = TIMEOUT_S,
) -> ProbeResult:
    """The same as `run_probe`, on a thread, while the loop turns."""
    ends = _checked(pods, externals, ports)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[ProbeResult] = loop.create_future()

    def finish(result: ProbeResult | None, error: BaseException | None) -> None:
        if done.done():
            return
        if result is not None:
            done.set_result(result)
        elif error is not None:
            done.set_exception(error)

    def body() -> None:
        try:
            result = _run(
                ends=ends,
                ports=ports,
                family=family,
                timeout_s=timeout_s,
                source_ports=_SOURCE_PORTS,
            )
        except BaseException as e:  # noqa: BLE001  handed over to the waiting task
            loop.call_soon_threadsafe(finish, None, e)
        else:
            loop.call_soon_threadsafe(finish, result, None)

    threading.Thread(target=body, name="lab-probe", daemon=True).start()
    return await done


def _checked(
    pods: Sequence[ProbeEnd],
    externals: Sequence[ProbeEnd],
    ports: Sequence[tuple[Protocol, int]],
) -> tuple[ProbeEnd, ...]:
    ends = (*pods, *externals)
    if not ends or not ports:
        raise InputError(
            "nothing to probe",
            needed="at least one pod and one port",
            got=f"{len(ends)} pods and {len(ports)} ports",
        )
    names = [end.name for end in ends]
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise InputError("names of a matrix must differ", got=", ".join(twice))
    for protocol, number in ports:
        if protocol not in PORT_PROTOCOLS or not PORT_MIN <= number <= PORT_MAX:
            raise InputError(
                "a port cannot be probed",
                needed="1-65535 of TCP, UDP or SCTP",
                got=port_label(protocol, number),
            )
    return ends


def _run(
    *,
    ends: Sequence[ProbeEnd],
    ports: Sequence[tuple[Protocol, int]],
    family: Family | None,
    timeout_s: float,
    source_ports: SourcePorts,
) -> ProbeResult:
    """Plan, send and tabulate; changes the calling thread's namespace for good."""
    ports = tuple(dict.fromkeys(ports))
    engine = Engine(
        ends=[End(e.name, e.netns, e.addresses) for e in ends],
        source_ports=source_ports,
        timeout_s=timeout_s,
    )
    faults: list[str] = []
    verdicts: dict[str, dict[str, dict[str, str]]] = {
        port_label(*port): {
            src.name: {dst.name: str(Verdict.DENY) for dst in ends}
            for src in ends
            if src.netns is not None
        }
        for port in ports
    }
    probes = 0
    for i, src in enumerate(ends):
        if src.netns is None:
            continue
        for j, dst in enumerate(ends):
            if i == j:
                for port in ports:
                    verdicts[port_label(*port)][src.name][dst.name] = str(Verdict.ALLOW)
                continue
            probes += len(ports)
            address = _address(dst, family)
            if address is None or _address(src, family_of(address)) is None:
                wanted = family_of(address) if address is not None else family
                side = dst if address is None else src
                faults.append(
                    f"{src.name} to {dst.name}: {side.name} has no "
                    f"{f'IPv{wanted}' if wanted else ''} address"
                )
                continue
            for protocol, number in ports:
                engine.plan(source=i, destination=j, address=address, port=(protocol, number))
    outcome: Outcome = engine.run()
    for (i, j, port), verdict in outcome.verdicts.items():
        verdicts[port_label(*port)][ends[i].name][ends[j].name] = str(verdict)
    return ProbeResult(
        pods=tuple(e.name for e in ends),
        verdicts=verdicts,
        probes=probes,
        packets=outcome.packets,
        duration_s=outcome.duration_s,
        faults=(*faults, *outcome.faults),
    )


def _address(end: ProbeEnd, family: Family | None) -> bytes | None:
    return next((a for a in end.addresses if family is None or family_of(a) is family), None)


def _on_own_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as e:  # noqa: BLE001  handed over to the caller below
            errors.append(e)

    thread = threading.Thread(target=body, name="lab-probe", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
