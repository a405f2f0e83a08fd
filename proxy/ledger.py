"""What of IPVS is ours, or may be: the text of the ledger and what it means.

Pure; `proxy.ledger_file` keeps the file. One line for each fact, a JSON list, under a line that names the
version; a later line about the same server supersedes the earlier ones:

    ["+", 4, "TCP", "10.96.0.10", 53]               may be ours: written before the kernel is told
    ["+", 4, 256, "shop", "web", "http", 0]         the same of a server by mark, with who has the mark
    ["!", 4, "TCP", "10.96.0.11", 80]               somebody else's: it stood there when we wanted to
    ["-", 4, "TCP", "10.96.0.10", 53]               neither: it is not in the kernel any more

A last line without its end was never acted on. Any other line that cannot be read makes the whole ledger
unreadable, and then only what stands on an address of our own link counts as ours.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from netpol.model.ids import ObjectKey, Protocol
from netpol.model.ipvs import ServerId
from netpol.model.net import Family, family_of, format_address, parse_address
from proxy.marks import MarkKey

#: The first line; another number is another meaning of what follows.
HEADER = b"netpol-ipvs-ledger 1\n"


class Word(StrEnum):
    """What a line says of its server."""

    OURS = "+"
    FOREIGN = "!"
    GONE = "-"


@dataclass(slots=True)
class Ledger:
    """What is known of whose servers are.

    Attributes:
        ours: servers that are or may be ours; those by mark with who has the mark.
        foreign: servers that are not, although they stand where we would.
    """

    ours: dict[ServerId, MarkKey | None] = field(default_factory=dict)
    foreign: set[ServerId] = field(default_factory=set)

    def take(self, word: Word, server: ServerId, mark: MarkKey | None = None) -> bool:
        """Learn a fact; whether it is news."""
        match word:
            case Word.OURS:
                news = server not in self.ours or self.ours[server] != mark
                self.ours[server] = mark
                self.foreign.discard(server)
            case Word.FOREIGN:
                news = server not in self.foreign
                self.foreign.add(server)
                self.ours.pop(server, None)
            case Word.GONE:
                news = server in self.ours or server in self.foreign
                self.ours.pop(server, None)
                self.foreign.discard(server)
        return news

    def owns(self, server: ServerId, on_link: Container[bytes]) -> bool:
        """Whether a server that the kernel has is ours, by what is known and the addresses of our link.

        Somebody's server that stood before its address came to our link stays somebody's.
        """
        if server in self.ours:
            return True
        return not server.fwmark and server.address in on_link and server not in self.foreign

    @property
    def marks(self) -> Mapping[MarkKey, int]:
        """Who has which mark."""
        return {key: server.fwmark for server, key in self.ours.items() if key is not None}

    def __len__(self) -> int:
        return len(self.ours) + len(self.foreign)


def line(word: Word, server: ServerId, mark: MarkKey | None = None) -> bytes:
    """One line, with its end."""
    what: list[Any] = [word.value, server.family.value]
    if server.fwmark:
        what.append(server.fwmark)
        if mark is not None:
            what += [*mark.service, mark.port_name, mark.variant]
    else:
        what += [str(server.protocol), format_address(server.address), server.port]
    return msgspec.json.encode(what) + b"\n"


def text(ledger: Ledger) -> bytes:
    """The whole ledger, as short as it can be."""
    lines = [HEADER]
    lines += [line(Word.OURS, server, mark) for server, mark in ledger.ours.items()]
    lines += [line(Word.FOREIGN, server) for server in ledger.foreign]
    return b"".join(lines)


def parse(data: bytes) -> Ledger:
    """Read a ledger.

    Raises:
        ValueError: it cannot be believed; the message says why.
    """
    if not data.startswith(HEADER):
        first = data.split(b"\n", 1)[0][:40].decode(errors="replace")
        raise ValueError(f"the ledger's first line is {first!r}")
    ledger = Ledger()
    whole = data[: data.rfind(b"\n") + 1]
    for number, raw in enumerate(whole[len(HEADER) :].splitlines(), 2):
        try:
            ledger.take(*_fact(msgspec.json.decode(raw)))
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise ValueError(f"line {number} of the ledger: {e}") from e
    return ledger


def _fact(what: Any) -> tuple[Word, ServerId, MarkKey | None]:
    match what:
        case [str(word), int(family), str(protocol), str(address), int(port)]:
            packed = parse_address(address)
            if family_of(packed) is not Family(family) or not 0 <= port <= 0xFFFF:
                raise ValueError(f"no server: {address} port {port}")
            return Word(word), ServerId(Family(family), Protocol(protocol), packed, port), None
        case [str(word), int(family), int(mark), *owner] if 0 < mark <= 0xFFFFFFFF:
            server = ServerId.by_mark(Family(family), mark)
            match owner:
                case []:
                    return Word(word), server, None
                case [str(namespace), str(name), str(port_name), int(variant)]:
                    key = ObjectKey(namespace, name)
                    return Word(word), server, MarkKey(key, port_name, Family(family), variant)
                case _:
                    raise ValueError(f"no owner of a mark: {owner}")
        case _:
            raise ValueError(f"no fact: {what}")


def changes(ledger: Ledger, facts: Iterable[tuple[Word, ServerId, MarkKey | None]]) -> bytes:
    """Take facts into the ledger; returns the lines that say what was news."""
    return b"".join(line(*fact) for fact in facts if ledger.take(*fact))
