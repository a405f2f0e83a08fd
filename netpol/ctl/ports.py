"""`--port`: numbers, ranges and names, with a protocol that is TCP unless said."""

from __future__ import annotations

import re
from typing import NamedTuple

from netpol.lib.errors import InputError
from netpol.model.ids import PORT_MAX, PORT_MIN, PORT_PROTOCOLS, Protocol
from netpol.model.objects import Endpoint

#: IANA service name as the API checks it: 1 to 15 of a-z, 0-9 and inner hyphens, with a letter.
_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_NEEDED = "80/tcp, 8000-8100/udp or a port's name"


class Ports(NamedTuple):
    """What a --port asks for: first..last, or a name. `protocol` of a name None: any protocol."""

    text: str
    protocol: Protocol | None
    first: int = 0
    last: int = 0
    name: str = ""


class Span(NamedTuple):
    """Ports first..last of one protocol."""

    protocol: Protocol
    first: int
    last: int

    def __str__(self) -> str:
        shown = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{shown}/{self.protocol}"


def parse_port(text: str) -> Ports:
    """Read the value of a --port.

    Raises:
        InputError: not a port.
    """
    body, slash, proto = text.strip().partition("/")
    protocol: Protocol | None = None
    if slash:
        protocol = next((p for p in PORT_PROTOCOLS if p.value == proto.upper()), None)
        if protocol is None:
            raise InputError(
                f"--port {text[:60]!r}", needed="protocol tcp, udp or sctp", got=proto[:20]
            )
    found = _RANGE.fullmatch(body)
    if found:
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        for number in (first, last):
            if not PORT_MIN <= number <= PORT_MAX:
                raise InputError(
                    f"--port {text[:60]!r}", needed=f"{PORT_MIN}..{PORT_MAX}", got=f"{number}"
                )
        if last < first:
            raise InputError(
                f"--port {text[:60]!r}", needed="a range FIRST-LAST with FIRST <= LAST"
            )
        return Ports(text, protocol or Protocol.TCP, first, last)
    if _NAME.fullmatch(body):
        return Ports(text, protocol, name=body)
    raise InputError(f"--port {text[:60]!r}", needed=_NEEDED)


def spans_on(ports: Ports, pod: Endpoint | None) -> tuple[Span, ...]:
    """What a --port means on a destination; a name of nothing there is no span at all."""
    if not ports.name:
        return (Span(ports.protocol or Protocol.TCP, ports.first, ports.last),)
    if pod is None:
        return ()
    return tuple(
        sorted(
            {
                Span(p.protocol, p.number, p.number)
                for p in pod.ports
                if p.name == ports.name and ports.protocol in (None, p.protocol)
            }
        )
    )


def declared(pod: Endpoint) -> tuple[Span, ...]:
    """The ports that a pod's containers declare."""
    return tuple(sorted({Span(p.protocol, p.number, p.number) for p in pod.ports}))
