"""What BIRD says on its control socket, as values: pure.

The protocol is lines: `NNNN-text` goes on, `NNNN text` ends a reply, a leading space repeats the code of
the line before, a leading `+` is a message that nobody asked for. The code's class says how it went: 0 fine,
1 data, 2 a table's head, 8 refused at run time, 9 not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from netpol.model.net import Prefix, parse_address, parse_prefix

# Codes that decide something (doc/reply_codes of BIRD).
READY = 1
RECONFIGURED = 3
IN_PROGRESS = 4
QUEUED = 5
CONFIG_OK = 20
NOT_FOUND = 8001
CONFIG_ERROR = 8002
FIRST_ERROR = 8000

_PROTOCOL_HEADER, _PROTOCOL, _PROTOCOL_DETAIL = 2002, 1002, 1006
_ROUTE = 1007
_LINE = re.compile(r"(?P<code>\d{4})(?P<more>[- ])(?P<text>.*)")
_CONFIG_AT = re.compile(r"^(?P<file>.*?):(?P<line>\d+):(?P<column>\d+) (?P<what>.*)$")


class Line(NamedTuple):
    """One line: its code and text."""

    code: int
    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    lines: tuple[Line, ...]

    @property
    def code(self) -> int:
        """The code that ended it."""
        return self.lines[-1].code if self.lines else 0

    @property
    def failed(self) -> bool:
        """Whether BIRD refused or did not understand."""
        return self.code >= FIRST_ERROR

    def texts(self, *codes: int) -> Iterator[str]:
        """The texts of the lines with one of these codes."""
        return (line.text for line in self.lines if line.code in codes)

    def __str__(self) -> str:
        return "; ".join(line.text.strip() for line in self.lines if line.text.strip())


class Reader:
    """Cuts a stream into replies: `feed` lines without their end, get a reply when one is whole."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._code = 0

    def feed(self, line: str) -> Reply | None:
        """Take one line."""
        if line.startswith("+"):
            return None
        if line.startswith(" ") or not line:
            self._lines.append(Line(self._code, line[1:]))
            return None
        found = _LINE.fullmatch(line)
        if found is None:
            # A line that is broken somehow belongs to what stands before it.
            self._lines.append(Line(self._code, line))
            return None
        self._code = int(found["code"])
        self._lines.append(Line(self._code, found["text"]))
        if found["more"] == "-":
            return None
        reply, self._lines = Reply(tuple(self._lines)), []
        return reply


class ConfigFault(NamedTuple):
    """Where a configuration is wrong; line 0 where BIRD does not say."""

    line: int
    what: str


def config_fault(reply: Reply) -> ConfigFault:
    """What an answer with CONFIG_ERROR says."""
    for text in reply.texts(CONFIG_ERROR):
        at = _CONFIG_AT.match(text)
        if at is not None:
            return ConfigFault(int(at["line"]), at["what"])
    return ConfigFault(0, str(reply))


@dataclass(slots=True)
class ProtocolState:
    """One protocol of `show protocols all`.

    Attributes:
        state: up, down, start, ...
        since: when the state changed, as BIRD writes it (`timeformat protocol iso long ms`).
        bgp: the state of a BGP session (Established, Active, ...); "" for others.
        error: what ended the last session, "" if nothing did.
        imported, exported, filtered: routes of both families.
    """

    name: str
    kind: str = ""
    state: str = ""
    since: str = ""
    bgp: str = ""
    neighbor: str = ""
    asn: int = 0
    error: str = ""
    imported: int = 0
    exported: int = 0
    filtered: int = 0
    limits: list[str] = field(default_factory=list)

    @property
    def established(self) -> bool:
        """Whether it is a session that is up."""
        return self.bgp == "Established"


def protocols(reply: Reply) -> dict[str, ProtocolState]:
    """Read `show protocols all`."""
    out: dict[str, ProtocolState] = {}
    current: ProtocolState | None = None
    for line in reply.lines:
        if line.code == _PROTOCOL:
            current = _protocol(line.text)
            if current is not None:
                out[current.name] = current
        elif line.code == _PROTOCOL_DETAIL and current is not None:
            _detail(current, line.text.strip())
    return out


def _protocol(text: str) -> ProtocolState | None:
    """`name proto table state date time info...`; columns are separated by space, not by width."""
    words = text.split()
    if len(words) < 6:
        return None
    name, kind, _table, state, date, time, *info = words
    return ProtocolState(
        name=name,
        kind=kind,
        state=state,
        since=f"{date} {time}",
        bgp=info[0] if kind == "BGP" and info else "",
        error=" ".join(info[1:]) if kind == "BGP" else "",
    )


def _detail(into: ProtocolState, text: str) -> None:
    key, colon, value = text.partition(":")
    if not colon:
        return
    value = value.strip()
    match key.strip():
        case "BGP state":
            into.bgp = value
        case "Neighbor address":
            into.neighbor = value
        case "Neighbor AS":
            into.asn = int(value) if value.isdigit() else 0
        case "Last error":
            into.error = value
        case "Routes":
            for number, what in re.findall(r"(\d+) (\w+)", value):
                match what:
                    case "imported":
                        into.imported += int(number)
                    case "exported":
                        into.exported += int(number)
                    case "filtered":
                        into.filtered += int(number)
        case "Import limit" | "Receive limit" | "Export limit" if "[HIT]" in text:
            into.limits.append(key.strip())


class RouteView(NamedTuple):
    """A route as BIRD has it.

    `refused` where the kernel did not take it (`!`); `best` is the one that is used.
    """

    prefix: Prefix
    protocol: str
    best: bool
    refused: bool
    unreachable: bool
    gateways: tuple[bytes, ...] = ()
    interface: str = ""


_HEAD = re.compile(
    r"(?P<prefix>\S*)\s+(?P<dest>unicast|blackhole|unreachable|prohibit|multicast)?\s*"
    r"\[(?P<protocol>\S+) [^\]]*\]\s*(?P<flags>[*!\s]*)(?:\([^)]*\))?"
)
_VIA = re.compile(r"via (?P<gateway>\S+) on (?P<interface>\S+)")
_ON = re.compile(r"dev (?P<interface>\S+)")


def routes(reply: Reply) -> tuple[RouteView, ...]:
    """Read `show route`."""
    out: list[RouteView] = []
    prefix: Prefix | None = None
    for text in reply.texts(_ROUTE):
        # Further routes of a prefix stand under it; what belongs to a route is behind a tab.
        head = None if text.startswith("\t") else _HEAD.match(text)
        if head is not None:
            if head["prefix"]:
                prefix = parse_prefix(head["prefix"])
            if prefix is None:
                continue
            out.append(
                RouteView(
                    prefix,
                    head["protocol"],
                    best="*" in head["flags"],
                    refused="!" in head["flags"],
                    unreachable=head["dest"] == "unreachable",
                )
            )
            continue
        via = _VIA.search(text)
        if via is not None and out:
            last = out[-1]
            out[-1] = last._replace(
                gateways=(*last.gateways, parse_address(via["gateway"])),
                interface=via["interface"],
            )
            continue
        on = _ON.search(text)
        if on is not None and out:
            out[-1] = out[-1]._replace(interface=on["interface"])
    return tuple(out)


def established(states: Iterable[ProtocolState]) -> int:
    """How many sessions are up."""
    return sum(s.established for s in states)
