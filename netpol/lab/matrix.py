"""`lab probe`: which pods and ports are probed, and how the answer is printed.

Owns the reading of --port for the lab's pods and the text of the matrix; `probe` sends the packets.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from netpol.lib.errors import InputError, NoAnswerError
from netpol.model.ids import PORT_MAX, PORT_MIN, Protocol
from netpol.model.net import Family

Obj = dict[str, Any]

_PROTOCOLS = {"TCP": Protocol.TCP, "UDP": Protocol.UDP, "SCTP": Protocol.SCTP}
_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PORTS_MAX = 1024  # of one probe; a range beyond is a typing error


class WantedPort(NamedTuple):
    """A --port: a range of numbers, or a name where `name` is set; no protocol means any for a name."""

    protocol: Protocol | None
    first: int
    last: int
    name: str


def parse_port(text: str) -> WantedPort:
    """Read `80`, `80/tcp`, `8000-8010/udp` or a name.

    Raises:
        InputError: It is none of these.
    """
    number, slash, protocol_text = text.partition("/")
    protocol = _PROTOCOLS.get(protocol_text.upper()) if slash else None
    if slash and protocol is None:
        raise InputError(f"--port {text}", needed="tcp, udp or sctp behind /", got=protocol_text)
    found = _RANGE.fullmatch(number)
    if found is None:
        if _NAME.fullmatch(number):
            return WantedPort(protocol, 0, 0, number)
        raise InputError(
            f"--port {text}", needed="N, N-M or a port's name, then /tcp, /udp or /sctp"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if not PORT_MIN <= first <= last <= PORT_MAX:
        needed = f"numbers from {PORT_MIN} to {PORT_MAX}, the lower first"
        raise InputError(f"--port {text}", needed=needed, got=number)
    return WantedPort(protocol or Protocol.TCP, first, last, "")


def resolve_ports(wanted: list[WantedPort], pods: list[Obj]) -> list[tuple[Protocol, int]]:
    """Return the ports to probe; without a wish, those that the pods declare.

    Raises:
        InputError: No pod declares a port of that name, or there is nothing to probe.
    """
    declared = [(name, Protocol(p), number) for pod in pods for name, p, number in pod["ports"]]
    found: dict[tuple[Protocol, int], None] = {}
    for port in wanted:
        if port.name:
            named = [
                (protocol, number)
                for name, protocol, number in declared
                if name == port.name and port.protocol in (None, protocol)
            ]
            if not named:
                known = ", ".join(sorted({name for name, _, _ in declared if name})) or "none"
                raise InputError(
                    f"--port {port.name}", needed="a port's name", got=f"known: {known}"
                )
            found.update(dict.fromkeys(named))
        elif port.protocol is not None:
            numbers = range(port.first, port.last + 1)
            found.update(dict.fromkeys((port.protocol, number) for number in numbers))
    if not wanted:
        found = dict.fromkeys(sorted({(protocol, number) for _, protocol, number in declared}))
    if not found:
        raise InputError("lab probe", needed="--port N/PROTO (no pod declares a port)")
    if len(found) > _PORTS_MAX:
        raise InputError("--port", needed=f"at most {_PORTS_MAX} ports", got=str(len(found)))
    return list(found)


def probe(
    pods: list[Obj],
    wanted: list[WantedPort],
    *,
    family: int | None,
    as_json: bool,
    resource_version: int,
    ports_file: Path,
) -> int:
    """Send packets from and to every running pod and print who reached whom.

    `ports_file` keeps the next source port, so that no probe repeats an earlier one's flow.

    Raises:
        NoAnswerError: No pod runs.
    """
    from netpol.lab.probe import ProbeEnd, run_probe

    running = [pod for pod in pods if pod["addresses"]]
    if not running:
        raise NoAnswerError("lab probe: no pod runs")
    ports = resolve_ports(wanted, running)
    result = run_probe(
        pods=[
            ProbeEnd(
                pod["key"],
                pod["netns"],
                tuple(ipaddress.ip_address(address).packed for address in pod["addresses"]),
            )
            for pod in running
        ],
        ports=ports,
        family=Family(family) if family else None,
        ports_file=ports_file,
    )
    for fault in result.faults:
        print(f"lab probe: {fault}", file=sys.stderr)
    if as_json:
        print(json.dumps(result.document(), indent=2))
        return 0
    cells = [
        cell
        for rows in result.verdicts.values()
        for source, row in rows.items()
        for destination, cell in row.items()
        if source != destination
    ]
    rate = result.probes / result.duration_s if result.duration_s else 0
    print(
        f"{cells.count('allow')} of {len(cells)} flows pass, {cells.count('deny')} are denied "
        f"(resourceVersion {resource_version}; {result.probes} probes in "
        f"{result.duration_s:.2f} s, {rate:,.0f}/s)"
    )
    for port, rows in result.verdicts.items():
        print(f"\n{port}")
        for line in table(rows, result.pods):
            print(line)
    return 0


def table(rows: dict[str, dict[str, str]], columns: tuple[str, ...]) -> list[str]:
    """Return a matrix as text: sources down, destinations across by number."""
    width = max(len(name) for name in rows)
    digits = max(2, len(str(len(columns))))
    number_of = {name: str(i) for i, name in enumerate(columns, 1)}
    lines = [
        " " * (digits + width + 2) + " ".join(number_of[name].rjust(digits) for name in columns)
    ]
    marks = {"allow": ".", "deny": "X"}
    for source, row in rows.items():
        cells = " ".join(
            ("-" if source == name else marks[row[name]]).rjust(digits) for name in columns
        )
        lines.append(f"{number_of[source].rjust(digits)} {source.ljust(width)} {cells}")
    lines.append(f"{' ' * digits} from the left to the top: . allow, X deny")
    return lines
